"""What all kinds share on the way from an observation to a decision; none of it knows a kind."""
