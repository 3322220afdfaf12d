"""``edgedistill plan``: which steps would run, and about what they would cost; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from edgedistill.build import Options, Prepared, find_lowered, prepare
from edgedistill.cache import Cache, StepRecord
from edgedistill.cache_place import open_cache
from edgedistill.distilling_stage import DistillingStage
from edgedistill.errors import InputError
from edgedistill.estimate import (
    GPU_OPERATIONS_PER_SECOND,
    artifact_bytes,
    facts_of_rung,
    judge_peak_bytes,
    runtime_peak_bytes,
    scoring_seconds,
    stage_peak_bytes,
    stage_seconds,
    tensor_peak_bytes,
)
from edgedistill.evaluate.capabilities import SIGNIFICANCE
from edgedistill.evaluate.power import (
    PlannedClause,
    Spread,
    describe_clauses,
    measured_spreads,
    plan_clauses,
    reference_spreads,
)
from edgedistill.evaluate.sequential import FINAL_LEVEL
from edgedistill.evaluate.suite import load_suite
from edgedistill.evaluation_tasks import ReadTraffic, ScoreUntilDecided
from edgedistill.low_bits import low_bit_warnings
from edgedistill.pipeline import Step
from edgedistill.results import Document, Evaluation, LoweredClause
from edgedistill.tasks import EVALUATION_FILE, JudgeLogits, RunStage, Score, ScoreReference


class PlannedStep(Document):
    """One step; ``seconds`` and ``peak_own_bytes`` are measured if cached, else estimates.

    ``seconds`` is None where no estimate is tried; ``gpu_seconds`` is of steps that train, on a GPU
    of ``GPU_OPERATIONS_PER_SECOND``.
    """

    label: str
    key: str
    cached: bool
    seconds: float | None
    gpu_seconds: float | None = None
    peak_own_bytes: int


class PlannedArtifact(Document):
    """One rung in one format: bytes of its weights by arithmetic, cases that it is judged on.

    Attributes:
        parameters: of the rung; fewer than the student's where it is pruned.
        decode_speedup: of a pruned rung, how many times as fast as unpruned it generates at most,
            because so many times fewer bytes are read for a token; the build measures it.
    """

    rung: str
    format: str
    weight_bytes: int
    cases: int
    seconds: float
    parameters: int
    decode_speedup: float | None


class PlanReport(Document):
    """What ``edgedistill plan`` prints.

    Attributes:
        clauses: of the floor and the capability spec, and whether the suite can decide them.
        spread_from: what the widths of the intervals were taken from.
        floor_lowered: clauses that earlier releases among the exports were held to.
        warnings: of what the recipe may do and seldom should.
    """

    recipe: str
    parameters: int
    context_tokens: int
    steps: list[PlannedStep]
    artifacts: list[PlannedArtifact]
    cases_in_suite: int
    scoring_seconds: float
    peak_own_bytes: int
    peak_ram_gb_allowed: float | None
    clauses: list[PlannedClause] = Field(default=[])
    spread_from: str = ""
    floor_lowered: list[LoweredClause] = Field(default=[])
    warnings: list[str] = Field(default=[])

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
    cache = open_cache(options.cache)
    recipe, facts = prepared.recipe, prepared.facts
    cases = count_cases(recipe.suite)
    clauses, spread_from = _power(prepared, cache)
    artifacts = plan_artifacts(prepared, cases)
    steps = plan_steps(prepared, artifacts, cases, cache)
    return PlanReport(
        recipe=recipe.name,
        parameters=facts.parameters,
        context_tokens=recipe.context_tokens,
        steps=steps,
        artifacts=artifacts,
        cases_in_suite=cases,
        scoring_seconds=sum(a.seconds for a in artifacts) + scoring_seconds(facts, cases, None),
        peak_own_bytes=max(step.peak_own_bytes for step in steps),
        peak_ram_gb_allowed=recipe.build.peak_ram_gb,
        clauses=clauses,
        spread_from=spread_from,
        floor_lowered=find_lowered(recipe, options.exports),
        warnings=list(low_bit_warnings(recipe, facts)),
    )


def plan_artifacts(prepared: Prepared, cases: int) -> list[PlannedArtifact]:
    """Sizes and minutes of all artifacts, by arithmetic; ``cases`` is the number in the suite."""
    return [
        _artifact(prepared, a.rung, a.format, min(cases, a.sample or cases))
        for a in prepared.steps.artifacts
    ]


def plan_steps(
    prepared: Prepared, artifacts: list[PlannedArtifact], cases: int, cache: Cache
) -> list[PlannedStep]:
    """All steps, each with what it took if the cache has it, or else is expected to take."""
    estimate = _Estimate(prepared, artifacts, cases)
    return [
        _planned(step, None if step.fresh else cache.look_up(step.key), estimate)
        for step in prepared.steps.ordered()
    ]


def estimate_peaks(prepared: Prepared) -> dict[str, int]:
    """Key -> bytes of peak memory that each step is expected to take."""
    cases = count_cases(prepared.recipe.suite)
    estimate = _Estimate(prepared, plan_artifacts(prepared, cases), cases)
    return {step.key: estimate.of(step)[1] for step in prepared.steps.ordered()}


def describe(plan: PlanReport) -> Iterator[str]:
    """The plan as lines of text."""
    yield f"{plan.recipe}: {plan.parameters / 1e6:.1f}M parameters, {plan.context_tokens} tokens"
    for step in plan.steps:
        about = "" if step.cached else "~"
        seconds = "" if step.seconds is None else f"{about}{step.seconds:.0f} s"
        peak = f"{about}{step.peak_own_bytes / 1e9:.1f} GB"
        state = "cached" if step.cached else "to run"
        yield f"  {state}  {step.label:<40} {seconds:>8} {peak:>8}"
    for step in plan.steps:
        if step.gpu_seconds is not None and step.seconds is not None:
            yield (
                f"  {step.label} trains: ~{step.seconds / 3600:.1f} h on two cores, "
                f"~{step.gpu_seconds / 3600:.2f} h on a GPU that does "
                f"{GPU_OPERATIONS_PER_SECOND / 1e12:g} TFLOPS in float32 and holds "
                f"{step.peak_own_bytes / 1e9:.0f} GB"
            )
    yield f"{plan.to_run} of {len(plan.steps)} steps to run"
    yield ""
    for a in plan.artifacts:
        size_mb = a.weight_bytes / 1e6
        yield (
            f"  {a.rung}/{a.format}: ~{size_mb:.1f} MB of weights; "
            f"evaluation: {a.cases} cases, ~{a.seconds:.0f} s"
        )
        if a.decode_speedup is not None:
            yield (
                f"    {a.parameters / 1e6:.1f}M parameters are left; "
                f"decode up to {a.decode_speedup:.2f}x as fast as unpruned"
            )
    total_mb = sum(a.weight_bytes for a in plan.artifacts) / 1e6
    yield f"artifacts: ~{total_mb:.0f} MB, and as much again in the cache"
    if plan.cases_in_suite:
        yield f"evaluation from an empty cache: ~{plan.scoring_seconds / 60:.0f} min"
    yield from describe_clauses(plan.clauses, plan.spread_from)
    for clause in plan.floor_lowered:
        yield f"warning: the floor was lowered since an earlier release: {clause}"
    for warning in plan.warnings:
        yield f"warning: {warning}"
    peak_gb = plan.peak_own_bytes / 1e9
    yield f"peak memory: ~{peak_gb:.1f} GB"
    yield from _beyond_memory(plan)


def _beyond_memory(plan: PlanReport) -> Iterator[str]:
    """Steps that are likely to be stopped, once more than the recipe allows is held."""
    limit_gb = plan.peak_ram_gb_allowed
    for step in plan.steps:
        peak_gb = step.peak_own_bytes / 1e9
        if limit_gb is not None and not step.cached and peak_gb > limit_gb:
            about = f"warning: {step.label} needs ~{peak_gb:.2g} GB"
            yield f"{about}; the recipe allows {limit_gb:g} GB"


def _power(prepared: Prepared, cache: Cache) -> tuple[list[PlannedClause], str]:
    """What the suite can decide, and what that is based on."""
    recipe = prepared.recipe
    if not recipe.suite:
        return [], ""
    expect = recipe.evaluate.expect
    assumed = Spread(expect.flips, expect.log_score_sd, expect.reference_score)
    cases = load_suite(recipe.suite)
    reference = _evaluation(prepared.steps.reference_quality, cache)
    spreads = reference_spreads(assumed, reference.slices if reference else [])
    basis = f"if {expect.flips:.1%} of the answers flip"
    if not spreads:
        basis += f" and the reference is right in {expect.reference_score:.0%}"
    steadiest = _steadiest(prepared, cache)
    if steadiest is not None:
        name, evaluation = steadiest
        spreads = measured_spreads(evaluation, cases)
        basis = f"if answers flip as they did in {name}"
    level = FINAL_LEVEL if recipe.evaluate.stop_early else SIGNIFICANCE
    planned = plan_clauses(cases, recipe.floor, recipe.slices, spreads, assumed, level=level)
    return planned, basis


def _steadiest(prepared: Prepared, cache: Cache) -> tuple[str, Evaluation] | None:
    """The artifact that changes the fewest answers, of those that ran the whole suite before."""
    found = {}
    for artifact in prepared.steps.artifacts:
        evaluation = _evaluation(artifact.compare, cache)
        if evaluation is not None and evaluation.cases == evaluation.cases_in_suite:
            flips = evaluation.overall.broken_cases + evaluation.overall.fixed_cases
            found[flips] = f"{artifact.rung}/{artifact.format}", evaluation
    return found[min(found)] if found else None


def _evaluation(compare: Step | None, cache: Cache) -> Evaluation | None:
    """What a comparison found; None where there is none yet."""
    if compare is None or cache.find(compare.key) is None:
        return None
    return Evaluation.model_validate_json((cache.out(compare.key) / EVALUATION_FILE).read_bytes())


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


def _artifact(prepared: Prepared, rung: str, format_name: str, cases: int) -> PlannedArtifact:
    facts = prepared.facts
    stages = [*prepared.recipe.stages, *prepared.recipe.rungs[rung]]
    weight_bytes = artifact_bytes(facts, stages, format_name)
    unpruned = [step for step in stages if not step.config.prunes]
    speedup = None
    if len(unpruned) < len(stages):
        speedup = artifact_bytes(facts, unpruned, format_name) / weight_bytes
    return PlannedArtifact(
        rung=rung,
        format=format_name,
        weight_bytes=weight_bytes,
        cases=cases,
        seconds=scoring_seconds(facts, cases, format_name),
        parameters=facts_of_rung(facts, stages).parameters,
        decode_speedup=speedup,
    )


class _Estimate:
    """Seconds and peak bytes of a step that the cache lacks."""

    def __init__(self, prepared: Prepared, artifacts: list[PlannedArtifact], cases: int) -> None:
        self._facts = prepared.facts
        self._cases = cases
        self._artifacts = {f"{a.rung}/{a.format}": a for a in artifacts}

    def on_gpu(self, step: Step) -> float | None:
        """Seconds of a step that trains, elsewhere; None for all others."""
        stage = step.task.stage_config() if isinstance(step.task, RunStage) else None
        if not isinstance(stage, DistillingStage):
            return None
        cost = stage.cost(self._facts)
        return None if cost is None else stage_seconds(self._facts, cost, on_gpu=True)

    def of(self, step: Step) -> tuple[float | None, int]:
        if isinstance(step.task, RunStage):
            # Of the student as it came, from which pruning only takes away.
            cost = step.task.stage_config().cost(self._facts)
            if cost is not None:
                return stage_seconds(self._facts, cost), stage_peak_bytes(cost)
        artifact = self._artifacts.get(step.label.partition(":")[0])
        seconds = None
        if isinstance(step.task, ScoreReference):
            seconds = scoring_seconds(self._facts, self._cases, None)
        elif artifact and isinstance(step.task, Score | ScoreUntilDecided):
            seconds = artifact.seconds
        if isinstance(step.task, ScoreReference | JudgeLogits | ReadTraffic):
            return seconds, judge_peak_bytes(self._facts)
        if artifact and "artifact" in step.inputs:
            judges = sum(name.endswith("_judge") for name in step.inputs)
            peak = runtime_peak_bytes(
                self._facts, artifact.weight_bytes, artifact.format, judges=judges
            )
            return seconds, peak
        return seconds, tensor_peak_bytes(self._facts)


def _planned(step: Step, record: StepRecord | None, estimate: _Estimate) -> PlannedStep:
    seconds, peak = estimate.of(step)
    if record is not None:
        seconds, peak = record.seconds, record.peak_own_bytes or record.peak_rss_bytes
    gpu_seconds = None if record else estimate.on_gpu(step)
    return PlannedStep(
        label=step.label,
        key=step.key,
        cached=record is not None,
        seconds=seconds,
        gpu_seconds=gpu_seconds,
        peak_own_bytes=peak,
    )
