"""Quantizes a model and serves it: the quantize Job and the server pods of a ModelDeployment."""
