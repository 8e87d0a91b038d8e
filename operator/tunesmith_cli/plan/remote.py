"""A model's sizes from where it lies: config.json and headers, read by the trainer's code in a process of its own.

`command` asks where `--online` is given. Nothing of a store is imported here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec

from pydantic import ValidationError

from tunesmith_api.memory.facts import ModelFacts
from tunesmith_api.memory.reading import SizesAnswer, SizesRequest
from tunesmith_api.plan import TrainingPlan
from tunesmith_cli.errors import Refused

__all__ = ["facts_online"]

READER = "tunesmith_trainer.models.sizes"
PATIENCE_SECONDS = 120


def facts_online(plan: TrainingPlan, uris: Mapping[str, str]) -> dict[str, ModelFacts]:
    """Read the sizes of models by the field of the spec that names each.

    Raises:
        Refused: one of them can't be read, or the trainer isn't installed here.
    """
    for field, uri in uris.items():
        if uri.startswith("pvc://"):
            raise Refused(
                f"{field}: {uri} is in a cluster's volume: name a copy with --model, or its folder with --volume"
            )
    if find_spec("tunesmith_trainer") is None or find_spec("boto3") is None:
        raise Refused("--online needs the trainer: in Tunesmith's checkout, pip install '.[cli]'", code=1)
    request = SizesRequest(
        uris=dict(uris),
        revisions={plan.model_uri: plan.model_revision},
        storage=plan.storage,
        hub_endpoint_url=plan.hub_endpoint_url,
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", READER],
            input=request.to_json().encode(),
            capture_output=True,
            timeout=PATIENCE_SECONDS,
        )
        answer = SizesAnswer.from_json(done.stdout)
    except subprocess.TimeoutExpired:
        raise Refused(
            f"--online: no answer within {PATIENCE_SECONDS} s; is the store reachable from here?", code=1
        ) from None
    except ValidationError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Refused(f"--online: {last}", code=1) from None
    if answer.problem:
        raise Refused(answer.problem)
    return {field: model.facts for field, model in answer.models.items()}
