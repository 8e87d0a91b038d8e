"""The model to serve: `spec.source` of a ModelDeployment."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from tunesmith_api.model import DnsLabel, SpecModel, Uri, cel

__all__ = ["FineTuneJobRef", "Source"]


class FineTuneJobRef(SpecModel):
    """A FineTuneJob in the same namespace."""

    name: DnsLabel = Field(description="Name of the FineTuneJob. Its model is served once it has succeeded.")
    digest: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        max_length=64,
        description=(
            "Serve the result of this digest (the FineTuneJob's status.model.digest) and no later one; leave it out to "
            "follow each new success."
        ),
    )


class Source(SpecModel):
    """The model to serve: from a FineTuneJob, or any folder."""

    fine_tune_job_ref: FineTuneJobRef | None = Field(
        default=None,
        description="The FineTuneJob whose result is served. Its storage settings are used unless `storage` is given here.",
    )
    uri: Uri | None = Field(
        default=None,
        description=(
            "Folder with config.json, tokenizer files and safetensors weights: s3://bucket/key, pvc://claim/path, or "
            "hf://owner/name of a Hub model."
        ),
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="Commit, tag or branch of an hf:// model; leave it out for `main`.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("has(self.fineTuneJobRef) != has(self.uri)", "source takes either fineTuneJobRef or uri"),
                cel(
                    "!has(self.revision) || (has(self.uri) && self.uri.startsWith('hf://'))",
                    "source.revision is for hf:// models only",
                ),
                cel(
                    "!has(self.uri) || !self.uri.startsWith('hf://datasets/')",
                    "source.uri is a data set of the Hub; name a model: hf://owner/name",
                ),
            ]
        },
    )
