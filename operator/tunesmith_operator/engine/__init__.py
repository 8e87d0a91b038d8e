"""A work queue, and the loop observe → decide → act for one key at a time."""
