"""What the operator costs a control plane, beside the operators people use today. `python -m bench.controlplane` runs it."""
