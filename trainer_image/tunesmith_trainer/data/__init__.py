"""Data: rows of any source → checked, cleaned, split, changed → encoded examples on disk, cached in object storage.

`assembly` calls `prepare`; `preflight` looks at the first rows of each source. A row is what a file holds, an example
is what a model is given.
"""

from __future__ import annotations

from tunesmith_trainer.data.examples import ExampleSet
from tunesmith_trainer.data.splits import Prepared, prepare
from tunesmith_trainer.data.statistics import DataStatistics, SetStatistics
from tunesmith_trainer.data.streaming import StreamingOrder

__all__ = ["DataStatistics", "ExampleSet", "Prepared", "SetStatistics", "StreamingOrder", "prepare"]
