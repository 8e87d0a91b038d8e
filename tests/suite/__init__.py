"""Runs the tests floor by floor and sums them up. Called by `make test` and the targets of single floors."""
