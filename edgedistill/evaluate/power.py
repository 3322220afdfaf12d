"""What a suite can decide, said before anything is scored.

A clause is decided when the whole interval lies on one side of its limit.  How wide intervals will
be follows from the number of cases, their weights, and how much a pair of answers varies: assumed,
or measured on a rung before.  An artifact that lost nothing lies at a known distance from the
limit; a suite on which not even that one passes with a chance of 80% cannot decide the clause.
Sample sizes for paired proportions: Connor 1987, Biometrics 43.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from edgedistill.evaluate.capabilities import SIGNIFICANCE, UNNAMED, VISIBLE_LOSS, tolerated_loss
from edgedistill.evaluate.statistics import POWER, Z_CONFIDENCE, Floats, more_cases_needed
from edgedistill.evaluate.suite import ALL_CASES, Case, ChoiceCase, TextCase
from edgedistill.floor import Clauses, Floor, SliceSpec
from edgedistill.results import Document, Evaluation, SliceQuality

UNSEEN_FLIPS = 2.0  # the intervals allow for one broken and one fixed case more than were seen


@dataclass(frozen=True)
class Spread:
    """How much the pairs of answers of one slice vary.

    Attributes:
        flips: share of cases whose answer changes between right and wrong, either way.
        log_score_sd: standard deviation of a case's rise of the log-score, in nats.
        reference_score: share of cases that the reference gets right.
    """

    flips: float
    log_score_sd: float
    reference_score: float


class PlannedClause(Document):
    """One clause on one slice, and whether the suite can decide it.

    Attributes:
        limit: of the clause; of a slice that nobody named, the loss that is tolerated.
        effective_cases: cases of equal weight that would tell as much (Kish).
        smallest: the smallest distance from the limit, in the clause's own unit, that is decided
            with a chance of 80%; of ``protected`` and ``unnamed loss`` the smallest loss of score
            that is found.
        distance: how far inside the limit an artifact lies that lost nothing.
        decides: whether such an artifact passes; None where nothing has to be decided.
        cases_needed: how many more cases of the slice would do.
    """

    slice: str
    clause: str
    limit: float
    cases: int
    effective_cases: float
    smallest: float
    distance: float | None
    decides: bool | None
    cases_needed: int | None = None


def plan_clauses(
    cases: Sequence[Case],
    floor: Floor | None,
    specs: Mapping[str, SliceSpec],
    spreads: Mapping[str, Spread],
    assumed: Spread,
    *,
    level: float = SIGNIFICANCE,
) -> list[PlannedClause]:
    """Every clause on every slice.

    Args:
        cases: the whole suite; its texts are left out, for how they vary is not known.
        floor: on all cases.
        specs: the capability spec.
        spreads: by slice, measured; a slice that is missing takes those of ``all``.
        assumed: where nothing was measured.
        level: of a one-sided error.
    """
    cases = [case for case in cases if not isinstance(case, TextCase)]
    if (floor is None and not specs) or not cases:
        return []
    names = [ALL_CASES, *sorted({name for case in cases for name in case.slices})]
    unnamed = [name for name in names[1:] if name not in specs]
    planned = []
    for name in names:
        spread = spreads.get(name) or spreads.get(ALL_CASES) or assumed
        plan = _SlicePlan(name, cases, spread, level)
        spec: Clauses | None = floor if name == ALL_CASES else specs.get(name)
        if spec is not None:
            planned += [plan.clause(c, limit) for c, limit in spec.limits().items()]
        if isinstance(spec, SliceSpec) and spec.protected:
            planned.append(plan.protected())
        if name in unnamed:
            planned.append(plan.unnamed(floor, len(unnamed)))
    return planned


class _SlicePlan:
    def __init__(self, name: str, cases: Sequence[Case], spread: Spread, level: float) -> None:
        weights, chosen = _weights(name, cases), _weights(name, _choices(cases))
        self._name = name
        self._cases = len(weights)
        # Only choices have a log-score.
        self._effective_choices = effective_cases(chosen) if len(chosen) else 0.0
        self._effective = effective_cases(weights)
        self._spread = spread
        self._level = level
        # Of the difference of two scores on the same cases.
        self._loss_error = self._error(spread.flips, UNSEEN_FLIPS)

    def clause(self, clause: str, limit: float) -> PlannedClause:
        """A clause of the floor."""
        spread, right = self._spread, self._spread.reference_score
        if clause == "score":
            error, distance = self._error(right * (1.0 - right), UNSEEN_FLIPS / 2), right - limit
        elif clause == "retention":
            error, distance = self._loss_error / right, 1.0 - limit
        elif clause == "max_broken":
            # Who loses nothing breaks as many answers as it fixes.
            broken = spread.flips / 2.0 / right
            variance = broken * max(1.0 - broken, 0.0) / right
            error, distance = self._error(variance, 1.0 / right), limit - broken
        else:
            if not self._effective_choices:
                return self._planned(clause, limit, math.inf, limit, False, None)
            error, distance = spread.log_score_sd / math.sqrt(self._effective_choices), limit
        smallest = self._found(error, self._level)
        if clause == "max_broken":  # the broken case that the interval adds moves it as a whole
            smallest += 1.0 / (self._effective * right)
        decides = distance >= smallest
        needed = None
        if not decides and distance > 0.0:
            needed = more_cases_needed(self._cases, Z_CONFIDENCE * error, distance)
        return self._planned(clause, limit, smallest, distance, decides, needed)

    def protected(self) -> PlannedClause:
        """Decided where a loss of ``VISIBLE_LOSS`` would be seen."""
        half_width = NormalDist().inv_cdf(1.0 - self._level) * self._loss_error
        decides = half_width <= VISIBLE_LOSS
        needed = None if decides else more_cases_needed(self._cases, half_width, VISIBLE_LOSS)
        smallest = self._found(self._loss_error, self._level)
        return self._planned("protected", 0.0, smallest, VISIBLE_LOSS, decides, needed)

    def unnamed(self, floor: Floor | None, slices: int) -> PlannedClause:
        """What a slice may lose unseen among so many; Holm's first step is the strictest."""
        tolerated = tolerated_loss(floor, self._spread.reference_score)
        smallest = max(tolerated, self._found(self._loss_error, self._level / slices))
        return self._planned(UNNAMED, tolerated, smallest, None, None, None)

    def _error(self, variance: float, unseen: float) -> float:
        """Standard error of a weighted mean; ``unseen`` cases of a square of 1 are allowed for."""
        return math.sqrt(variance / self._effective + unseen / self._effective**2)

    def _found(self, error: float, level: float) -> float:
        """What a one-sided test at the level finds with a chance of ``POWER``."""
        normal = NormalDist()
        return (normal.inv_cdf(1.0 - level) + normal.inv_cdf(POWER)) * error

    def _planned(
        self,
        clause: str,
        limit: float,
        smallest: float,
        distance: float | None,
        decides: bool | None,
        needed: int | None,
    ) -> PlannedClause:
        return PlannedClause(
            slice=self._name,
            clause=clause,
            limit=limit,
            cases=self._cases,
            effective_cases=self._effective,
            smallest=smallest,
            distance=distance,
            decides=decides,
            cases_needed=needed,
        )


