"""Cases whose answer changed, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgedistill.evaluate.score import Answer, Score
from edgedistill.evaluate.statistics import Pairs
from edgedistill.evaluate.suite import Case, ChoiceCase
from edgedistill.results import Flip

SHOWN_FLIPS = 50
SHOWN_CHARACTERS = 1000  # of a flip's prompt, and of each answer


def list_flips(
    cases: Sequence[Case],
    pairs: Pairs,
    reference: Mapping[str, Score],
    artifact: Mapping[str, Score],
) -> list[Flip]:
    """Up to ``SHOWN_FLIPS``: broken before fixed, the heaviest first."""
    flipped = np.flatnonzero(pairs.broken | pairs.fixed).tolist()
    order = sorted(flipped, key=lambda i: (not pairs.broken[i], -pairs.weights[i], cases[i].id))
    return [
        Flip(
            id=cases[i].id,
            prompt=_cut(cases[i].question),
            expected=_cut(cases[i].expected),
            reference_answer=_cut(_given(cases[i], pairs.reference[i], reference)),
            artifact_answer=_cut(_given(cases[i], pairs.artifact[i], artifact)),
            slices=list(cases[i].slices),
            kind="broken" if pairs.broken[i] else "fixed",
        )
        for i in order[:SHOWN_FLIPS]
    ]


def list_choice_flips(cases: Sequence[ChoiceCase], pairs: Pairs) -> list[Flip]:
    """What was chosen stands in the pairs."""
    return list_flips(cases, pairs, {}, {})


def _given(case: Case, chosen: int, scores: Mapping[str, Score]) -> str:
    if isinstance(case, ChoiceCase):
        return case.choices[chosen]
    score = scores[case.id]
    return score.text if isinstance(score, Answer) else ""


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
