"""Statuses of custom resources: conditions, and what has changed from one status to the next."""
