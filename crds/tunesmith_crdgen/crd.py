"""Builds the CustomResourceDefinition of each kind: names, printer columns, subresources, schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment
from tunesmith_crdgen.schema import structural_schema

__all__ = ["KINDS", "KindInfo", "custom_resource_definition"]


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`; priority 1 is shown with `-o wide` only."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0
    description: str = ""


@dataclass(frozen=True)
class KindInfo:
    """What a CRD says beside its schema."""

    model: type[BaseModel]
    kind: str
    plural: str
    short_name: str
    columns: tuple[Column, ...]
    scale: bool = False

    @property
    def crd_name(self) -> str:
        """Name of the CustomResourceDefinition."""
        return f"{self.plural}.{keys.GROUP}"

    @property
    def file_name(self) -> str:
        """Name of the YAML file in crds/."""
        return f"{keys.GROUP}_{self.plural}.yaml"


def _reason_column(condition: str) -> Column:
    return Column(
        "Reason",
        f'.status.conditions[?(@.type=="{condition}")].reason',
        priority=1,
        description=f"Why {condition} is what it is",
    )


AGE = Column("Age", ".metadata.creationTimestamp", type="date")

KINDS: tuple[KindInfo, ...] = (
    KindInfo(
        model=FineTuneJob,
        kind=keys.FINETUNEJOB_KIND,
        plural=keys.FINETUNEJOB_PLURAL,
        short_name="ftj",
        columns=(
            Column("Phase", ".status.phase"),
            Column("Progress", ".status.display.progress"),
            Column("Step", ".status.display.step"),
            Column("Loss", ".status.display.loss"),
            Column("ETA", ".status.display.eta"),
            Column("Workers", ".status.display.workers", description="Ready / desired"),
            Column("Restarts", ".status.restarts", type="integer"),
            _reason_column(keys.JobCondition.SUCCEEDED),
            Column(
                "Checkpoint",
                ".status.checkpoint.step",
                type="integer",
                priority=1,
                description="Newest complete checkpoint",
            ),
            Column("Model", ".status.model.uri", priority=1),
            AGE,
        ),
    ),
    KindInfo(
        model=ModelDeployment,
        kind=keys.MODELDEPLOYMENT_KIND,
        plural=keys.MODELDEPLOYMENT_PLURAL,
        short_name="mdep",
        columns=(
            Column("Ready", ".status.display.ready", description="Replicas ready / desired"),
            Column("Phase", ".status.phase"),
            Column("Revision", ".status.currentRevision"),
            Column("Quantization", ".status.display.quantization"),
            Column("URL", ".status.url"),
            _reason_column(keys.DeploymentCondition.READY),
            Column("Latest", ".status.latestRevision", priority=1),
            Column(
                "Quality",
                f'.status.conditions[?(@.type=="{keys.DeploymentCondition.QUALITY_HELD}")].reason',
                priority=1,
                description="What the gate says about the latest revision",
            ),
            AGE,
        ),
        scale=True,
    ),
)


def custom_resource_definition(info: KindInfo) -> dict[str, Any]:
    """Return the CRD of a kind as plain data, ready to be written as YAML."""
    subresources: dict[str, Any] = {"status": {}}
    if info.scale:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": info.crd_name},
        "spec": {
            "group": keys.GROUP,
            "names": {
                "kind": info.kind,
                "listKind": f"{info.kind}List",
                "plural": info.plural,
                "singular": info.kind.lower(),
                "shortNames": [info.short_name],
                "categories": ["tunesmith"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": keys.VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [_column(column) for column in info.columns],
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": structural_schema(info.model)},
                }
            ],
        },
    }


def _column(column: Column) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": column.name, "type": column.type, "jsonPath": column.path}
    if column.priority:
        entry["priority"] = column.priority
    if column.description:
        entry["description"] = column.description
    return entry
