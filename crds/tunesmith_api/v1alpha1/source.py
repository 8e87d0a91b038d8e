"""The model to serve: `spec.source` of a ModelDeployment."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from tunesmith_api.model import DnsLabel, S3Uri, SpecModel, cel

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
    uri: S3Uri | None = Field(
        default=None, description="Folder with config.json, tokenizer files and safetensors weights."
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel("has(self.fineTuneJobRef) != has(self.uri)", "source takes either fineTuneJobRef or uri")
            ]
        },
    )
