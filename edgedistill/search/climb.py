"""Which candidate to measure next, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgedistill.errors import ExitCode
from edgedistill.pipeline import Say
from edgedistill.report.words import duration, kl_to_reference, megabytes
from edgedistill.results import StepReport
from edgedistill.search.candidates import Candidate
from edgedistill.search.measure import Measured
from edgedistill.search.results import SearchedCandidate, State
from edgedistill.verdict import worst


@dataclass(frozen=True)
class Limits:
    """How far a climb goes.

    Attributes:
        try_all: measure what nothing is expected of, too.
        seconds: after which no candidate is started any more; None: never.
        clock: in seconds.
    """

    try_all: bool = False
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic


class Judges(Protocol):
    """What tells how good a candidate is; :class:`~edgedistill.search.measure.Measurer` does."""

    @property
    def step_reports(self) -> Mapping[str, Mapping[str, StepReport]]:
        """Candidate -> its own steps."""
        ...

    def judge(self, name: str) -> Measured:
        """In one format."""
        ...

    def confirm(self, name: str) -> Measured:
        """In all formats, with all that a build measures."""
        ...


class Climb:
    """Measures candidates in their order, until no other can be the smallest that passes.

    Every candidate is first judged in one format.  Only the smallest that passes there is run in
    all formats; if it fails in one of them the climb goes on, with what was not worth trying
    beside it.
    """

    def __init__(
        self, candidates: Sequence[Candidate], judges: Judges, tell: Say, limits: Limits
    ) -> None:
        self._candidates = candidates
        self._judges = judges
        self._tell = tell
        self._limits = limits
        self._began = limits.clock()
        self._measured: dict[str, Measured] = {}
        self._winner: Candidate | None = None

    def run(self) -> Candidate | None:
        """The smallest candidate that passes in all formats; None if there is none."""
        while True:
            candidate = self._next()
            if candidate is not None:
                self._judge(candidate)
                continue
            best = self._best()
            if best is None or self._confirm(best):
                self._winner = best
                return best

    @property
    def complete(self) -> bool:
        """Whether nothing was left to the clock."""
        return not any(self._worth_trying(c) is None for c in self._candidates)

    @property
    def exit_code(self) -> ExitCode:
        """That of a build of the winner, or of one that ships none of the candidates."""
        if self._winner is not None:
            return self._measured[self._winner.name].code
        codes = [m.code for m in self._measured.values()]
        if not self.complete:
            codes.append(ExitCode.UNAVAILABLE)
        if not self._candidates:
            codes.append(ExitCode.BUDGET_NOT_MET)
        return worst(codes)

    def _next(self) -> Candidate | None:
        if self._is_late():
            return None
        return next((c for c in self._candidates if self._worth_trying(c) is None), None)

    def _is_late(self) -> bool:
        seconds = self._limits.seconds
        return seconds is not None and self._limits.clock() - self._began >= seconds

    def _worth_trying(self, candidate: Candidate) -> str | None:
        """Why a candidate is not measured; None if it should be."""
        if candidate.name in self._measured:
            return "it was measured"
        if self._limits.try_all:
            return None
        best = self._best()
        if best is not None and candidate.total_bytes >= best.total_bytes:
            return f"no smaller than {best.name}, which passes"
        missed = self._missed_floor()
        harsh = next((name for name in candidate.gentler if name in missed), None)
        return f"{harsh} is gentler and missed the floor" if harsh else None

    def _missed_floor(self) -> set[str]:
        codes = {name: m.code for name, m in self._measured.items()}
        return {name for name, code in codes.items() if code == ExitCode.FLOOR_NOT_MET}

    def _best(self) -> Candidate | None:
        """The smallest of those that pass, as far as they were measured."""
        passing = [c for c in self._candidates if self._passed(c.name)]
        return min(passing, key=self._bytes, default=None)

    def _passed(self, name: str) -> bool:
        return name in self._measured and self._measured[name].passed

    def _bytes(self, candidate: Candidate) -> tuple[int, int]:
        """By arithmetic in all formats; of equals, as they are in the one that judged them."""
        measured = self._measured[candidate.name].artifacts
        return candidate.total_bytes, sum(a.size_bytes for a in measured)

    def _judge(self, candidate: Candidate) -> None:
        format_name = candidate.judging_format
        size = megabytes(candidate.planned_bytes[format_name])
        self._tell(f"{candidate.name}: {candidate.what}; ~{size} MB as {format_name}")
        self._settle(candidate, self._judges.judge(candidate.name), f"passes as {format_name}")

    def _confirm(self, candidate: Candidate) -> bool:
        formats = ", ".join(candidate.planned_bytes)
        self._tell(f"{candidate.name}: the smallest that passes; all of it now: {formats}")
        self._settle(candidate, self._judges.confirm(candidate.name), f"passes as {formats}")
        return self._passed(candidate.name)

    def _settle(self, candidate: Candidate, measured: Measured, passes: str) -> None:
        self._measured[candidate.name] = measured
        verdict = passes if measured.passed else "fails"
        reason = f": {measured.reason}" if measured.reason else ""
        self._tell(f"{candidate.name}: {verdict}{reason}")

    def _state(self, candidate: Candidate) -> tuple[State, str]:
        measured = self._measured.get(candidate.name)
        if measured is None:
            late = f"the time was over ({duration(self._limits.seconds or 0)})"
            return "not tried", self._worth_trying(candidate) or late
        if candidate is self._winner:
            return "wins", measured.reason
        return ("passes" if measured.passed else "fails"), measured.reason

    def result(self, candidate: Candidate) -> SearchedCandidate:
        """What came of one of the candidates."""
        state, reason = self._state(candidate)
        steps = self._judges.step_reports.get(candidate.name, {}).values()
        result = describe_candidate(candidate, state, reason)
        measured = self._measured.get(candidate.name)
        if measured is None:
            return result
        artifacts = {a.format: a for a in measured.artifacts}
        judged = artifacts.get(candidate.judging_format)
        evaluation = judged.evaluation if judged else None
        return result.model_copy(
            update={
                "size_bytes": {name: a.size_bytes for name, a in artifacts.items()},
                "exit_code": int(measured.code),
                "kl_mean": kl_to_reference(judged) if judged else None,
                "slices": evaluation.slices if evaluation else [],
                "seconds": sum(step.seconds for step in steps),
                "ran": any(not step.cached for step in steps),
            }
        )


def describe_candidate(candidate: Candidate, state: State, reason: str) -> SearchedCandidate:
    """A candidate of which nothing was measured."""
    return SearchedCandidate(
        name=candidate.name,
        what=candidate.what,
        source=candidate.source,
        steps=candidate.steps,
        planned_bytes=candidate.planned_bytes,
        planned_seconds=candidate.planned_seconds,
        state=state,
        reason=reason,
    )
