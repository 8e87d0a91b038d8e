"""Makes the pictures of docs/ from real runs. `make docs` runs `python -m docsbuild`."""
