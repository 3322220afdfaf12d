"""Pairs of answers for the tests of statistics: drawn with known chances, judged by nobody yet."""

from __future__ import annotations

import numpy as np

from edgedistill.evaluate.statistics import Pairs

Rng = np.random.Generator


def draw_pairs(
    rng: Rng,
    cases: int,
    *,
    broken: float,
    fixed: float,
    right: float = 0.6,
    rise: float = 0.0,
    rise_sd: float = 0.25,
    weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None,
) -> Pairs:
    """Pairs of which the reference has a share ``right``, and the artifact breaks and fixes.

    Args:
        rng: draws.
        cases: how many.
        broken: chance that a right answer breaks; ``fixed`` that a wrong one is fixed.
        right: chance that the reference is right.
        rise: mean of the cross-entropy's rise in nats, ``rise_sd`` its standard deviation.
        weights: float64 [cases]; None for equal ones.
    """
    reference = rng.random(cases) < right
    kept = np.where(reference, rng.random(cases) >= broken, rng.random(cases) < fixed)
    loss = rng.gamma(2.0, 0.4, cases) + 1.0
    return Pairs(
        weights=np.ones(cases) if weights is None else weights,
        answers=np.zeros(cases, dtype=np.int64),
        reference=1 - reference.astype(np.int64),
        artifact=1 - kept.astype(np.int64),
        reference_loss=loss,
        artifact_loss=np.maximum(loss + rng.normal(rise, rise_sd, cases), 0.0),
    )


def draw_weights(rng: Rng, cases: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Weights between 0.25 and 1.9, as the demo's suite has them."""
    return rng.uniform(0.25, 1.9, cases)
