"""Which fields of a JSON answer are lost: the F1 of each, over all cases that ask for fields."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from edgedistill.evaluate.grade import ItemCounts, count_items
from edgedistill.evaluate.score import Answer, Score
from edgedistill.evaluate.suite import Case, GenerateCase
from edgedistill.results import FieldQuality


def measure_fields(
    cases: Sequence[Case], reference: Mapping[str, Score], artifact: Mapping[str, Score]
) -> list[FieldQuality]:
    """Every field that a case expects, by name; fields that models made up count in the grade only.

    A field's F1 is 2 TP / (2 TP + FP + FN) over the items of all cases, each case with its weight.
    """
    asked = [c for c in cases if isinstance(c, GenerateCase) and c.json_fields is not None]
    ours, theirs = _count(asked, artifact), _count(asked, reference)
    return [
        FieldQuality(
            field=name,
            cases=len(ours[name]),
            f1=_weighted_f1(ours[name]),
            reference_f1=_weighted_f1(theirs[name]),
        )
        for name in sorted(set(ours) & set(theirs))
        if any(c.right + c.missed for _, c in ours[name])
    ]


def _count(
    cases: Sequence[GenerateCase], scores: Mapping[str, Score]
) -> dict[str, list[tuple[float, ItemCounts]]]:
    """Field -> weight and counts of each case that expects it or whose answer gives it."""
    found: dict[str, list[tuple[float, ItemCounts]]] = defaultdict(list)
    for case in cases:
        score = scores[case.id]
        if isinstance(score, Answer) and case.json_fields is not None:
            for name, counts in count_items(case.json_fields, score.text).items():
                found[name].append((case.importance, counts))
    return found


def _weighted_f1(counts: Sequence[tuple[float, ItemCounts]]) -> float:
    right = sum(weight * c.right for weight, c in counts)
    errors = sum(weight * (c.wrong + c.missed) for weight, c in counts)
    return 2 * right / (2 * right + errors)
