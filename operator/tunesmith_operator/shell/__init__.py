"""Kopf's watches, indexes, login, probes and signals. Nothing is decided here."""
