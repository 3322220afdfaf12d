"""Steps with content-addressed keys, and the loop that runs those which the cache lacks.

``key = sha256(task, its fields, contents of its input files, code version, keys of its inputs)``,
so all keys are known before anything runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgedistill.cache import Cache, StepRecord
from edgedistill.child import run_in_child
from edgedistill.code_version import CodeVersion
from edgedistill.content import ContentHashes, sha256_json
from edgedistill.errors import EdgedistillError, StageError
from edgedistill.results import StepReport
from edgedistill.task import WORK, Task

Say = Callable[[str], None]


def say(line: str) -> None:
    """Talk to the user: one line on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Step:
    """A task with the steps that it reads from.

    Attributes:
        label: for people, such as ``int4/gguf: export``; not part of the key.
        inputs: name, as the task knows it, -> the step whose output it is.
        hashes: of input files, shared by all steps of a build.
        fresh: run it even if the cache has it.
        alone: it measures this machine: it runs here, with nothing beside it.
    """

    label: str
    task: Task
    inputs: Mapping[str, Step] = field(default_factory=dict)
    hashes: ContentHashes = field(default_factory=ContentHashes)
    fresh: bool = False
    alone: bool = False

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The task's fields as JSON, input files as hashes."""
        return self.task.fingerprint(self.hashes)

    @cached_property
    def code(self) -> CodeVersion:
        """The version of the code that it runs."""
        return self.task.code()

    @cached_property
    def key(self) -> str:
        """64 hex digits that stand for everything that decides the output."""
        inputs = {name: step.key for name, step in self.inputs.items()}
        kind = type(self.task).__name__
        return sha256_json([kind, self.fields, self.code.sha256, inputs])

    def lineage(self) -> list[Step]:
        """The steps that this one stands on and itself, each after its inputs, each once."""
        before = [s for step in self.inputs.values() for s in step.lineage()]
        return unique([*before, self])


def unique(steps: Iterable[Step]) -> list[Step]:
    """The steps in order, each key once: the first of several labels stays."""
    found: dict[str, Step] = {}
    for step in steps:
        found.setdefault(step.key, step)
    return list(found.values())


@dataclass(frozen=True)
class Outcome:
    """How a step ended: with a record, with an error, or, where an input failed, not run.

    Attributes:
        record: of the finished step.
        error: its own, or that of the step that it stands on.
        report: None for a step that was not run.
    """

    record: StepRecord | None = None
    error: EdgedistillError | None = None
    report: StepReport | None = None


