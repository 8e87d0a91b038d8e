"""A platform as users have it: a cluster, an S3 store that pods reach, the operator installed by Helm.

Used by the end-to-end tests (`testbed.pytest_plugin`) and by `make demo`.
"""

from testbed.bed import SECRET_NAME, STORE_ENDPOINT, Testbed
from testbed.chat import chat

__all__ = ["SECRET_NAME", "STORE_ENDPOINT", "Testbed", "chat"]
