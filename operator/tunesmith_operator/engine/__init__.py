"""The operator's heart: a work queue, and the loop observe → decide → act for one key at a time."""
