"""`make rollouts`: go through all scenarios on a local cluster; the last line is one JSON object."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from devcluster import Cluster, ClusterSpec
from images import Images
from images.alone import build_operator
from rollouts.scenarios import run_all
from testbed import Testbed


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, Cluster.start(ClusterSpec(name="rollouts", nodes=2)) as cluster:
        operator = build_operator(say)
        # no pod here is of the trainer's image, which takes minutes to build
        bed = Testbed.install(cluster, say, images=Images(operator=operator, trainer=operator))
        results = run_all(bed, Path(folder), say)
    failed = [name for name, it in results.items() if it["outcome"] == "Failed" or it.get("failed_requests")]
    print(json.dumps(results), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
