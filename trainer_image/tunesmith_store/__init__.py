"""Object storage for pods: one small protocol, S3 behind it, errors that tell users what to do, digests of files.

Used by `tunesmith_trainer` and `tunesmith_server`, which know nothing of each other.
"""