def effective_cases(weights: Floats) -> float:
    """How many cases of equal weight tell as much (Kish 1965): sum(w)^2 / sum(w^2)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def measured_spreads(evaluation: Evaluation, cases: Sequence[Case]) -> dict[str, Spread]:
    """Slice -> spread, as an evaluation of the whole suite found it.

    The standard deviation follows from the width of the log-score's interval.
    """
    spreads = {}
    cases = [case for case in cases if not isinstance(case, TextCase)]
    for found in evaluation.slices:
        if not found.cases:
            continue  # it holds texts alone
        chosen = _weights(found.slice, _choices(cases))
        interval = found.log_score_loss_interval
        error = (interval.high - interval.low) / (2.0 * Z_CONFIDENCE)
        spread = error * math.sqrt(effective_cases(chosen)) if len(chosen) else 0.0
        spreads[found.slice] = Spread(
            flips=(found.broken_cases + found.fixed_cases) / found.cases,
            log_score_sd=spread,
            reference_score=_inside(found.reference_score),
        )
    return spreads


def reference_spreads(assumed: Spread, reference: Sequence[SliceQuality]) -> dict[str, Spread]:
    """Slice -> what is assumed, with the score that the reference was found to have."""
    return {
        q.slice: replace(assumed, reference_score=_inside(q.score)) for q in reference if q.cases
    }


def _inside(share: float) -> float:
    """A share by which one can divide."""
    return min(max(share, 0.01), 0.99)


def _choices(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if isinstance(case, ChoiceCase)]


def _weights(name: str, cases: Sequence[Case]) -> Floats:
    """float64 [n]: of the cases of a slice."""
    return np.array([case.importance for case in cases if name in (ALL_CASES, *case.slices)])


def describe_clauses(planned: Sequence[PlannedClause], basis: str) -> Iterator[str]:
    """Lines of text: first what the suite cannot decide, then what it can, then who is unseen.

    Args:
        planned: of one suite.
        basis: where the spreads come from, in words.
    """
    if not planned:
        return
    yield f"what the suite can decide, {basis}:"
    for clause in sorted(planned, key=_order):
        yield f"  {_describe(clause)}"


def _order(clause: PlannedClause) -> tuple[int, str, str]:
    rank = {False: 0, True: 1, None: 2}[clause.decides]
    return rank, "" if clause.slice == ALL_CASES else clause.slice, clause.clause


def _describe(clause: PlannedClause) -> str:
    unit = " nats" if clause.clause == "max_log_score_loss" else ""
    where = f"{clause.slice} ({clause.cases:,} cases)"
    if clause.decides is None:
        return f"unseen   {where}: a loss of less than {clause.smallest:.3f} goes unnoticed"
    if clause.clause == "protected":
        finds = f"protected: finds a loss of {clause.smallest:.3f}"
    else:
        finds = f"{clause.clause} {clause.limit:g}: {clause.smallest:.3g}{unit} from it is decided"
        finds += f", no loss lies {clause.distance:.3g} from it"
    state = "decides " if clause.decides else "CANNOT  "
    more = f"; needs {clause.cases_needed:,} more cases" if clause.cases_needed else ""
    return f"{state} {where}: {finds}{more}"
