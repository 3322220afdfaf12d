"""The floor's verdict: every clause held against the interval of what was measured.

The rules stand in docs/evaluate.md; a change here is a change there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from edgedistill.evaluate.capabilities import (
    Measured,
    check_protected,
    check_sacrificed,
    find_unnamed_losses,
)
from edgedistill.evaluate.statistics import more_cases_needed
from edgedistill.evaluate.suite import ALL_CASES
from edgedistill.floor import Clauses, Floor, SliceSpec
from edgedistill.results import FloorCheck, Verdict

# The other clauses name a least value.
LARGEST_VALUE = {"max_log_score_loss", "max_broken", "max_bits_per_byte_loss"}


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
    checks += [*find_unnamed_losses(unnamed, held), *further]
    return checks, overall_verdict(checks, floor)


def overall_verdict(checks: Iterable[FloorCheck], floor: Floor | None) -> Verdict:
    """One failure fails; what is not decided counts as the floor says."""
    verdicts = {check.verdict for check in checks}
    if "fail" in verdicts:
        return "fail"
    undecided = verdicts & {"underpowered", "not measured"}
    if undecided and (floor or Floor()).when_underpowered == "fail":
        return "underpowered"
    return "pass"


def figure_of(clause: str) -> str:
    """The figure that a clause of the floor limits."""
    return clause.removeprefix("max_")


def _check_spec(name: str, found: Measured | None, spec: SliceSpec) -> list[FloorCheck]:
    if found is None:
        limits = dict(spec.limits())
        if spec.protected:
            limits["protected"] = 0.0
        return [_not_measured(clause, name, limit) for clause, limit in limits.items()]
    checks = _check_clauses(name, found, spec)
    if spec.protected:
        checks.append(check_protected(name, found))
    if spec.sacrificed:
        checks.append(check_sacrificed(name, found, spec))
    return checks


def _check_clauses(name: str, found: Measured, clauses: Clauses) -> list[FloorCheck]:
    return [_check_limit(name, found, c, limit) for c, limit in clauses.limits().items()]


def _check_limit(name: str, found: Measured, clause: str, limit: float) -> FloorCheck:
    figure = figure_of(clause)
    if figure not in found.intervals:
        return _not_measured(clause, name, limit)
    value, interval = found.value(figure), found.intervals[figure]
    if clause in LARGEST_VALUE:
        passes, fails = interval.high <= limit, interval.low > limit
    else:
        passes, fails = interval.low >= limit, interval.high < limit
    needed = None
    # Where sampling stopped early the other clauses are open because one had failed already.
    if not passes and not fails and not found.early:
        half_width = interval.high - value if limit > value else value - interval.low
        needed = more_cases_needed(found.pairs.count, half_width, limit - value)
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
