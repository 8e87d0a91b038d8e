"""`make demo`: from nothing to an answer on one Linux machine. Leaves a two-node cluster up and says how to use it."""
