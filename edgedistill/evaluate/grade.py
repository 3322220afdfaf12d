"""Grade an answer in the model's own words: exact, by a regular expression, or by JSON fields.

The grade is in [0, 1].  JSON fields give the F1 of the case's items, as information extraction is
scored (Chinchor and Sundheim, MUC-5 Evaluation Metrics, 1993): an item is a field with its value,
an element of a list counts as an item of its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgedistill.evaluate.suite import GenerateCase

Item = tuple[str, str, Any]  # dotted path of the field, kind of the value, value


@dataclass(frozen=True)
class ItemCounts:
    """How many items were found, were given but should not have been, and were missed."""

    right: int = 0
    wrong: int = 0
    missed: int = 0

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 1 where there is nothing to find and nothing was given."""
        given = 2 * self.right + self.wrong + self.missed
        return 2 * self.right / given if given else 1.0


def grade_answer(case: GenerateCase, answer: str) -> float:
    """How right an answer is, in [0, 1]; blanks around it do not count."""
    answer = answer.strip()
    if case.json_fields is not None:
        counts = count_items(case.json_fields, answer).values()
        total = ItemCounts(
            sum(c.right for c in counts),
            sum(c.wrong for c in counts),
            sum(c.missed for c in counts),
        )
        return total.f1
    if case.regex is not None:
        return float(re.search(case.regex, answer) is not None)
    return float(answer in {text.strip() for text in case.exact})


def count_items(expected: Mapping[str, Any], answer: str) -> dict[str, ItemCounts]:
    """Field (dotted path) -> its items, of the expected ones and those in the answer.

    Args:
        expected: what the answer's JSON object should hold; a field that is null should be absent
            or null.
        answer: may have other text around the object, of which the first that parses counts.
    """
    wanted = Counter(_items(expected, ""))
    found = Counter(_items(find_json_object(answer), ""))
    paths = dict.fromkeys(item[0] for item in [*wanted, *found])
    return {path: _counts(path, wanted, found) for path in paths}


def _counts(path: str, wanted: Counter[Item], found: Counter[Item]) -> ItemCounts:
    right = sum(n for item, n in (wanted & found).items() if item[0] == path)
    given = sum(n for item, n in found.items() if item[0] == path)
    asked = sum(n for item, n in wanted.items() if item[0] == path)
    return ItemCounts(right, given - right, asked - right)


def find_json_object(answer: str) -> dict[str, Any]:
    """The first JSON object in a text; empty where there is none."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", answer):
        try:
            value, _ = decoder.raw_decode(answer, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def _items(value: Any, path: str) -> Iterator[Item]:
    """The items of a JSON value; null is no item, and an empty object or list has none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _items(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict | list):
                yield path, "json", json.dumps(inner, sort_keys=True)
            else:
                yield from _items(inner, path)
    elif isinstance(value, bool):  # before numbers: True equals 1
        yield path, "flag", value
    elif isinstance(value, int | float):
        yield path, "number", value
    elif isinstance(value, str):
        yield path, "text", value.strip()
