"""From the scores of two models to what they did on the same cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgedistill.evaluate.score import Answer, LogProbs, Score, TextBits
from edgedistill.evaluate.statistics import Floats, Ints, Pairs, cross_entropy
from edgedistill.evaluate.suite import Case, ChoiceCase, TextCase
from edgedistill.evaluate.text_statistics import TextPairs


def pair_scores(
    cases: Sequence[Case], reference: Mapping[str, Score], artifact: Mapping[str, Score]
) -> Pairs:
    """What both models answer, and their cross-entropy, on the same cases; none of them a text.

    The answer to a choice is the one with the largest score, the first of equals.
    """
    ours, theirs = _Answers.of(cases, artifact), _Answers.of(cases, reference)
    return Pairs(
        weights=np.array([case.importance for case in cases]),
        answers=np.array([case.stratum for case in cases], dtype=np.int64),
        reference=theirs.chosen,
        artifact=ours.chosen,
        reference_loss=theirs.losses,
        artifact_loss=ours.losses,
        reference_grade=theirs.grades,
        artifact_grade=ours.grades,
    )


def pair_texts(
    cases: Sequence[TextCase], reference: Mapping[str, Score], artifact: Mapping[str, Score]
) -> TextPairs:
    """The bits per byte of both models on the same texts."""
    return TextPairs(
        weights=np.array([case.importance for case in cases]),
        sizes=np.array([float(case.size_bytes) for case in cases]),
        reference=np.array([s.bits_per_byte for s in _texts(cases, reference)]),
        artifact=np.array([s.bits_per_byte for s in _texts(cases, artifact)]),
    )


def _texts(cases: Sequence[TextCase], scores: Mapping[str, Score]) -> list[TextBits]:
    found = [scores[case.id] for case in cases]
    return [score for score in found if isinstance(score, TextBits)]


@dataclass(frozen=True)
class _Answers:
    """One model's side of :class:`Pairs`."""

    chosen: Ints
    losses: Floats
    grades: Floats

    @classmethod
    def of(cls, cases: Sequence[Case], scores: Mapping[str, Score]) -> _Answers:
        chosen = np.zeros(len(cases), dtype=np.int64)
        losses, grades = np.zeros(len(cases)), np.full(len(cases), np.nan)
        for i, case in enumerate(cases):
            score = scores[case.id]
            if isinstance(score, Answer):
                grades[i] = score.grade
            elif isinstance(case, ChoiceCase) and isinstance(score, np.ndarray):
                chosen[i] = score.argmax()
                losses[i] = cross_entropy(score, _label(case))
        return cls(chosen, losses, grades)


def _label(case: ChoiceCase) -> LogProbs:
    if case.soft_label is not None:
        return np.array(case.soft_label)
    certain = np.zeros(len(case.choices))
    certain[case.answer] = 1.0
    return certain
