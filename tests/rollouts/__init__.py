"""Rollouts on real nodes under load: `make rollouts`, and tests/e2e/test_rollouts.py."""
