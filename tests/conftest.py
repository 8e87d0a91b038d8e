"""Fixtures for all floors: a real S3 server, a real control plane, real nodes. Each starts on first use."""

pytest_plugins = ["objectstore.pytest_plugin", "devcluster.pytest_plugin", "testbed.pytest_plugin"]
