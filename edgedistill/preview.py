"""``edgedistill plan``: which steps would run, and about what they would cost; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgedistill.build import Options, Prepared, prepare
from edgedistill.cache import Cache, StepRecord
from edgedistill.errors import InputError
from edgedistill.estimate import (
    artifact_bytes,
    judge_peak_bytes,
    runtime_peak_bytes,
    scoring_seconds,
    tensor_peak_bytes,
)
from edgedistill.pipeline import Step
from edgedistill.recipe import Recipe
from edgedistill.results import Document
from edgedistill.tasks import JudgeLogits, ReadTraffic, Score, ScoreReference


class PlannedStep(Document):
    """One step; ``seconds`` and ``peak_rss_bytes`` are measured if cached, else estimates.

    ``seconds`` is None where no estimate is tried.
    """

    label: str
    key: str
    cached: bool
    seconds: float | None
    peak_rss_bytes: int


class PlannedArtifact(Document):
    """One rung in one format: bytes of its weights by arithmetic, cases that it is judged on."""

    rung: str
    format: str
    weight_bytes: int
    cases: int
    seconds: float


class PlanReport(Document):
    """What ``edgedistill plan`` prints."""

    recipe: str
    parameters: int
    context_tokens: int
    steps: list[PlannedStep]
    artifacts: list[PlannedArtifact]
    cases_in_suite: int
    scoring_seconds: float
    peak_rss_bytes: int
    peak_ram_gb_allowed: float | None

    @property
    def to_run(self) -> int:
        """Number of steps that the cache lacks."""
        return sum(not step.cached for step in self.steps)


def preview(options: Options) -> PlanReport:
    """Plan a build and say what is cached.

    Raises:
        EdgedistillError: as :func:`edgedistill.build.prepare`.
    """
    prepared = prepare(options)
    cache = Cache(options.cache)
    recipe, facts = prepared.recipe, prepared.facts
    cases = count_cases(recipe.suite)
    artifacts = [
        PlannedArtifact(
            rung=a.rung,
            format=a.format,
            weight_bytes=_weight_bytes(prepared, a.rung, a.format),
            cases=min(cases, a.sample or cases),
            seconds=scoring_seconds(facts, min(cases, a.sample or cases), a.format),
        )
        for a in prepared.steps.artifacts
    ]
    estimate = _Estimate(prepared, artifacts, cases)
    steps = [
        _planned(step, None if step.fresh else cache.find(step.key), estimate)
        for step in prepared.steps.ordered()
    ]
    return PlanReport(
        recipe=recipe.name,
        parameters=facts.parameters,
        context_tokens=recipe.context_tokens,
        steps=steps,
        artifacts=artifacts,
        cases_in_suite=cases,
        scoring_seconds=sum(a.seconds for a in artifacts) + scoring_seconds(facts, cases, None),
        peak_rss_bytes=max(step.peak_rss_bytes for step in steps),
        peak_ram_gb_allowed=recipe.build.peak_ram_gb,
    )


def describe(plan: PlanReport) -> Iterator[str]:
    """The plan as lines of text."""
    yield f"{plan.recipe}: {plan.parameters / 1e6:.1f}M parameters, {plan.context_tokens} tokens"
    for step in plan.steps:
        about = "" if step.cached else "~"
        seconds = "" if step.seconds is None else f"{about}{step.seconds:.0f} s"
        peak = f"{about}{step.peak_rss_bytes / 1e9:.1f} GB"
        state = "cached" if step.cached else "to run"
        yield f"  {state}  {step.label:<40} {seconds:>8} {peak:>8}"
    yield f"{plan.to_run} of {len(plan.steps)} steps to run"
    yield ""
    for a in plan.artifacts:
        size_mb = a.weight_bytes / 1e6
        yield (
            f"  {a.rung}/{a.format}: ~{size_mb:.1f} MB of weights; "
            f"evaluation: {a.cases} cases, ~{a.seconds:.0f} s"
        )
    total_mb = sum(a.weight_bytes for a in plan.artifacts) / 1e6
    yield f"artifacts: ~{total_mb:.0f} MB, and as much again in the cache"
    if plan.cases_in_suite:
        yield f"evaluation from an empty cache: ~{plan.scoring_seconds / 60:.0f} min"
    peak_gb = plan.peak_rss_bytes / 1e9
    yield f"peak memory: ~{peak_gb:.1f} GB"
    if plan.peak_ram_gb_allowed is not None and peak_gb > plan.peak_ram_gb_allowed:
        yield f"warning: the recipe allows {plan.peak_ram_gb_allowed:g} GB"


def count_cases(suite: tuple[Path, ...]) -> int:
    """Lines of a suite that are not empty."""
    count = 0
    for path in suite:
        try:
            with path.open("rb") as file:
                count += sum(1 for line in file if line.strip())
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return count


def _weight_bytes(prepared: Prepared, rung: str, format_name: str) -> int:
    recipe: Recipe = prepared.recipe
    stages = [*recipe.stages, *recipe.rungs[rung]]
    return artifact_bytes(prepared.facts, stages, format_name)


class _Estimate:
    """Seconds and peak bytes of a step that the cache lacks."""

    def __init__(self, prepared: Prepared, artifacts: list[PlannedArtifact], cases: int) -> None:
        self._facts = prepared.facts
        self._cases = cases
        self._artifacts = {f"{a.rung}/{a.format}": a for a in artifacts}

    def of(self, step: Step) -> tuple[float | None, int]:
        artifact = self._artifacts.get(step.label.partition(":")[0])
        seconds = None
        if isinstance(step.task, ScoreReference):
            seconds = scoring_seconds(self._facts, self._cases, None)
        elif artifact and isinstance(step.task, Score):
            seconds = artifact.seconds
        if isinstance(step.task, ScoreReference | JudgeLogits | ReadTraffic):
            return seconds, judge_peak_bytes(self._facts)
        if artifact and "artifact" in step.inputs:
            return seconds, runtime_peak_bytes(artifact.weight_bytes)
        return seconds, tensor_peak_bytes(self._facts)


def _planned(step: Step, record: StepRecord | None, estimate: _Estimate) -> PlannedStep:
    seconds, peak = (record.seconds, record.peak_rss_bytes) if record else estimate.of(step)
    return PlannedStep(
        label=step.label,
        key=step.key,
        cached=record is not None,
        seconds=seconds,
        peak_rss_bytes=peak,
    )
