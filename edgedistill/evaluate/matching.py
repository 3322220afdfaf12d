"""Scores that belong to a suite, and a spec that it can be held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgedistill.errors import InputError
from edgedistill.evaluate.score import SCORES_FILE, Answer, Score, TextBits
from edgedistill.evaluate.suite import ALL_CASES, Case, ChoiceCase, TextCase
from edgedistill.floor import Clauses, Floor, SliceSpec

SCORE_AGAIN = "score this suite again: it is not the one that was scored"
LOG_SCORE = "max_log_score_loss"
_SCORE_OF_KIND = {"choice": np.ndarray, "generate": Answer, "text": TextBits}


def match_scores(cases: Sequence[Case], scores: Mapping[str, Score], directory: Path) -> list[Case]:
    """The cases that were scored, in suite order.

    Raises:
        InputError: a score is of no case, or of another kind of case; there is none.
    """
    where = str(directory / SCORES_FILE)
    unknown = sorted(set(scores) - {case.id for case in cases})
    if unknown or not scores:
        what = f"case {unknown[0]} is not in the suite" if unknown else "holds no case"
        raise InputError(what, where=where, hint=SCORE_AGAIN)
    scored = [case for case in cases if case.id in scores]
    _check_kinds(scored, scores, where)
    return scored


def match_reference(cases: Sequence[Case], scores: Mapping[str, Score], directory: Path) -> None:
    """Make sure that the reference scored these cases.

    Raises:
        InputError: one of them is missing, is of another kind, or has other choices.
    """
    where = str(directory / SCORES_FILE)
    missing = [case.id for case in cases if case.id not in scores]
    if missing:
        raise InputError(
            f"case {missing[0]} was not scored by the reference", where=where, hint=SCORE_AGAIN
        )
    _check_kinds(cases, scores, where)


def _check_kinds(cases: Sequence[Case], scores: Mapping[str, Score], where: str) -> None:
    """Every score is of its case's kind, and of as many choices."""
    for case in cases:
        score, problem = scores[case.id], None
        if not isinstance(score, _SCORE_OF_KIND[case.kind]):
            problem = f"was not scored as a case of the kind {case.kind!r}"
        elif isinstance(score, np.ndarray) and len(score) != _choices(case):
            problem = f"has {len(score)} scores for {_choices(case)} choices"
        if problem:
            raise InputError(f"case {case.id} {problem}", where=where, hint=SCORE_AGAIN)


def _choices(case: Case) -> int:
    return len(case.choices) if isinstance(case, ChoiceCase) else 0


def check_slices(cases: Sequence[Case], slices: Mapping[str, SliceSpec]) -> None:
    """Make sure that the suite has every slice that the capability spec names.

    Raises:
        InputError: it lacks one.
    """
    known = {name for case in cases for name in case.slices}
    missing = sorted(set(slices) - known)
    if missing:
        raise InputError(
            f"no case of the suite is in the slice {missing[0]!r}",
            hint=f"the suite has {', '.join(sorted(known)) or 'no slices'}",
        )


def check_clauses_fit(
    suite: Sequence[Case], floor: Floor | None, slices: Mapping[str, SliceSpec]
) -> None:
    """A clause on a figure that no case can give is a mistake, not a pass.

    Raises:
        InputError: there is one.
    """
    rows: dict[str, Clauses] = {**({ALL_CASES: floor} if floor else {}), **slices}
    for name, row in rows.items():
        kinds = {type(case) for case in suite if name in (ALL_CASES, *case.slices)}
        answered = kinds - {TextCase}
        chosen = ChoiceCase in kinds
        unfit = [c for c in row.limits() if not answered or (c == LOG_SCORE and not chosen)]
        if unfit:
            raise InputError(
                f"{unfit[0]} is held on {name!r}, where no case gives it",
                hint="choices give a log-score, choices and answers a score, texts bits per byte",
            )
