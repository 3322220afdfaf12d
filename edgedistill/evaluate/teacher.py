"""A teacher's recorded answers: JSON lines, read without the teacher.

{"id": "tweets-123", "answer": "good"}                  the text of a choice, or its index
{"id": "tweets-124", "answer": null}                    it gave no valid answer
{"id": "tweets-125", "distribution": [0.1, 0.7, 0.2]}   a share for each choice
{"id": "tweets-126", "log_probs": [-3.1, -0.4, -2.2]}   a line of some ``scores.jsonl``
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.errors import InputError
from edgedistill.evaluate.choices import choice_log_probs
from edgedistill.evaluate.score import LogProbs
from edgedistill.evaluate.suite import ChoiceCase

NO_ANSWER = -1
KEYS = ("answer", "distribution", "log_probs")
HINT = 'a line is {"id": ..., "answer": ...}, or has "distribution" or "log_probs" instead'
SMALLEST_SHARE = 1e-6  # of a recorded distribution: a 0 in it was rounded, not proven


@dataclass(frozen=True)
class Answers:
    """What somebody else answered.

    Attributes:
        answers: case id -> index of the choice; ``NO_ANSWER`` for none of them.
        log_probs: case id -> float64 [choices], normalized, of those with a distribution.
    """

    answers: Mapping[str, int]
    log_probs: Mapping[str, LogProbs]


def read_teacher(path: Path, cases: Sequence[ChoiceCase]) -> Answers:
    """The recorded answers to these cases; a teacher may have answered more, or fewer.

    Raises:
        InputError: the file is missing or damaged, an answer does not fit its case, a case was
            answered twice, or none of the cases was answered.
    """
    known = {case.id: case for case in cases}
    seen: set[str] = set()
    answers: dict[str, int] = {}
    log_probs: dict[str, LogProbs] = {}
    for where, entry in _entries(path):
        case_id = entry["id"]
        if case_id in seen:
            raise InputError(f"case {case_id} was answered before", where=where)
        seen.add(case_id)
        if case_id not in known:
            continue
        if "answer" in entry:
            answers[case_id] = _index(entry["answer"], known[case_id], where)
        else:
            log_probs[case_id] = _distribution(entry, known[case_id], where)
            answers[case_id] = int(log_probs[case_id].argmax())
    if not answers:
        raise InputError(
            "answers no case of the suite", where=str(path), hint="ids must be the suite's"
        )
    return Answers(answers, log_probs)


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start})", where=str(path)) from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("is not JSON", where=where, hint=HINT) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise InputError("is not an object with an id", where=where, hint=HINT)
        if sum(key in entry for key in KEYS) != 1:
            raise InputError(f"has not one of {', '.join(KEYS)}", where=where, hint=HINT)
        entries.append((where, entry))
    return entries


def _index(answer: Any, case: ChoiceCase, where: str) -> int:
    if answer is None:
        return NO_ANSWER
    if isinstance(answer, str) and answer in case.choices:
        return case.choices.index(answer)
    if type(answer) is int and 0 <= answer < len(case.choices):
        return answer
    raise InputError(
        f"answer = {json.dumps(answer)[:60]} is none of {list(case.choices)}, nor the index of one",
        where=where,
        hint="write null where the teacher chose none of them",
    )


def _distribution(entry: dict[str, Any], case: ChoiceCase, where: str) -> LogProbs:
    key = "distribution" if "distribution" in entry else "log_probs"
    values = entry[key]
    numbers = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    )
    if not numbers or len(values) != len(case.choices):
        raise InputError(f"{key} has not {len(case.choices)} numbers", where=where, hint=HINT)
    try:
        row = np.array(values, dtype=np.float64)
    except OverflowError as error:
        raise InputError(f"{key} has a number that is too large", where=where) from error
    if not np.isfinite(row).all() or (key == "distribution" and (row.min() < 0 or row.sum() <= 0)):
        raise InputError(f"{key} = {values} is no distribution", where=where, hint=HINT)
    if key == "distribution":
        row = np.log(np.maximum(row / row.sum(), SMALLEST_SHARE))
    return choice_log_probs(row)
