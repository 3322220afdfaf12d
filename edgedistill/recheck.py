"""``edgedistill verify``: artifacts from their manifest alone, and files that others made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill.artifact_source import GGUF_FILE, ArtifactSource, find_artifact, find_runtime
from edgedistill.cache_place import CachePlace, open_cache
from edgedistill.chat import Chat
from edgedistill.content import ContentHashes
from edgedistill.errors import EdgedistillError, ExitCode, InputError, UnavailableError
from edgedistill.evaluation_tasks import TakeArtifact
from edgedistill.pipeline import Pipeline, Say, Step, say
from edgedistill.recheck_tasks import OwnWeights, ReplayGolden, VerifyForeign
from edgedistill.results import Check, Document, Verification
from edgedistill.task import Task
from edgedistill.tasks import VERIFICATION_FILE, JudgeLogits, TakeIn


class Rechecked(Document):
    """What was found of one path.

    Attributes:
        name: of the artifact, or of the file.
        against: the student that it was held against; None: its own manifest.
        unavailable: what could not be checked because a runtime is missing.
    """

    path: str
    name: str
    format: str
    against: str | None
    verification: Verification
    unavailable: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every check that was made passed."""
        return self.verification.passed


class RecheckReport(Document):
    """The result of ``edgedistill verify``."""

    artifacts: list[Rechecked]
    exit_code: int


@dataclass(frozen=True)
class Verifier:
    """How paths are verified.

    Attributes:
        cache: where steps keep what they made; the judge's logits are worth keeping.
        threads: for the runtimes and the judge.
    """

    cache: CachePlace
    threads: int = 2
    tell: Say = say

    def recheck(self, paths: Sequence[Path], against: str | None = None) -> RecheckReport:
        """Verify each path; what is wrong with one does not keep the others from being looked at.

        Args:
            paths: artifact directories; with ``against`` any .gguf, ONNX directory or .mlpackage.
            against: a student: a directory, a .gguf, ``pkg://…`` or ``hf://…``.

        Raises:
            InputError: a path that does not exist or is of no known format, or the student cannot
                be read.
        """
        from edgedistill.verify.manifest_files import has_manifest

        for path in paths:
            if not path.exists():
                raise InputError("there is no such file or directory", where=str(path))
            if against is None and not has_manifest(path):
                raise InputError(
                    "has no manifest.json, so it is no artifact of edgedistill",
                    where=str(path),
                    hint="name the student that it should be: --against STUDENT",
                )
        if against is None:
            found = [self._by_manifest(path) for path in paths]
        else:
            found = _Foreign(self, against).verify_all(paths)
        code = ExitCode.OK
        if any(item.unavailable for item in found):
            code = ExitCode.UNAVAILABLE
        if not all(item.passed for item in found):
            code = ExitCode.VERIFICATION_FAILED
        return RecheckReport(artifacts=found, exit_code=code)

    def run_step(self, step: Step) -> tuple[Verification | None, EdgedistillError | None]:
        """The verification that a step wrote, or why there is none."""
        pipeline = Pipeline(open_cache(self.cache), self.tell)
        pipeline.run([step])
        output = pipeline.output(step)
        if output is None:
            return None, pipeline.outcome(step).error
        return Verification.model_validate_json((output / VERIFICATION_FILE).read_bytes()), None

    def _by_manifest(self, path: Path) -> Rechecked:
        from edgedistill.verify.manifest_files import WHEN_BUILT, check_files, read_manifest

        directory = path if path.is_dir() else path.parent
        try:
            manifest = read_manifest(directory)
        except InputError as error:
            return _unreadable(path, "manifest: readable", error)
        verification = _of([*check_files(directory, manifest)])
        name = f"{manifest.recipe}/{manifest.rung}/{manifest.format}"
        made = Rechecked(
            path=str(path),
            name=name,
            format=manifest.format,
            against=None,
            verification=verification,
        )
        if not all(check.passed for check in verification.checks if check.name != WHEN_BUILT):
            note = "golden vectors were not replayed: the files are not those of the manifest"
            return _noted(made, note)
        if not manifest.golden:
            return _noted(made, "the manifest has no golden vectors: nothing was run")
        task = ReplayGolden(
            artifact=directory.absolute(),
            runtime=manifest.runtime,
            context_tokens=manifest.context_tokens,
            golden=tuple(manifest.golden),
            threads=self.threads,
            kv_cache_bits=manifest.kv_cache_bits,
        )
        replayed, problem = self.run_step(Step(f"{name}: replay", task, fresh=True))
        return _joined(made, replayed, problem, "golden: tokens")


