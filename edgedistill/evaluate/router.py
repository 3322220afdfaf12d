"""When may the app trust the artifact: a threshold on confidence, fitted and then checked.

Answers below the threshold are sent elsewhere (a larger model, a person).  The threshold is the
one that keeps most traffic on the device at the wanted accuracy, read off the risk-coverage curve
(El-Yaniv and Wiener 2010; Geifman and El-Yaniv 2017, arXiv 1705.08500) of one half of the cases.
Chosen to fit, it flatters there; what is reported comes from the other half.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgedistill.choice_results import Router, RouterPoint
from edgedistill.document import Estimate
from edgedistill.evaluate.choices import choice_log_probs
from edgedistill.evaluate.resampled import Figure, effective_weight, estimate, shares_of
from edgedistill.evaluate.score import LogProbs
from edgedistill.evaluate.statistics import Bools, Floats
from edgedistill.evaluate.suite import ChoiceCase

QUEUE_FILE = "queue.jsonl"
CONFIDENCE_TEXT = "largest probability of the softmax over the scores of the choices"
LEAST_KEPT = 30  # cases: a threshold that rests on fewer is an accident
STEPS = 10_000  # thresholds are rounded down to so many a unit
CURVE_SHARES = tuple(round(0.05 * k, 2) for k in range(1, 21))


class _Curve(NamedTuple):
    """Risk against coverage; all arrays are [m], by falling threshold, equal confidences as one."""

    threshold: Floats
    kept: Floats
    accuracy: Floats
    cases: Floats


def fit_router(
    cases: Sequence[ChoiceCase],
    confidence: Floats,
    right: Bools,
    *,
    target_accuracy: float,
    runtime: str,
) -> Router:
    """The threshold from one half of the cases, and what it does on the other.

    Args:
        cases: n of the kind ``choice``.
        confidence: float64 [n], the artifact's; ``right`` bool [n], whether it answers right.
        target_accuracy: weighted share of right answers among those that stay on the device.
        runtime: that scored the artifact.
    """
    weights = np.array([case.importance for case in cases])
    fitted = fitting_half(cases)
    threshold = _fit(confidence[fitted], right[fitted], weights[fitted], target_accuracy)
    rest = ~fitted
    confidence, right, weights = confidence[rest], right[rest], weights[rest]
    stays = confidence >= threshold if threshold is not None else np.zeros(len(weights), bool)
    found = _measure(stays, right, weights) if len(weights) and threshold is not None else {}
    leaves = ~stays
    return Router(
        target_accuracy=target_accuracy,
        confidence=CONFIDENCE_TEXT,
        runtime=runtime,
        threshold=threshold,
        cases_fitted=int(fitted.sum()),
        cases_reported=len(weights),
        kept=found.get("kept"),
        accuracy=found.get("accuracy") if stays.any() else None,
        accuracy_elsewhere=float(np.average(right[leaves], weights=weights[leaves]))
        if leaves.any()
        else None,
        curve=_points(confidence, right, weights),
    )


def fitting_half(cases: Sequence[ChoiceCase]) -> Bools:
    """Which cases the threshold is fitted on: bool [n].

    Cases of the same slices and the same answer are ordered by a hash of their ids and taken in
    turns, so the halves are alike, every run makes the same ones, and a case that is added moves
    none of another stratum.
    """
    strata: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for i, case in enumerate(cases):
        strata.setdefault((case.slices, case.answer), []).append(i)
    fitted = np.zeros(len(cases), dtype=np.bool_)
    for stratum, members in strata.items():
        members.sort(key=lambda i: _hash(cases[i].id))
        # Which half gets the odd case of a stratum is a matter of chance too.
        fitted[members[_hash(repr(stratum)) % 2 :: 2]] = True
    return fitted


def write_queue(
    cases: Sequence[ChoiceCase], scores: Mapping[str, LogProbs], threshold: float, out: Path
) -> int:
    """Collect the cases that the artifact is less sure of than ``threshold``, for healing.

    Writes JSON lines in the form of a suite, the least sure first; with none, an empty file.
    Whatever is trained on cases of a suite must leave that suite.

    Args:
        cases: of the kind ``choice``.
        scores: case id -> float64 [choices], the artifact's.
        threshold: of a :class:`Router`.
        out: replaced as a whole.

    Returns:
        The number of cases.
    """
    sure = {case.id: float(np.exp(choice_log_probs(scores[case.id]).max())) for case in cases}
    queue = sorted((c for c in cases if sure[c.id] < threshold), key=lambda c: (sure[c.id], c.id))
    aside = out.with_name(f".{out.name}.new")
    lines = (case.model_dump_json(exclude_defaults=True) + "\n" for case in queue)
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(out)
    return len(queue)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _curve(confidence: Floats, right: Bools, weights: Floats) -> _Curve:
    order = np.argsort(-confidence, kind="stable")
    values, mass = confidence[order], weights[order]
    kept = np.cumsum(mass)
    # Equal confidences stay or leave together.
    last = np.append(values[:-1] > values[1:], True)
    return _Curve(
        threshold=values[last],
        kept=kept[last] / kept[-1],
        accuracy=(np.cumsum(mass * right[order]) / kept)[last],
        cases=np.arange(1.0, len(values) + 1.0)[last],
    )


def _fit(confidence: Floats, right: Bools, weights: Floats, target: float) -> float | None:
    if not len(weights):
        return None
    curve = _curve(confidence, right, weights)
    # A sum of weights may miss a target that it meets by its last bit.
    reaches = (curve.accuracy >= target - 1e-12) & (curve.cases >= LEAST_KEPT)
    if not reaches.any():
        return None
    chosen = int(np.flatnonzero(reaches)[-1])
    if chosen == len(curve.kept) - 1:
        return 0.0  # everything may stay, the less confident cases that are to come too
    return math.floor(float(curve.threshold[chosen]) * STEPS) / STEPS


def _measure(stays: Bools, right: Bools, weights: Floats) -> dict[str, Estimate]:
    """Share kept and accuracy of what is kept, with intervals."""
    kept = Figure(
        np.stack([weights * stays, weights], axis=1),
        lambda sums: shares_of(sums[..., 0], sums[..., 1], 0.0),
    )
    weight = effective_weight(weights)
    accuracy = Figure(
        np.stack([weights * (stays & right), weights * stays], axis=1),
        lambda sums: shares_of(sums[..., 0], sums[..., 1], 0.0),
        unseen=weight * np.array([[1.0, 1.0], [0.0, 1.0]]),
    )
    return estimate({"kept": kept, "accuracy": accuracy})


def _points(confidence: Floats, right: Bools, weights: Floats) -> list[RouterPoint]:
    if not len(weights):
        return []
    curve = _curve(confidence, right, weights)
    at = np.searchsorted(curve.kept, np.array(CURVE_SHARES) - 1e-9)
    chosen = np.unique(np.minimum(at, len(curve.kept) - 1))
    return [
        RouterPoint(
            threshold=float(curve.threshold[i]),
            kept=float(curve.kept[i]),
            accuracy=float(curve.accuracy[i]),
        )
        for i in chosen
    ]