class Pipeline:
    """Runs steps one after the other, each in its own process.

    One at a time, because two would share the cores that each is told to use and the memory that
    the recipe allows.

    Args:
        cache: of their outputs.
        tell: what the user should know.
        peak_ram_bytes: that a step may hold; one that holds more is stopped, and has failed.
    """

    def __init__(self, cache: Cache, tell: Say = say, *, peak_ram_bytes: int | None = None) -> None:
        self.cache = cache
        self._peak_ram_bytes = peak_ram_bytes
        self._tell = tell
        self._outcomes: dict[str, Outcome] = {}

    def run(self, steps: Iterable[Step]) -> list[StepReport]:
        """Run the steps in order; inputs that are not named run first.

        A step that fails takes down those that read from it, and nothing else.

        Returns:
            A report for each step that was run, or found in the cache.
        """
        ordered = unique(s for step in steps for s in step.lineage())
        self.cache.sweep()
        self._settle_all([(step, f"[{n}/{len(ordered)}]") for n, step in enumerate(ordered, 1)])
        return [report for step in ordered if (report := self.outcome(step).report)]

    def outcome(self, step: Step) -> Outcome:
        """How a step that was run ended."""
        return self._outcomes[step.key]

    def output(self, step: Step) -> Path | None:
        """Where the step's output lies on this disk; None when there is none."""
        return self._present(step) if self.outcome(step).record else None

    def _settle_all(self, ordered: Sequence[tuple[Step, str]]) -> None:
        """Have an outcome of every step; each comes after its inputs, with its number."""
        for step, number in ordered:
            self._outcomes[step.key] = self._settle(step, number)

    def _failed_input(self, step: Step) -> EdgedistillError | None:
        """The error of an input that settled without an output."""
        errors = (self._outcomes[source.key].error for source in step.inputs.values())
        return next((error for error in errors if error), None)

    def _settle(self, step: Step, number: str) -> Outcome:
        failed = self._failed_input(step)
        if failed:
            return Outcome(error=failed)
        try:
            return self._find_or_run(step, number)
        except EdgedistillError as error:
            self._tell(f"{number} {step.label}: failed\nerror: {error}")
            return Outcome(error=error, report=report_of(step, error=str(error)))

    def _find_or_run(self, step: Step, number: str) -> Outcome:
        record = None if step.fresh else self.cache.look_up(step.key)
        if record:
            self.cache.share(record)
            return Outcome(record, report=report_of(step, record, cached=True))

        with self._locked(step, number) as lock:
            # Whoever held the lock may have finished the step.
            record = None if step.fresh else self.cache.look_up(step.key)
            if record:
                return Outcome(record, report=report_of(step, record, cached=True))
            self._tell(f"{number} {step.label}")
            record = self._run(step, lock)
        peak_gb = record.peak_own_bytes / 1e9
        self._tell(f"{number} {step.label}: {record.seconds:.1f} s, peak {peak_gb:.2f} GB")
        return Outcome(record, report=report_of(step, record, cached=False))

    @contextmanager
    def _locked(self, step: Step, number: str) -> Iterator[int]:
        def waiting() -> None:
            self._tell(f"{number} {step.label}: another build is at it; waiting")

        with self.cache.lock(step.key, waiting) as lock:
            yield lock

    def _present(self, step: Step) -> Path:
        """Have the output of a finished step here; one that was damaged since is made again.

        Raises:
            StageError: the whole cache is gone, as where a disk was unplugged.
        """
        if self.cache.find(step.key) is None:
            if not self.cache.is_there():
                raise StageError(
                    f"what {step.label!r} wrote is not there any more",
                    where=str(self.cache.out(step.key)),
                    hint="put the cache back where it was, or run the same command again: "
                    "what is missing is made anew",
                )
            with self._locked(step, "[input]") as lock:
                if self.cache.fetch(step.key) is None:
                    self._tell(f"warning: {step.label}: its output is damaged and made again")
                    self._run(step, lock)
        return self.cache.out(step.key)

    def _run(self, step: Step, lock: int) -> StepRecord:
        inputs = {name: self._present(source) for name, source in step.inputs.items()}
        if step.task.keeps_work():
            inputs[WORK] = self.cache.work(step.key)
        log = self.cache.log(step.key)
        with self.cache.scratch(step.key) as scratch:
            result = run_in_child(
                step.task,
                inputs,
                scratch,
                lock=lock,
                log=log,
                peak_ram_bytes=self._peak_ram_bytes,
            )
            record = StepRecord(
                key=step.key,
                label=step.label,
                task=type(step.task).__name__,
                fields=step.fields,
                code=step.code.sha256,
                libraries=step.code.libraries,
                inputs={name: source.key for name, source in step.inputs.items()},
                seconds=result.seconds,
                peak_rss_bytes=result.peak_rss_bytes,
                peak_own_bytes=result.peak_own_bytes,
                files=result.files,
            )
            self.cache.commit(scratch, record)
        self.cache.end_work(step.key)
        return record


def report_of(
    step: Step, record: StepRecord | None = None, *, cached: bool = False, error: str | None = None
) -> StepReport:
    """What the build's report says of a step."""
    return StepReport(
        label=step.label,
        key=step.key,
        cached=cached,
        seconds=record.seconds if record else 0.0,
        peak_rss_bytes=record.peak_rss_bytes if record else 0,
        peak_own_bytes=record.peak_own_bytes or record.peak_rss_bytes if record else 0,
        error=error,
    )
