"""What Kueue is asked, and what becomes of a cluster that has none."""

import pytest

from tunesmith_operator.adapters.errors import Gone, Rejected, Transient
from tunesmith_operator.adapters.kueue import KueueWorkloads

WORKLOAD = {
    "metadata": {"name": "job-a"},
    "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "no quota"}]},
}


class Cluster:
    """Answers by API version."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    async def labelled(self, resource, namespace, labels):
        self.asked.append((resource.api_version, resource.plural, namespace, labels))
        answer = self.answers[resource.version]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"v1beta2": [WORKLOAD]}, "no quota"),
        ({"v1beta2": []}, None),
        ({"v1beta2": Gone("404"), "v1beta1": [WORKLOAD]}, "no quota"),
        ({"v1beta2": Gone("404"), "v1beta1": Gone("404")}, None),
        ({"v1beta2": Rejected("forbidden")}, None),
        ({"v1beta2": Transient("away")}, None),
    ],
)
async def test_the_jobs_workload_is_asked_for_in_the_newest_version_that_there_is(answers, words):
    cluster = Cluster(**answers)
    assert await KueueWorkloads(cluster).words("ml", "u1") == words
    assert cluster.asked[0] == ("kueue.x-k8s.io/v1beta2", "workloads", "ml", "kueue.x-k8s.io/job-uid=u1")
    assert len(cluster.asked) == len(answers)
