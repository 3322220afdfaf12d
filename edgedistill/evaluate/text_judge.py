"""The floor on texts: how much worse they may be predicted, and losses that nobody named."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgedistill.evaluate.capabilities import SIGNIFICANCE
from edgedistill.evaluate.statistics import holm, more_cases_needed
from edgedistill.evaluate.suite import ALL_CASES
from edgedistill.evaluate.text_statistics import TextPairs
from edgedistill.floor import Clauses, Floor, SliceSpec
from edgedistill.results import FloorCheck

CLAUSE = "max_bits_per_byte_loss"
UNNAMED_TEXTS = "unnamed loss in texts"
# Bits per byte that a slice may lose that nobody named, or what the floor lets all texts lose.
TOLERATED_LOSS = 0.02


def judge_texts(
    slices: Mapping[str, TextPairs], floor: Floor | None, specs: Mapping[str, SliceSpec]
) -> list[FloorCheck]:
    """A check for the floor and for every row of the spec that has the clause.

    Args:
        slices: name -> its texts, ``all`` among them; those of a sample may lack a slice.
        floor: on all texts.
        specs: the capability spec, by slice.
    """
    rows: dict[str, Clauses] = {**({ALL_CASES: floor} if floor else {}), **specs}
    checks = [
        _check(name, slices.get(name), row.max_bits_per_byte_loss)
        for name, row in rows.items()
        if row.max_bits_per_byte_loss is not None
    ]
    if not rows:
        return checks
    unnamed = {name: texts for name, texts in slices.items() if name not in {ALL_CASES, *specs}}
    return checks + _find_unnamed_losses(unnamed, floor)


def _find_unnamed_losses(slices: Mapping[str, TextPairs], floor: Floor | None) -> list[FloorCheck]:
    """As for answers: significant after Holm's correction, and more than is tolerated."""
    tolerated = max(TOLERATED_LOSS, (floor.max_bits_per_byte_loss or 0.0) if floor else 0.0)
    adjusted = holm([texts.loss_p_value() for texts in slices.values()])
    return [
        FloorCheck(
            clause=UNNAMED_TEXTS,
            slice=name,
            limit=tolerated,
            value=texts.loss(),
            interval=texts.loss_interval(),
            verdict="fail",
        )
        for (name, texts), p_value in zip(slices.items(), adjusted, strict=True)
        if p_value < SIGNIFICANCE and texts.loss() > tolerated
    ]


def _check(name: str, texts: TextPairs | None, limit: float) -> FloorCheck:
    if texts is None or texts.count == 0:
        return FloorCheck(
            clause=CLAUSE,
            slice=name,
            limit=limit,
            value=None,
            interval=None,
            verdict="not measured",
        )
    interval, value = texts.loss_interval(), texts.loss()
    passes, fails = interval.high <= limit, interval.low > limit
    needed = None
    if not passes and not fails:
        half_width = interval.high - value if limit > value else value - interval.low
        if math.isfinite(half_width):
            needed = more_cases_needed(texts.count, half_width, limit - value)
    return FloorCheck(
        clause=CLAUSE,
        slice=name,
        limit=limit,
        value=value,
        interval=interval,
        verdict="pass" if passes else "fail" if fails else "underpowered",
        cases_needed=needed,
    )
