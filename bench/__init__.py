"""What Tunesmith costs, measured beside a peer or a limit in the same run. `python -m bench` runs all of it."""
