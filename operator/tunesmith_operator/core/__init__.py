"""The operator's reasoning: pure functions from what was observed to what is to be done. No I/O, clock or chance."""
