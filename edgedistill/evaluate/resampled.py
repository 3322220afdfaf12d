"""Figures that follow from weighted sums over cases, with intervals from one shared bootstrap.

Everything that is said of one set of cases is resampled together, both models at once, so figures
are paired and cost one set of draws.  :mod:`statistics` has the bootstrap itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgedistill.document import Estimate, Interval
from edgedistill.evaluate.statistics import CONFIDENCE, Floats, bootstrap_sums


@dataclass(frozen=True)
class Figure:
    """A figure as a function of sums.

    Attributes:
        columns: float64 [n, k], the summands of each of n cases.
        value: sums float64 [..., k] -> the figure, float64 [...].
        unseen: float64 [m, k], m at most 2: events that are added when resampling, because a
            bootstrap cannot see what has not happened; None adds nothing.
        centred: take the bootstrap's own bias off the interval.  A sum of absolute values is
            larger in every resample, by the noise that resampling adds.
    """

    columns: Floats
    value: Callable[[Floats], Floats]
    unseen: Floats | None = None
    centred: bool = False


def estimate(figures: Mapping[str, Figure]) -> dict[str, Estimate]:
    """Each figure on the cases as they are, with its 95% interval.

    Args:
        figures: name -> figure; all of the same n cases, at least one.
    """
    blocks = [_with_unseen(figure) for figure in figures.values()]
    resampled = bootstrap_sums(np.concatenate(blocks, axis=1))
    ends = np.cumsum([block.shape[1] for block in blocks])[:-1]
    parts = np.split(resampled, ends, axis=1)
    return {
        name: _estimate(figure, part)
        for (name, figure), part in zip(figures.items(), parts, strict=True)
    }


def shares_of(numerators: Floats, denominators: Floats, otherwise: float) -> Floats:
    """Quotients; ``otherwise`` where the denominator is not above 0."""
    safe = np.where(denominators > 0.0, denominators, 1.0)
    return np.where(denominators > 0.0, numerators / safe, otherwise)


def effective_weight(weights: Floats) -> float:
    """The weight of an event that is met in proportion to traffic: sum(w^2) / sum(w)."""
    return float((weights**2).sum() / weights.sum())


def effective_cases(weights: Floats) -> float:
    """How many cases of equal weight say as much: sum(w)^2 / sum(w^2) (Kish 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _with_unseen(figure: Figure) -> Floats:
    """float64 [n + 2, k]; a figure without unseen events gets rows that add nothing."""
    rows = np.zeros((2, figure.columns.shape[1]))
    if figure.unseen is not None:
        rows[: len(figure.unseen)] = figure.unseen
    return np.concatenate([figure.columns, rows])


def _estimate(figure: Figure, resampled: Floats) -> Estimate:
    point = float(figure.value(figure.columns.sum(axis=0)))
    values = figure.value(resampled)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    if figure.centred:
        bias = float(values.mean()) - point
        low, high = low - bias, high - bias
    interval = Interval(low=min(float(low), point), high=max(float(high), point))
    return Estimate(value=point, interval=interval)
