"""The evaluation suite: JSON lines, one case a line, and a paired sample of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgedistill.errors import InputError
from edgedistill.evaluate.cases import (
    ALL_CASES,
    KINDS,
    Case,
    ChoiceCase,
    GenerateCase,
    Message,
    TextCase,
)

__all__ = [
    "ALL_CASES",
    "SUITE_FILE",
    "Case",
    "ChoiceCase",
    "GenerateCase",
    "Message",
    "TextCase",
    "load_suite",
    "sample_cases",
]

SHOWN_PROBLEMS = 10
SUITE_FILE = "suite.jsonl"  # what a step calls a suite that it writes


def load_suite(paths: Sequence[Path]) -> list[Case]:
    """All cases of the files, in order.

    Raises:
        InputError: everything that is wrong in the files at once (the first ten in words), each
            with file, line, key, value and hint; or the files hold no case.
    """
    cases: list[Case] = []
    problems: list[InputError] = []
    seen: dict[str, str] = {}
    for path in paths:
        for where, line in _lines(path):
            case = _parse(line, where)
            if isinstance(case, InputError):
                problems.append(case)
            elif case.id in seen:
                problems.append(_duplicate(case.id, where, seen[case.id]))
            else:
                seen[case.id] = where
                cases.append(case)
    if problems:
        raise _all_at_once(problems)
    if not cases:
        names = ", ".join(str(path) for path in paths)
        raise InputError("the suite holds no case", where=names, hint="write one case a line")
    return cases


def sample_cases(cases: Sequence[Case], count: int | None) -> list[Case]:
    """A stratified sample of ``count`` cases, in suite order; all of them if that is fewer.

    The cases are ordered by slices, kind, then answer, then a hash of the id, and taken at equal
    distances (systematic sampling), so every stratum is represented in proportion.  The choice
    depends on nothing but the cases: every artifact gets the same ones.
    """
    if count is None or count >= len(cases):
        return list(cases)
    order = sorted(range(len(cases)), key=lambda i: _stratum(cases[i]))
    taken = sorted(order[(2 * k + 1) * len(cases) // (2 * count)] for k in range(count))
    return [cases[i] for i in taken]


def _stratum(case: Case) -> tuple[tuple[str, ...], str, int, str]:
    return case.slices, case.kind, case.stratum, hashlib.sha256(case.id.encode()).hexdigest()


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise InputError(f"the suite cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"the suite is not UTF-8 (byte {error.start})", where=str(path), hint="convert it"
        ) from error
    except ValueError as error:
        raise InputError(f"is no file's name ({error})", where=repr(str(path))) from error


def _parse(line: str, where: str) -> Case | InputError:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "every line is one JSON object, without line breaks inside"
        return InputError(f"is not JSON ({error})", where=where, hint=hint)
    if not isinstance(fields, dict):
        return InputError(f"is {type(fields).__name__}, not a JSON object", where=where)
    if fields.get("draft") is not None:
        return InputError(
            "is a draft that nobody has checked",
            where=where,
            hint="see to what its `draft` key says, complete the case, then remove the key",
        )
    kind = fields.get("kind")
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        return InputError(
            f"kind = {_short(kind)} cannot be scored",
            where=where,
            hint=f"this version scores cases of the kinds {', '.join(KINDS)}",
        )
    try:
        return model.model_validate_json(line, strict=True)
    except ValidationError as error:
        return _invalid(error, where, model)


def _invalid(error: ValidationError, where: str, model: type[Case]) -> InputError:
    """Every wrong key of one line, as one problem."""
    parts, keys = [], sorted(model.model_fields)
    for item in error.errors(include_url=False):
        message = item["msg"].removeprefix("Value error, ")
        if not item["loc"]:
            parts.append(message)
            continue
        key = ".".join(str(part) for part in item["loc"])
        given = "" if item["type"] == "missing" else f" = {_short(item['input'])}"
        parts.append(f"{key}{given}: {message}")
    return InputError("; ".join(parts), where=where, hint=f"a case has the keys {', '.join(keys)}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _duplicate(case_id: str, where: str, first: str) -> InputError:
    return InputError(
        f"id = {json.dumps(case_id)} was given before, at {first}",
        where=where,
        hint="ids are unique over all files of a suite",
    )


def _all_at_once(problems: list[InputError]) -> InputError:
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} in the suite"
    lines = [f"- {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    hidden = len(problems) - len(lines)
    more = [f"- and {hidden} more"] if hidden else []
    return InputError("\n".join([count, *lines, *more]))
