"""What several ranks do together: agree on numbers, share out one model. Used by `loop`, `checkpoint`, `report`."""
