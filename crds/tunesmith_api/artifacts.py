"""Manifests: the commit records of object storage. Files go up first; the manifest, written last, makes them exist.

`tunesmith_trainer` writes checkpoints and models, `tunesmith_server` reads models and writes quantized ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from tunesmith_api.model import Contract, Metrics, digest_of

__all__ = [
    "ArtifactRef",
    "CalibrationFacts",
    "CheckpointManifest",
    "DataCursor",
    "FileEntry",
    "ModelManifest",
    "ModelShape",
    "RunLease",
    "files_digest",
]


class FileEntry(Contract):
    """One file below the manifest's folder."""

    path: str
    size: int
    sha256: str


class DataCursor(Contract):
    """Where in the data training stands: `step_in_epoch` global batches of epoch `epoch` are done."""

    epoch: int
    step_in_epoch: int
    examples_seen: int


class CheckpointManifest(Contract):
    """`<checkpoint uri>/step-00000025/manifest.json`. Without it the checkpoint does not exist."""

    schema_version: Literal[2] = 2
    step: int
    max_steps: int
    plan_digest: str
    cursor: DataCursor
    seed: int = Field(
        description="Random numbers of a step are a pure function of (seed, step, rank): no generator state is kept."
    )
    world_size: int
    attempt: int = 1
    created_time: str
    metric: float | None = Field(
        default=None, description="The held-out metric at this step; none where it was not evaluated or not finite."
    )
    files: tuple[FileEntry, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)


class RunLease(Contract):
    """`<folder>/tunesmith-lease.json`: the run that writes into a folder. It renews the lease while it lives."""

    schema_version: Literal[1] = 1
    run_digest: str = Field(description="Of the plan and what it reads: what lies there without a manifest is its own.")
    uid: str = Field(description="Of the FineTuneJob, the same in all its pods; of a local run, that of its process.")
    name: str
    namespace: str
    host: str = Field(description="The machine's boot and the process namespace in which `pid` counts.")
    pid: int = Field(description="Of the process that renews it.")
    renewals: int = 0
    released: bool = Field(
        default=False, description="Whether the run has ended; what it began to write still lies there."
    )


class ModelShape(Contract):
    """What the memory of a served language model follows from, besides the size of its weights."""

    kv_bytes_per_token: int = Field(description="Keys and values of all layers for one token of context, 16 bits each.")
    heads: int = Field(description="Query heads of a layer.")
    width: int = Field(description="Numbers in an embedding.")
    feed_forward: int = Field(description="Numbers between the two halves of a feed-forward layer.")
    vocabulary: int = Field(description="Tokens that there are.")


class CalibrationFacts(Contract):
    """What an artefact's importance matrix was computed from, and what it is."""

    rows: int
    tokens: int = Field(description="Of those rows.")
    rows_digest: str = Field(description="sha256 of the rows.")
    matrix_digest: str = Field(description="sha256 of the matrix: names and numbers.")
    tensors: int = Field(description="Tensors that were rounded by it.")


class ModelManifest(Contract):
    """`<model uri>/tunesmith-manifest.json`: a finished model or quantized artefact."""

    schema_version: Literal[1] = 1
    digest: str
    base_uri: str
    base_digest: str = ""
    base_state: str = Field(
        default="", description="What an artefact's folder is named by: its source's digest, or that of its listing."
    )
    plan_digest: str = ""
    output_form: str = Field(default="", description="A trained model's: the output.save and dtype that it is in.")
    rehearsed: str | None = Field(
        default=None, description="A trained model's: the number format that quantization-aware training rehearsed."
    )
    reads_images: bool | None = Field(default=None, description="A trained model's: whether it reads images.")
    quantization: str = "None"
    bits_per_weight: float | None = Field(default=None, description="Bits of an artefact's files / weights in them.")
    tensor_types: dict[str, int] = Field(default_factory=dict, description="Number format → tensors written in it.")
    fallbacks: dict[str, int] = Field(
        default_factory=dict, description='"Q4_K → Q5_0": tensors whose width the first format can\'t hold.'
    )
    variant: str = Field(
        default="", description="What an artefact's folder is named by besides: calibration rows and ignored modules."
    )
    calibration: CalibrationFacts | None = Field(default=None, description="None: no importance matrix was used.")
    ignored: tuple[str, ...] = Field(default=(), description="Modules that were left as they are.")
    tools: dict[str, str] = Field(default_factory=dict, description="What made an artefact → its version.")
    shape: ModelShape | None = Field(default=None, description="Of an artefact that llama.cpp serves.")
    created_time: str
    metrics: Metrics = Field(default_factory=dict)
    files: tuple[FileEntry, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)


class ArtifactRef(Contract):
    """`<artifacts uri>/revisions/<uid>/<revision>.json`: the artefact that a revision's servers load, for good."""

    schema_version: Literal[1] = 1
    uri: str
    digest: str


def files_digest(files: Iterable[FileEntry]) -> str:
    """Return the sha256 over names and digests of the files, independent of their order."""
    return digest_of(sorted((entry.path, entry.sha256) for entry in files))
