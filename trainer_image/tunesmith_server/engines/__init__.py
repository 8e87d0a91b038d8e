"""The programs that answer: one module each, behind the protocol of `base`."""
