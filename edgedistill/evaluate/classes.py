"""What became of each answer: precision, recall and F1, reference against artifact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgedistill.choice_results import ClassChange, ClassFigures
from edgedistill.evaluate.resampled import Figure, effective_weight, estimate, shares_of
from edgedistill.evaluate.statistics import Floats
from edgedistill.evaluate.suite import ChoiceCase

MAX_CLASSES = 30

Indices = npt.NDArray[np.int64]


def class_changes(
    cases: Sequence[ChoiceCase], reference: Indices, artifact: Indices
) -> list[ClassChange]:
    """One entry for each answer of a suite, in the order in which the choices name them.

    A class is the text of a choice.  A suite with more than ``MAX_CLASSES`` different choices asks
    open questions, whose answers form no classes: the list is empty.

    Args:
        cases: n of the kind ``choice``, at least one.
        reference: int64 [n], index of the reference's choice; ``artifact`` likewise.
    """
    names = list(dict.fromkeys(choice for case in cases for choice in case.choices))
    if len(names) > MAX_CLASSES:
        return []
    weights = np.array([case.importance for case in cases])
    true = np.array([names.index(case.choices[case.answer]) for case in cases])
    own = np.array([names.index(c.choices[i]) for c, i in zip(cases, reference, strict=True)])
    other = np.array([names.index(c.choices[i]) for c, i in zip(cases, artifact, strict=True)])
    tables = {
        kind: _table(true == kind, own == kind, other == kind, weights)
        for kind in range(len(names))
        if np.any((true == kind) | (own == kind) | (other == kind))
    }
    unseen = _unseen_flips(effective_weight(weights))
    changes = estimate(
        {names[kind]: Figure(table, _f1_change, unseen) for kind, table in tables.items()}
    )
    return [
        ClassChange(
            answer=names[kind],
            cases=int((true == kind).sum()),
            reference=_figures(*table[:, [0, 1, 2]].sum(axis=0)),
            artifact=_figures(*table[:, [0, 3, 4]].sum(axis=0)),
            f1_change=changes[names[kind]],
        )
        for kind, table in tables.items()
    ]


def _table(
    true: npt.NDArray[np.bool_],
    own: npt.NDArray[np.bool_],
    other: npt.NDArray[np.bool_],
    weights: Floats,
) -> Floats:
    """float64 [n, 5]: weights of true, of the reference's answers and hits, of the artifact's."""
    columns = np.stack([true, own, own & true, other, other & true], axis=1)
    weighted: Floats = columns * weights[:, None]
    return weighted


def _unseen_flips(weight: float) -> Floats:
    """One case of the class that only the reference finds, one that only the artifact finds."""
    return weight * np.array([[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 1.0]])


def _f1_change(sums: Floats) -> Floats:
    true, own, own_hits, other, other_hits = np.moveaxis(sums, -1, 0)
    after = shares_of(2.0 * other_hits, true + other, 0.0)
    return after - shares_of(2.0 * own_hits, true + own, 0.0)


def _figures(true: float, answered: float, hits: float) -> ClassFigures:
    return ClassFigures(
        precision=float(hits / answered) if answered > 0.0 else None,
        recall=float(hits / true) if true > 0.0 else None,
        f1=float(2.0 * hits / (true + answered)) if true + answered > 0.0 else 0.0,
    )
