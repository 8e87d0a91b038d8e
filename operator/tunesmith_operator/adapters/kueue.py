"""Asks Kueue why a Job waits. The poller does, while one waits in a queue: ever less often, down to twice a minute."""

from __future__ import annotations

import logging

from tunesmith_api.keys import LABEL_WORKLOAD_JOB
from tunesmith_operator.adapters.errors import ClusterError, Gone
from tunesmith_operator.adapters.kube import KubernetesCluster
from tunesmith_operator.core.kubernetes.kueue import WORKLOADS, admission_words

__all__ = ["KueueWorkloads"]

log = logging.getLogger(__name__)


class KueueWorkloads:
    """The Workloads of one cluster, where it has any."""

    def __init__(self, cluster: KubernetesCluster) -> None:
        self._cluster = cluster

    async def words(self, namespace: str, job_uid: str) -> str | None:
        """Why the Job isn't admitted; None where Kueue isn't there, may not be asked, or hasn't said."""
        for resource in WORKLOADS:
            try:
                found = await self._cluster.labelled(resource, namespace, f"{LABEL_WORKLOAD_JOB}={job_uid}")
            except Gone:
                continue
            except ClusterError as error:
                log.debug("can't ask Kueue: %s", error)
                return None
            return admission_words(found) or None
        return None
