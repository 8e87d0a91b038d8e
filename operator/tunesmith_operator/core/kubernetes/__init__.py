"""Built-in Kubernetes objects: their kinds, what the operator reads of them, and the manifests that it writes."""
