"""Importance matrices: the rows that one is computed from, and the process that computes it. Used by `builder`."""
