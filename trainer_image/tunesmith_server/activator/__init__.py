"""Holds requests of a deployment that is scaled to zero until a server answers. Runs from the operator's image."""
