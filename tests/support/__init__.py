"""What the operator's tests share: makers of objects, an in-memory cluster, a stand-in for the kubelets."""
