"""The capability spec: slices that must not lose, that may, and those that nobody named.

The rules stand in docs/evaluate.md; a change here is a change there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgedistill.evaluate.statistics import (
    CONFIDENCE,
    Pairs,
    Shares,
    holm,
    loss_p_value,
    more_cases_needed,
    share_intervals,
    shares,
)
from edgedistill.floor import Floor, SliceSpec
from edgedistill.results import FloorCheck, Interval, Verdict

SIGNIFICANCE = (1.0 - CONFIDENCE) / 2.0  # of a loss, one-sided: beyond either end of an interval
# A slice that nobody named may lose so much of its score (1 = all cases), or what the floor's
# retention lets the whole suite lose, whichever is more.
TOLERATED_LOSS = 0.02
# A protected slice has to be large enough to show a loss of this much.
VISIBLE_LOSS = 0.05
UNNAMED = "unnamed loss"


@dataclass(frozen=True)
class Measured:
    """One slice: its pairs of answers, and what follows from them.

    Attributes:
        values: the figures; ``intervals`` by the same names, but for a
            figure that no case gives.
        p_value: one-sided, of "no right answers are lost".
        level: of significance, for ``p_value``; the intervals' confidence is 1 - 2 * level.
        early: whether sampling stopped when the verdict was decided, so that intervals and
            p-value are those of a sequential test.
    """

    pairs: Pairs
    values: Shares
    intervals: Mapping[str, Interval]
    p_value: float
    level: float
    early: bool = False

    def value(self, figure: str) -> float:
        """One of the figures."""
        return float(getattr(self.values, figure))


def measure(pairs: Pairs, level: float = SIGNIFICANCE) -> Measured:
    """Of a number of cases that was fixed beforehand.  At least one case is needed."""
    intervals = share_intervals(pairs, 1.0 - 2.0 * level)
    if not pairs.is_choice.any():
        del intervals["log_score_loss"]
    return Measured(pairs, shares(pairs), intervals, loss_p_value(pairs), level)


def check_protected(name: str, found: Measured) -> FloorCheck:
    """Fail on a significant loss of right answers; too small a slice decides nothing."""
    loss = found.value("score_loss")
    if loss > 0.0 and found.p_value < found.level:
        return _loss_check("protected", name, found, limit=0.0, verdict="fail")
    half_width = found.intervals["score_loss"].high - loss
    if half_width <= VISIBLE_LOSS:
        return _loss_check("protected", name, found, limit=0.0, verdict="pass")
    needed = None if found.early else more_cases_needed(found.pairs.count, half_width, VISIBLE_LOSS)
    return _loss_check(
        "protected", name, found, limit=0.0, verdict="underpowered", cases_needed=needed
    )


def check_sacrificed(name: str, found: Measured, spec: SliceSpec) -> FloorCheck:
    """The loss is stated, with who consented to it, and passes."""
    check = _loss_check("sacrificed", name, found, limit=1.0, verdict="pass")
    return check.model_copy(update={"note": spec.sacrifice})


def find_unnamed_losses(slices: Mapping[str, Measured], floor: Floor) -> list[FloorCheck]:
    """A failed check for every slice that nobody named and that lost significantly and enough.

    Holm's correction goes over all of them: together they give a false alarm at most as often as
    their level of significance says.
    """
    losses = []
    adjusted = holm([found.p_value for found in slices.values()])
    for (name, found), p_value in zip(slices.items(), adjusted, strict=True):
        tolerated = tolerated_loss(floor, found.value("reference_score"))
        interval = found.intervals["score_loss"]
        # Early on the value itself is chosen by when one stopped; only its interval counts.
        lost = interval.low if found.early else found.value("score_loss")
        if p_value < found.level and lost > tolerated:
            losses.append(_loss_check(UNNAMED, name, found, limit=tolerated, verdict="fail"))
    return losses


def tolerated_loss(floor: Floor | None, reference_score: float) -> float:
    """How much of its score a slice may lose that nobody named (1 = all cases)."""
    retention = floor.retention if floor else None
    return max(TOLERATED_LOSS, (1.0 - (retention or 1.0)) * reference_score)


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
        value=found.value("score_loss"),
        interval=found.intervals["score_loss"],
        verdict=verdict,
        cases_needed=cases_needed,
    )
