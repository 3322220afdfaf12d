"""Measure one candidate with the steps and the gates of a build."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgedistill.assemble import Assembled, assemble
from edgedistill.errors import EdgedistillError, ExitCode
from edgedistill.pipeline import Pipeline, Step
from edgedistill.plan import ArtifactSteps, BuildSteps
from edgedistill.recipe import Budget, Recipe
from edgedistill.results import ArtifactReport, StepReport, Verification
from edgedistill.search.candidates import Field, shared_keys
from edgedistill.tasks import VERIFICATION_FILE


@dataclass(frozen=True)
class Measured:
    """What came of a candidate.

    Attributes:
        passed: every gate that was measured.
        code: that a build of it would end with.
        reason: why it did not pass, or what a pass leaves open.
        artifacts: in the formats that were exported.
    """

    passed: bool
    code: ExitCode
    reason: str
    artifacts: tuple[ArtifactReport, ...]


class Measurer:
    """Runs candidates through one pipeline, which runs no step twice.

    Attributes:
        step_reports: candidate -> its own steps, as far as they were run or found.
    """

    def __init__(self, field: Field, pipeline: Pipeline) -> None:
        self.step_reports: dict[str, dict[str, StepReport]] = {}
        self._field = field
        self._recipe = field.prepared.recipe
        self._pipeline = pipeline
        self._shared = shared_keys(field.prepared.steps)
        self._judged: dict[tuple[str, ...], tuple[str, Measured]] = {}

    def run_reference(self) -> None:
        """Make and score the reference; without it there is nothing to compare with.

        Raises:
            EdgedistillError: it cannot be made or scored.
        """
        steps = self._field.prepared.steps
        end = steps.reference_quality or steps.reference
        self._pipeline.run([end])
        error = self._pipeline.outcome(end).error
        if error is not None:
            raise error

    def judge(self, name: str) -> Measured:
        """Export, verify and score a candidate in the format that judges; budgets are of files.

        What fails to verify is not scored, and what is byte for byte an artifact that was judged
        before is not judged again.
        """
        steps = replace(self._field.judging(name), bench=None, traffic=None)
        self._run(name, [steps.export])
        hashes = self._hashes(steps)
        if hashes in self._judged:
            twin, measured = self._judged[hashes]
            same = f"the same bytes as {twin}"
            return replace(measured, reason=": ".join(r for r in (same, measured.reason) if r))
        self._run(name, [steps.verify])
        if self._verified(steps) and steps.compare is not None:
            self._run(name, [steps.compare])
        else:
            steps = replace(steps, score=None, compare=None)
        measured = self._assembled(files_only(self._recipe), (steps,))
        if hashes:
            self._judged[hashes] = name, measured
        return measured

    def confirm(self, name: str) -> Measured:
        """Run everything that a build of the candidate would; speed only where the rest passes."""
        own = self._field.steps_of(name).artifacts
        unhurried = tuple(replace(a, bench=None) for a in own)
        self._run(name, self._steps(unhurried).ordered())
        measured = self._assembled(files_only(self._recipe), unhurried)
        if not measured.passed:
            return measured
        self._run(name, self._steps(own).ordered())
        return self._assembled(self._recipe, own)

    def _run(self, name: str, steps: Iterable[Step]) -> None:
        found = self.step_reports.setdefault(name, {})
        for report in self._pipeline.run(steps):
            # A step that ran and is met again is found in the cache then.
            if report.key not in self._shared and report.key not in found:
                found[report.key] = report

    def _steps(self, artifacts: tuple[ArtifactSteps, ...]) -> BuildSteps:
        steps = self._field.prepared.steps
        return BuildSteps(steps.reference, steps.reference_quality, artifacts)

    def _assembled(self, recipe: Recipe, artifacts: tuple[ArtifactSteps, ...]) -> Measured:
        steps = self._steps(artifacts)
        found = assemble(recipe, steps, self._pipeline)
        errors = [e for s in steps.ordered() if (e := self._pipeline.outcome(s).error)]
        reports = tuple(a.report for a in found.artifacts)
        complete = len(reports) == len(artifacts) and not errors
        ships = all(report.shippable for report in reports)
        # Without an error only a budget that nobody could measure makes a build unavailable.
        unmeasured = found.exit_code == ExitCode.UNAVAILABLE
        passed = complete and (unmeasured or (ships and found.exit_code == ExitCode.OK))
        return Measured(passed, found.exit_code, _reason(found, errors), reports)

    def _verified(self, steps: ArtifactSteps) -> bool:
        output = self._pipeline.output(steps.verify)
        if output is None:
            return False
        found = Verification.model_validate_json((output / VERIFICATION_FILE).read_bytes())
        return found.passed

    def _hashes(self, steps: ArtifactSteps) -> tuple[str, ...]:
        """Names and hashes of an export's files; empty where there is none."""
        record = self._pipeline.outcome(steps.export).record
        if record is None:
            return ()
        return tuple(f"{f.path} {f.sha256}" for f in sorted(record.files, key=lambda f: f.path))


def files_only(recipe: Recipe) -> Recipe:
    """The recipe with no budget but that of files, which needs no device."""
    targets = {
        name: target.model_copy(update={"budget": Budget(file_mb=target.budget.file_mb)})
        for name, target in recipe.targets.items()
    }
    return recipe.model_copy(update={"targets": targets})


def _reason(found: Assembled, errors: list[EdgedistillError]) -> str:
    """Why the candidate may not ship; with several targets, to the first of those."""
    for judgement in found.judgements:
        if judgement.rung is None:
            why = judgement.reason.partition(": ")[2]  # behind the name of the only rung
            return f"{judgement.target}: {why}" if len(found.judgements) > 1 else why
    return errors[0].message.splitlines()[0] if errors else ""
