"""Derives the CRD YAML, its chart copies and the field reference from `tunesmith_api`.

A development tool (`make generate`, `make verify`); never installed with the product.
"""
