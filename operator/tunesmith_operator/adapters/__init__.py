"""Kubernetes, HTTP and metrics: everything that can fail for reasons outside this process."""
