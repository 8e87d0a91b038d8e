"""The operator's hands: Kubernetes, HTTP and metrics. Everything that can fail for reasons of the world."""
