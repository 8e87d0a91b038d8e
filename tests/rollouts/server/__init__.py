"""Stands in for `tunesmith_server` in an image of the tests: answers at once, and badly where its image says so."""
