"""Builds the operator and trainer images without a registry or Docker, for the demo and the end-to-end tests.

The product's own Dockerfiles are built with buildah on a base made of Debian packages. Everything is kept in the cache by
content: an unchanged image costs a hash, a change of code one thin layer.
"""

from images.build import Image, Images, UnsupportedMachine, build_images

__all__ = ["Image", "Images", "UnsupportedMachine", "build_images"]
