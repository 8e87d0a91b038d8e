"""Checkpoints: every rank saves its own part beside training, and a manifest, written last, makes them exist.

`loop.checkpoints` talks to `Checkpointer` alone. Below it: `state` and `optimizer_state` (what is remembered), `shards`
(who saves which piece, and how pieces fit another number of ranks), `snapshot` and `restore` (one rank's side),
`storage` (what is in object storage), `capacity` (disk and memory). Nothing in a checkpoint is pickled, nothing depends
on the number of ranks.
"""

from tunesmith_trainer.checkpoint.checkpointer import Checkpointer
from tunesmith_trainer.checkpoint.state import RunState

__all__ = ["Checkpointer", "RunState"]