class _Foreign:
    """Files against one student, whose judge is asked once."""

    def __init__(self, verifier: Verifier, against: str) -> None:
        from edgedistill.intake import resolve_student

        self._verifier = verifier
        self._against = against
        self._hashes = ContentHashes()
        source = resolve_student(against, Path.cwd())
        self._student = self._step("take in the student", TakeIn(source=source.absolute()))
        self._judge = self._judged("reference", self._student)

    def verify_all(self, paths: Sequence[Path]) -> list[Rechecked]:
        sources = [find_artifact(path.absolute()) for path in paths]
        pipeline = Pipeline(open_cache(self._verifier.cache), self._verifier.tell)
        pipeline.run([self._judge])
        error = pipeline.outcome(self._judge).error
        if error is not None:
            raise error
        return [self._verify(path, source) for path, source in zip(paths, sources, strict=True)]

    def _verify(self, path: Path, source: ArtifactSource) -> Rechecked:
        take = self._step(f"{path.name}: take in", TakeArtifact(source=source.path))
        inputs = {"artifact": take, "student": self._student, "judge": self._judge}
        if source.format == "gguf":
            file = source.files[GGUF_FILE]
            weights = OwnWeights(file=file, threads=self._verifier.threads)
            own = self._step(f"{path.name}: its weights", weights, student=self._student)
            pipeline = Pipeline(open_cache(self._verifier.cache), self._verifier.tell)
            pipeline.run([own])
            if pipeline.output(own) is not None:
                judged = self._judged(f"{path.name}, its weights", own)
                inputs |= {"own_weights": own, "own_judge": judged}
        made = Rechecked(
            path=str(path),
            name=path.name,
            format=source.format,
            against=self._against,
            verification=_of([]),
        )
        try:
            runtime = find_runtime(source)
        except EdgedistillError as error:
            return _joined(made, None, error, "file: readable")
        task = VerifyForeign(
            format=source.format,
            runtime=runtime,
            threads=self._verifier.threads,
            kv_cache_bits=source.claims.kv_cache_bits,
        )
        step = self._step(f"{path.name}: verify", task, **inputs)
        found, problem = self._verifier.run_step(step)
        return _joined(made, found, problem, "file: readable")

    def _judged(self, label: str, student: Step) -> Step:
        task = JudgeLogits(texts={}, chat=Chat(), threads=self._verifier.threads)
        return self._step(f"{label}: float32 logits", task, student=student)

    def _step(self, label: str, task: Task, **inputs: Step) -> Step:
        return Step(label, task, inputs, self._hashes)


def _of(checks: list[Check]) -> Verification:
    return Verification(checks=checks, against_weights=[], against_reference=[], settings={})


def _unreadable(path: Path, name: str, error: EdgedistillError) -> Rechecked:
    check = Check(name=name, passed=False, detail=str(error))
    return Rechecked(
        path=str(path), name=path.name, format="?", against=None, verification=_of([check])
    )


def _noted(made: Rechecked, note: str) -> Rechecked:
    verification = made.verification.model_copy(update={"limitation": note})
    return made.model_copy(update={"verification": verification})


def _joined(
    made: Rechecked, found: Verification | None, problem: EdgedistillError | None, name: str
) -> Rechecked:
    """Both verifications in one; a runtime that is missing is neither a pass nor a failure."""
    if isinstance(problem, UnavailableError):
        return made.model_copy(update={"unavailable": str(problem)})
    before = made.verification.checks
    if found is None:
        check = Check(name=name, passed=False, detail=str(problem))
        verification = _of([*before, check])
    else:
        verification = found.model_copy(update={"checks": [*before, *found.checks]})
    return made.model_copy(update={"verification": verification})


def show(report: RecheckReport, page: Path | None, *, as_json: bool) -> int:
    """Print the report, write the page where one is wanted, and return the exit code.

    Raises:
        StageError: the page cannot be written.
    """
    if page is not None:
        from edgedistill.verify.matrix import Column, write_matrix

        columns = [
            Column(
                item.name,
                f"against {item.against or 'its manifest'}",
                item.verification,
                item.unavailable,
            )
            for item in report.artifacts
        ]
        write_matrix(columns, "Is it the same model?", page)
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
    else:
        from rich.console import Console

        from edgedistill.verify.table import render_checks

        Console().print(render_checks(report))
    return report.exit_code
