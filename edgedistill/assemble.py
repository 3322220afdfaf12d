"""Gather what the steps left in the cache into the build's report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgedistill.cache import StepRecord
from edgedistill.errors import EdgedistillError, ExitCode
from edgedistill.evaluate.waivers import apply_waivers, read_waivers, utc_today
from edgedistill.evaluation_tasks import TRAFFIC_FILE
from edgedistill.manifest import artifact_files
from edgedistill.pipeline import Pipeline, Step
from edgedistill.plan import ArtifactSteps, BuildSteps
from edgedistill.recipe import Recipe
from edgedistill.results import (
    ArtifactReport,
    Bench,
    Document,
    Evaluation,
    Judgement,
    SliceQuality,
    Verification,
)
from edgedistill.rung_results import RungReport, read_rung
from edgedistill.tasks import (
    BENCH_FILE,
    EVALUATION_FILE,
    VERIFICATION_FILE,
    WEIGHTS_FILE,
    RunStage,
    Weights,
)
from edgedistill.traffic_results import TrafficFindings
from edgedistill.verdict import (
    Ruling,
    check_budget,
    combine_quality,
    judge_targets,
    rule,
    worst,
)

Result = TypeVar("Result", bound=Document)


@dataclass(frozen=True)
class BuiltArtifact:
    """An artifact in the cache, and what is said of it."""

    steps: ArtifactSteps
    files: Path
    record: StepRecord
    report: ArtifactReport


@dataclass(frozen=True)
class Assembled:
    """All artifacts that were built, the rung to ship for each target, and the exit code."""

    artifacts: list[BuiltArtifact]
    judgements: list[Judgement]
    reference: SliceQuality | None
    rungs: list[RungReport]
    exit_code: ExitCode


def assemble(recipe: Recipe, steps: BuildSteps, pipeline: Pipeline) -> Assembled:
    """Read every result, pass the gates, judge the targets."""
    rulings: dict[tuple[str, str, str], Ruling] = {}
    artifacts = []
    for artifact in steps.artifacts:
        record = pipeline.outcome(artifact.export).record
        if record is not None:
            artifacts.append(_Gatherer(recipe, steps, pipeline, rulings).gather(artifact, record))
    judgements, codes = judge_targets(recipe, [a.report for a in artifacts], rulings)
    failed = (pipeline.outcome(step).error for step in steps.ordered())
    codes += [error.exit_code for error in failed if error is not None]
    quality = _read(pipeline, steps.reference_quality, EVALUATION_FILE, Evaluation)
    overall = quality.overall if quality else None
    return Assembled(artifacts, judgements, overall, _rungs(steps, pipeline), worst(codes))


def _rungs(steps: BuildSteps, pipeline: Pipeline) -> list[RungReport]:
    """What the stages of each rung wrote down, those that all rungs share among them."""
    students = {artifact.rung: artifact.student for artifact in steps.artifacts}
    found = []
    for rung, student in students.items():
        stages = (step for step in student.lineage() if isinstance(step.task, RunStage))
        written = [path for step in stages if (path := pipeline.output(step))]
        found.append(read_rung(rung, written))
    return [rung for rung in found if rung.says_something]


class _Gatherer:
    """One artifact's results; its rulings by target go into ``rulings``."""

    def __init__(
        self,
        recipe: Recipe,
        steps: BuildSteps,
        pipeline: Pipeline,
        rulings: dict[tuple[str, str, str], Ruling],
    ) -> None:
        self._waivers = read_waivers(recipe.waivers)
        self._recipe = recipe
        self._steps = steps
        self._pipeline = pipeline
        self._rulings = rulings

    def gather(self, steps: ArtifactSteps, record: StepRecord) -> BuiltArtifact:
        out = self._pipeline.output(steps.export)
        assert out is not None  # it has a record
        weights = Weights.model_validate_json((out / WEIGHTS_FILE).read_bytes())
        bench = _read(self._pipeline, steps.bench, BENCH_FILE, Bench)
        size_bytes = sum(f.size_bytes for f in artifact_files(record))
        report = ArtifactReport(
            rung=steps.rung,
            format=steps.format,
            runtime=steps.runtime,
            kv_cache_bits=steps.kv_cache_bits,
            path=f"{self._recipe.name}/{steps.rung}/{steps.format}",
            size_bytes=size_bytes,
            lineage=[step.label for step in steps.export.lineage()],
            weight_bytes=weights.weight_bytes,
            parameters=weights.parameters,
            bits_per_weight=8 * weights.weight_bytes / weights.parameters,
            verification=_read(self._pipeline, steps.verify, VERIFICATION_FILE, Verification),
            evaluation=self._evaluation(steps),
            bench=bench,
            traffic=_read(self._pipeline, steps.traffic, TRAFFIC_FILE, TrafficFindings),
            budget=[],
            shippable=False,
            why_not=None,
        )
        return BuiltArtifact(steps, out / "artifact", record, self._ruled(steps, report))

    def _evaluation(self, steps: ArtifactSteps) -> Evaluation | None:
        own = self._waived(steps, _read(self._pipeline, steps.compare, EVALUATION_FILE, Evaluation))
        if steps.judges:
            return own
        judges = (a for a in self._steps.artifacts if a.rung == steps.rung and a.judges)
        judge = next(judges, None)
        if judge is None:
            return own
        found = _read(self._pipeline, judge.compare, EVALUATION_FILE, Evaluation)
        return combine_quality(own, self._waived(judge, found))

    def _waived(self, steps: ArtifactSteps, found: Evaluation | None) -> Evaluation | None:
        """With the losses that somebody consented to; they expire, so the cache knows none."""
        if found is None:
            return None
        recipe = self._recipe
        meant = [w for w in self._waivers if w.is_for(recipe.name, steps.rung, steps.format)]
        return apply_waivers(found, meant, floor=recipe.floor, today=utc_today())

    def _ruled(self, steps: ArtifactSteps, report: ArtifactReport) -> ArtifactReport:
        """The report with budget and verdict: shippable when it ships for any target."""
        floor = self._recipe.floor
        rulings, budget = [], []
        for name, target in self._recipe.all_targets().items():
            wanted = target.rungs is None or steps.rung in target.rungs
            if target.format != steps.format or not wanted:
                continue
            checks = check_budget(name, target.budget, report.size_bytes, report.bench)
            ruling = rule(
                report.verification,
                report.evaluation,
                checks,
                underpowered_passes=floor is not None and floor.when_underpowered == "pass",
                errors=self._errors(steps),
            )
            self._rulings[name, steps.rung, steps.format] = ruling
            rulings.append(ruling)
            budget += checks
        ships = any(r.ships for r in rulings)
        why_not = None if ships else rulings[0].why_not
        update = {"budget": budget, "shippable": ships, "why_not": why_not}
        return report.model_copy(update=update)

    def _errors(self, steps: ArtifactSteps) -> dict[str, EdgedistillError]:
        named = {"verification": steps.verify, "evaluation": steps.compare}
        outcomes = {n: self._pipeline.outcome(step) for n, step in named.items() if step}
        return {name: o.error for name, o in outcomes.items() if o.error is not None}


def _read(pipeline: Pipeline, step: Step | None, name: str, kind: type[Result]) -> Result | None:
    """The result document of a step; None when there is no such step or it failed."""
    output = pipeline.output(step) if step else None
    return kind.model_validate_json((output / name).read_bytes()) if output else None
