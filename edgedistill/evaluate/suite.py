"""The evaluation suite: JSON lines, one case a line, and a paired sample of it.

A case asks the model to choose.  It carries the right answer, optionally how people were spread
over the choices (``soft_label``), the slices that it belongs to, and a weight that restores the
traffic's mixture when a suite holds more of the hard cases than traffic does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgedistill.errors import InputError

SHOWN_PROBLEMS = 10
ALL_CASES = "all"  # the name under which results report the whole suite
SOFT_LABEL_TOLERANCE = 0.02  # soft labels are commonly written with two or three decimals

Text = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Message(BaseModel):
    """One turn of the conversation that the case puts before the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Case(BaseModel):
    """One question with its choices.

    Attributes:
        answer: index of the right choice.
        soft_label: a share for each choice, summing to 1; None means all of it on ``answer``.
        slices: the groups whose quality is reported and judged on their own.
        weight: how many cases of the traffic this one stands for, up to a common factor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text
    kind: Literal["choice"]
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    choices: Annotated[tuple[Text, ...], Field(min_length=2)]
    answer: Annotated[int, Field(ge=0)]
    soft_label: tuple[NonNegative, ...] | None = None
    slices: tuple[Text, ...] = ()
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        count = len(self.choices)
        if self.answer >= count:
            raise ValueError(f"answer = {self.answer} is not the index of one of {count} choices")
        if len(set(self.choices)) < count:
            raise ValueError(f"choices = {list(self.choices)} repeats a choice")
        if self.soft_label is not None:
            total = sum(self.soft_label)
            if len(self.soft_label) != count or abs(total - 1.0) > SOFT_LABEL_TOLERANCE:
                raise ValueError(
                    f"soft_label has {len(self.soft_label)} shares with the sum {total:.4g}, "
                    f"not {count} with the sum 1"
                )
        if len(set(self.slices)) < len(self.slices) or ALL_CASES in self.slices:
            raise ValueError(f"slices = {list(self.slices)} repeats one, or uses {ALL_CASES!r}")
        return self


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

    The cases are ordered by slices, then answer, then a hash of the id, and taken at equal
    distances (systematic sampling), so every stratum is represented in proportion.  The choice
    depends on nothing but the cases: every artifact gets the same ones.
    """
    if count is None or count >= len(cases):
        return list(cases)
    order = sorted(range(len(cases)), key=lambda i: _stratum(cases[i]))
    taken = sorted(order[(2 * k + 1) * len(cases) // (2 * count)] for k in range(count))
    return [cases[i] for i in taken]


def _stratum(case: Case) -> tuple[tuple[str, ...], int, str]:
    return case.slices, case.answer, hashlib.sha256(case.id.encode()).hexdigest()


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
    kind = fields.get("kind")
    if kind != "choice":
        return InputError(
            f"kind = {json.dumps(kind)} cannot be scored",
            where=where,
            hint='this version scores cases of the kind "choice"',
        )
    try:
        return Case.model_validate_json(line, strict=True)
    except ValidationError as error:
        return _invalid(error, where)


def _invalid(error: ValidationError, where: str) -> InputError:
    """Every wrong key of one line, as one problem."""
    parts, keys = [], sorted(Case.model_fields)
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
