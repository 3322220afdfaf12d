"""The artifact beside another answerer than the reference: a teacher, the previous release."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from edgedistill.evaluate.choices import choice_divergence, choice_log_probs
from edgedistill.evaluate.resampled import Figure, effective_weight, estimate, shares_of
from edgedistill.evaluate.score import LogProbs
from edgedistill.evaluate.statistics import Bools, Pairs
from edgedistill.evaluate.suite import ALL_CASES, ChoiceCase
from edgedistill.evaluate.teacher import NO_ANSWER, Answers
from edgedistill.results import Against, Flip, SliceAgainst

ListFlips = Callable[[Sequence[ChoiceCase], Pairs], list[Flip]]


def compare_against(
    name: str,
    kind: Literal["teacher", "previous release"],
    other: Answers,
    cases: Sequence[ChoiceCase],
    scores: Mapping[str, LogProbs],
    list_flips: ListFlips,
) -> Against:
    """The artifact against somebody else's answers, on the cases that both have, by slice.

    Args:
        name: of the other, as people know it.
        kind: what the other is.
        other: its answers; at least one of them to these cases.
        cases: of the kind ``choice``.
        scores: case id -> float64 [choices], the artifact's.
        list_flips: which flips to show, and how.
    """
    common = [case for case in cases if case.id in other.answers]
    pairs = _pair(common, other, scores)
    divergence = _divergences(common, other, scores)
    members = [frozenset(case.slices) for case in common]
    slices = [_slice(ALL_CASES, pairs, divergence)]
    for found in sorted(frozenset[str]().union(*members)):
        inside = np.array([found in member for member in members])
        slices.append(_slice(found, pairs.select(inside), divergence[inside]))
    # A flip shows what the other chose, so one without a choice has nothing to show.
    chose = pairs.reference != NO_ANSWER
    shown = [case for case, has in zip(common, chose, strict=True) if has]
    return Against(
        name=name,
        kind=kind,
        cases=len(common),
        slices=slices,
        flips=list_flips(shown, pairs.select(chose)),
    )


def _pair(cases: Sequence[ChoiceCase], other: Answers, scores: Mapping[str, LogProbs]) -> Pairs:
    """Pairs whose reference is the other; log-scores are not compared and are 0."""
    nothing = np.zeros(len(cases))
    return Pairs(
        weights=np.array([case.importance for case in cases]),
        answers=np.array([case.answer for case in cases]),
        reference=np.array([other.answers[case.id] for case in cases]),
        artifact=np.array([int(scores[case.id].argmax()) for case in cases]),
        reference_loss=nothing,
        artifact_loss=nothing,
    )


def _divergences(
    cases: Sequence[ChoiceCase], other: Answers, scores: Mapping[str, LogProbs]
) -> LogProbs:
    """float64 [n]: KL(other || artifact) in nats; NaN where the other gave no distribution."""
    return np.array(
        [
            choice_divergence(other.log_probs[case.id], choice_log_probs(scores[case.id]))
            if case.id in other.log_probs
            else np.nan
            for case in cases
        ]
    )


def _slice(name: str, pairs: Pairs, divergence: LogProbs) -> SliceAgainst:
    weights = pairs.weights
    known: Bools = ~np.isnan(divergence)
    alike = pairs.reference == pairs.artifact
    return SliceAgainst(
        slice=name,
        cases=pairs.count,
        score=float(np.average(pairs.reference_right, weights=weights)),
        artifact_score=float(np.average(pairs.artifact_right, weights=weights)),
        gain=estimate({"gain": _gain(pairs)})["gain"],
        broken_cases=int(pairs.broken.sum()),
        fixed_cases=int(pairs.fixed.sum()),
        agreement=float(np.average(alike, weights=weights)),
        divergence=float(np.average(divergence[known], weights=weights[known]))
        if known.any()
        else None,
    )


def _gain(pairs: Pairs) -> Figure:
    """The artifact's score minus the other's, with one unseen broken and one unseen fixed case."""
    weights = pairs.weights
    change = pairs.fixed.astype(np.float64) - pairs.broken
    weight = effective_weight(weights)
    return Figure(
        np.stack([weights * change, weights], axis=1),
        lambda sums: shares_of(sums[..., 0], sums[..., 1], 0.0),
        unseen=weight * np.array([[-1.0, 1.0], [1.0, 1.0]]),
    )
