"""`python -m demo` runs it, `python -m demo down` removes what it left."""

from __future__ import annotations

import json
import sys

from demo.machine import shortcomings
from demo.run import CLUSTER, run_demo
from devcluster import ClusterFailed, UnsupportedMachine, reaper
from images import UnsupportedMachine as ImagesUnsupported


def main() -> int:
    """Run one of the two commands; return the exit status."""
    if sys.argv[1:] == ["down"]:
        existed = reaper.remove_cluster(CLUSTER)
        print("The demo's cluster is gone." if existed else "There is no demo cluster; `make demo` makes one.")
        return 0
    if missing := shortcomings():
        print("This machine can't run the demo:", *(f"  * {line}" for line in missing), sep="\n", file=sys.stderr)
        return 3
    try:
        result = run_demo()
    except (UnsupportedMachine, ImagesUnsupported) as reason:
        print(f"This machine can't run the demo: {reason}", file=sys.stderr)
        return 3
    except (ClusterFailed, TimeoutError, RuntimeError) as error:
        print(
            f"\nThe demo failed: {error}\nThe cluster is left as it is for a look; `make demo-down` removes it.",
            file=sys.stderr,
        )
        return 1
    print(json.dumps(result), flush=True)
    return 0 if result["demo"] == "ok" else 1


if __name__ == "__main__":
    raise SystemExit(main())
