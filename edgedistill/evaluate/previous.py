"""The scores of the previous release: what a build leaves for the next one to compare with.

``<exports>/<recipe>/evaluation/<rung>/<format>/`` holds ``scores.jsonl``, and ``cases.jsonl`` with
a hash of what every case asked, so that a case that was rewritten since is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill.content import sha256_json
from edgedistill.errors import InputError
from edgedistill.evaluate.choices import choice_log_probs
from edgedistill.evaluate.score import SCORES_FILE, log_probs_of, read_scores
from edgedistill.evaluate.suite import Case, ChoiceCase
from edgedistill.evaluate.teacher import Answers

CASES_FILE = "cases.jsonl"
# What may change without another question being asked.
NOT_ASKED = {"id", "answer", "soft_label", "slices", "weight", "value"}


def write_cases(cases: Sequence[Case], out: Path) -> None:
    """Write a line ``{"id": ..., "sha256": ...}`` for each case."""
    lines = (json.dumps({"id": case.id, "sha256": question_sha256(case)}) + "\n" for case in cases)
    out.write_text("".join(lines), encoding="utf-8")


def question_sha256(case: Case) -> str:
    """What a case asks, as 64 hex digits: equal if and only if a model is asked the same."""
    return sha256_json(case.model_dump(mode="json", exclude=NOT_ASKED))


def read_previous(directory: Path, cases: Sequence[ChoiceCase]) -> Answers:
    """What the previous release answered to those of these cases that it was asked alike.

    Args:
        directory: with ``scores.jsonl`` and ``cases.jsonl``.
        cases: of the kind ``choice``.

    Raises:
        InputError: a file is missing or damaged, or no case is common.
    """
    asked = _read_cases(directory / CASES_FILE)
    scores = log_probs_of(read_scores(directory))
    log_probs = {
        case.id: choice_log_probs(scores[case.id])
        for case in cases
        if case.id in scores
        and asked.get(case.id) == question_sha256(case)
        and len(scores[case.id]) == len(case.choices)
    }
    if not log_probs:
        raise InputError(
            "the previous release was asked none of these cases",
            where=str(directory / SCORES_FILE),
            hint="take `previous` out of the recipe, or keep the cases that have not changed",
        )
    return Answers({name: int(row.argmax()) for name, row in log_probs.items()}, log_probs)


def _read_cases(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from error
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry: Any = json.loads(line)
            found[str(entry["id"])] = str(entry["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("is not a line of cases", where=f"{path}:{number}") from error
    return found
