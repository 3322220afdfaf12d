"""``manifest.json``: what an artifact is, what it is made of, and how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

import edgedistill
from edgedistill.cache import StepRecord
from edgedistill.chat import Chat
from edgedistill.choice_results import Router
from edgedistill.floor import Floor, SliceSpec
from edgedistill.pipeline import Step
from edgedistill.recipe import Recipe
from edgedistill.results import (
    ArtifactReport,
    Bench,
    BudgetCheck,
    Document,
    FieldQuality,
    FloorCheck,
    GoldenVector,
    LoweredClause,
    SliceQuality,
    Verdict,
    Verification,
)
from edgedistill.tasks import ARTIFACT

MANIFEST_FILE = "manifest.json"


class ManifestFile(Document):
    """One file of the artifact, by its path in it."""

    path: str
    size_bytes: int
    sha256: str


class LineageStep(Document):
    """One step that led here.

    Attributes:
        key: of the step, which stands for everything below and for the keys of its inputs.
        fields: its configuration; an input file stands as the hash of its contents.
        code: the version of the code that ran.
    """

    label: str
    task: str
    key: str
    fields: dict[str, Any]
    code: str
    inputs: dict[str, str]


class Quality(Document):
    """What the evaluation found, without the single cases."""

    verdict: Verdict
    runtime: str
    cases: int
    cases_in_suite: int
    slices: list[SliceQuality]
    floor: list[FloorCheck]
    fields: tuple[FieldQuality, ...] = ()
    stopped_early: bool = False


class Manifest(Document):
    """The contents of ``manifest.json``; it names no time and no place, so equal means equal.

    Attributes:
        kv_cache_bits: in which keys and values were cached wherever it was measured; None where the
            runtime has no choice.
        golden: what the artifact says, so that a device can prove that it runs this one.
        router: the confidence from which the app may trust the artifact.
        floor: that it was held to, on all cases; ``slices`` the capability spec.
        floor_lowered: clauses that earlier releases were held to more strictly.
    """

    schema_version: Literal[1] = 1
    recipe: str
    rung: str
    format: str
    runtime: str
    edgedistill: str
    license: str | None
    student: str
    context_tokens: int
    kv_cache_bits: int | None = None
    chat: Chat
    parameters: int
    size_bytes: int
    weight_bytes: int
    bits_per_weight: float
    shippable: bool
    why_not: str | None
    files: list[ManifestFile]
    lineage: list[LineageStep]
    libraries: dict[str, str]
    verification: Verification | None
    quality: Quality | None
    budget: list[BudgetCheck]
    bench: Bench | None
    golden: tuple[GoldenVector, ...] = ()
    router: Router | None = None
    floor: Floor | None = None
    slices: dict[str, SliceSpec] = Field(default={})
    floor_lowered: list[LoweredClause] = Field(default=[])


def artifact_files(record: StepRecord) -> list[ManifestFile]:
    """The files that ship, of what an export step wrote."""
    prefix = f"{ARTIFACT}/"
    return [
        ManifestFile(path=f.path.removeprefix(prefix), size_bytes=f.size_bytes, sha256=f.sha256)
        for f in record.files
        if f.path.startswith(prefix)
    ]


def make_manifest(
    recipe: Recipe,
    student: str,
    report: ArtifactReport,
    export: Step,
    record: StepRecord,
    *,
    lowered: Sequence[LoweredClause] = (),
) -> Manifest:
    """The manifest of an artifact.

    Args:
        recipe: that built it.
        student: its name as people know it.
        report: its figures and verdict.
        export: the step that wrote it, with its lineage; ``record`` is what it left.
        lowered: clauses that earlier releases were held to more strictly.
    """
    lineage = export.lineage()
    return Manifest(
        recipe=recipe.name,
        rung=report.rung,
        format=report.format,
        runtime=report.runtime,
        edgedistill=edgedistill.__version__,
        license=recipe.license,
        student=student,
        context_tokens=recipe.context_tokens,
        kv_cache_bits=report.kv_cache_bits,
        chat=recipe.chat,
        parameters=report.parameters,
        size_bytes=report.size_bytes,
        weight_bytes=report.weight_bytes,
        bits_per_weight=report.bits_per_weight,
        shippable=report.shippable,
        why_not=report.why_not,
        files=artifact_files(record),
        lineage=[_lineage_step(step) for step in lineage],
        libraries={n: v for step in lineage for n, v in step.code.libraries.items()},
        verification=_without_golden(report.verification),
        quality=_quality(report),
        budget=report.budget,
        bench=report.bench,
        golden=tuple(report.verification.golden) if report.verification else (),
        router=report.evaluation.router if report.evaluation else None,
        floor=recipe.floor,
        slices=recipe.slices,
        floor_lowered=list(lowered),
    )


def _without_golden(verification: Verification | None) -> Verification | None:
    """The manifest has a place of its own for golden vectors."""
    return verification.model_copy(update={"golden": []}) if verification else None


def _quality(report: ArtifactReport) -> Quality | None:
    if report.evaluation is None:
        return None
    single = {"flips", "seconds", "reliability", "classes", "router", "against"}
    return Quality.model_validate(report.evaluation.model_dump(exclude=single))


def _lineage_step(step: Step) -> LineageStep:
    return LineageStep(
        label=step.label,
        task=type(step.task).__name__,
        key=step.key,
        fields=step.fields,
        code=step.code.sha256,
        inputs={name: source.key for name, source in step.inputs.items()},
    )
