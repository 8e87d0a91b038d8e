"""Unquantized and quantized model on the same held-out rows, both as served: what the quality gate judges by."""
