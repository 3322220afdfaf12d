"""The floor's verdict: every clause held against the interval of what was measured.

The rules stand in docs/evaluate.md; a change here is a change there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgedistill.evaluate.statistics import Pairs, holm, loss_p_value, more_cases_needed
from edgedistill.evaluate.suite import ALL_CASES
from edgedistill.floor import Clauses, Floor, SliceSpec
from edgedistill.results import FloorCheck, Interval, SliceQuality, Verdict

SIGNIFICANCE = 0.025  # of a loss, one-sided: what lies beyond either end of a 95% interval
# A slice that nobody named may lose so much of its score (1 = all cases), or what the floor's
# retention lets the whole suite lose, whichever is more.
TOLERATED_LOSS = 0.02
# A protected slice has to be large enough to show a loss of this much.
VISIBLE_LOSS = 0.05

_LARGEST_VALUE = {"max_log_score_loss", "max_broken"}  # the other clauses name a least value


@dataclass(frozen=True)
class Measured:
    """One slice: its pairs of answers, and what follows from them.

    Attributes:
        intervals: by field of :class:`statistics.Shares`, but for a figure that no case gives.
    """

    pairs: Pairs
    quality: SliceQuality
    intervals: Mapping[str, Interval]

    @property
    def score_loss(self) -> float:
        """The reference's score minus the artifact's."""
        return self.quality.reference_score - self.quality.score


def judge(
    slices: Mapping[str, Measured],
    floor: Floor | None,
    specs: Mapping[str, SliceSpec],
    further: Sequence[FloorCheck] = (),
) -> tuple[list[FloorCheck], Verdict]:
    """All checks, and the verdict over them.

    Args:
        slices: name -> what was measured; ``all`` among them, if any case was answered.
        floor: on all cases; None together with no specs leaves everything unjudged.
        specs: the capability spec, by slice; a slice that it names need not have been measured.
        further: checks of other cases, such as texts, that the verdict stands on too.
    """
    if floor is None and not specs:
        return [], "unjudged"
    held = floor or Floor()
    overall = SliceSpec.model_validate(held.limits())
    checks = _check_spec(ALL_CASES, slices.get(ALL_CASES), overall)
    for name, spec in specs.items():
        checks += _check_spec(name, slices.get(name), spec)
    named = {ALL_CASES, *specs}
    unnamed = {name: found for name, found in slices.items() if name not in named}
    checks += [*_find_unnamed_losses(unnamed, held), *further]
    return checks, _verdict(checks, held)


def _verdict(checks: Sequence[FloorCheck], floor: Floor) -> Verdict:
    verdicts = {check.verdict for check in checks}
    if "fail" in verdicts:
        return "fail"
    if verdicts & {"underpowered", "not measured"} and floor.when_underpowered == "fail":
        return "underpowered"
    return "pass"


def _check_spec(name: str, found: Measured | None, spec: SliceSpec) -> list[FloorCheck]:
    if found is None:
        limits = dict(spec.limits())
        if spec.protected:
            limits["protected"] = 0.0
        return [_not_measured(clause, name, limit) for clause, limit in limits.items()]
    checks = _check_clauses(name, found, spec)
    if spec.protected:
        checks.append(_check_protected(name, found))
    if spec.sacrificed:
        checks.append(_loss_check("sacrificed", name, found, limit=1.0, verdict="pass"))
    return checks


def _check_clauses(name: str, found: Measured, clauses: Clauses) -> list[FloorCheck]:
    return [_check_limit(name, found, c, limit) for c, limit in clauses.limits().items()]


def _check_limit(name: str, found: Measured, clause: str, limit: float) -> FloorCheck:
    figure = clause.removeprefix("max_")
    if figure not in found.intervals:
        return _not_measured(clause, name, limit)
    value, interval = float(getattr(found.quality, figure)), found.intervals[figure]
    if clause in _LARGEST_VALUE:
        passes, fails = interval.high <= limit, interval.low > limit
    else:
        passes, fails = interval.low >= limit, interval.high < limit
    needed = None
    if not passes and not fails:
        half_width = interval.high - value if limit > value else value - interval.low
        needed = more_cases_needed(found.quality.cases, half_width, limit - value)
    return FloorCheck(
        clause=clause,
        slice=name,
        limit=limit,
        value=value,
        interval=interval,
        verdict="pass" if passes else "fail" if fails else "underpowered",
        cases_needed=needed,
    )


def _not_measured(clause: str, name: str, limit: float) -> FloorCheck:
    return FloorCheck(
        clause=clause,
        slice=name,
        limit=limit,
        value=None,
        interval=None,
        verdict="not measured",
    )


def _check_protected(name: str, found: Measured) -> FloorCheck:
    """Fail on a significant loss of right answers; too small a slice decides nothing."""
    if found.score_loss > 0.0 and loss_p_value(found.pairs) < SIGNIFICANCE:
        return _loss_check("protected", name, found, limit=0.0, verdict="fail")
    half_width = found.intervals["score_loss"].high - found.score_loss
    if half_width <= VISIBLE_LOSS:
        return _loss_check("protected", name, found, limit=0.0, verdict="pass")
    needed = more_cases_needed(found.quality.cases, half_width, VISIBLE_LOSS)
    return _loss_check(
        "protected", name, found, limit=0.0, verdict="underpowered", cases_needed=needed
    )


def _find_unnamed_losses(slices: Mapping[str, Measured], floor: Floor) -> list[FloorCheck]:
    """A failed check for every slice that nobody named and that lost significantly and enough."""
    adjusted = holm([loss_p_value(found.pairs) for found in slices.values()])
    losses = []
    for (name, found), p_value in zip(slices.items(), adjusted, strict=True):
        allowed = (1.0 - (floor.retention or 1.0)) * found.quality.reference_score
        tolerated = max(TOLERATED_LOSS, allowed)
        if p_value < SIGNIFICANCE and found.score_loss > tolerated:
            losses.append(_loss_check("unnamed loss", name, found, limit=tolerated, verdict="fail"))
    return losses


def _loss_check(
    clause: str,
    name: str,
    found: Measured,
    *,
    limit: float,
    verdict: Verdict,
    cases_needed: int | None = None,
) -> FloorCheck:
    return FloorCheck(
        clause=clause,
        slice=name,
        limit=limit,
        value=found.score_loss,
        interval=found.intervals["score_loss"],
        verdict=verdict,
        cases_needed=cases_needed,
    )
