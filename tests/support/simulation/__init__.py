"""A whole operator against a simulated cluster in virtual time, and what can go wrong between them, by seed."""
