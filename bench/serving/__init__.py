"""Serving, measured beside its peers: `make bench-serving`."""
