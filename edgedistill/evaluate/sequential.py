"""Intervals and p-values that hold however early one stops looking.

Somebody bets, case after case, that a figure lies above a limit, and can never lose more than
there is.  If it does not lie above, the capital is a supermartingale and reaches 1 / level with a
chance of at most ``level``, at whatever moment one looks (Ville's inequality).  What no capital
could be made against is the interval: a confidence sequence.  The stakes are a mixture of constant
ones, so nothing has to be tuned (Waudby-Smith and Ramdas 2023, "Estimating means of bounded random
variables by betting", JRSS B 86; the diversified Kelly bets of its section 5).

A figure is a ratio of sums over cases, so "figure > m" says that the mean of value - m * base is
positive; that mean is what is bet on, and weights need no approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgedistill.evaluate.capabilities import SIGNIFICANCE, Measured
from edgedistill.evaluate.statistics import Floats, Ints, Pairs, Shares, shares, summands
from edgedistill.results import Interval

# Of the chance of an error, so much is spent while looking, and the rest on the last look at all
# cases, whose number is fixed.
EARLY_LEVEL = 0.01
FINAL_LEVEL = SIGNIFICANCE - EARLY_LEVEL

STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.8])  # shares of the most that may be staked
SMALLEST_REACH = 0.05  # a case that can hardly lose would allow stakes without end
# A case's cross-entropy is taken to rise by at most so many nats: the one thing that has no bound.
LARGEST_RISE = 3.0
LARGEST_RETENTION = 10.0  # where the search for the end of an interval stops
BISECTIONS = 24


@dataclass(frozen=True)
class Bounds:
    """What is known of a slice before the artifact answers.

    Attributes:
        largest_weight: of its cases.
        largest_loss: cross-entropy of the reference, in nats; the artifact cannot fall further.
    """

    largest_weight: float
    largest_loss: float


@dataclass(frozen=True)
class Ratio:
    """A figure: sum(values) / sum(bases), both float64 [n] and times the weight of their case.

    Attributes:
        lowest, highest: that value / base can be in a case.
        unbased: the largest value of a case without a base, weights aside.
        end: where the search for the end of the interval begins; None for ``highest``.
        bounded: False where a case went beyond ``highest`` and was cut there.
    """

    values: Floats
    bases: Floats
    lowest: float
    highest: float
    unbased: float = 0.0
    end: float | None = None
    bounded: bool = True

    def above(self, limit: float) -> tuple[Floats, float]:
        """Gains of a bet on "the figure is above", and the most that a case of weight 1 loses."""
        return self.values - limit * self.bases, limit - self.lowest

    def below(self, limit: float) -> tuple[Floats, float]:
        """The same for "the figure is below"."""
        return limit * self.bases - self.values, max(self.highest - limit, self.unbased)


def measure_anytime(pairs: Pairs, bounds: Bounds, looks: Sequence[int]) -> Measured:
    """What can be said of a slice while its cases are still being scored.

    Args:
        pairs: of the cases so far, in the order in which they were scored.
        bounds: of all cases of the slice.
        looks: how many of the pairs there were whenever somebody looked, this time included.
    """
    ratios = _ratios(pairs, bounds)
    if not pairs.is_choice.any():
        del ratios["log_score_loss"]
    bettor = _Bettor(np.asarray(looks), bounds.largest_weight)
    values = shares(pairs)
    intervals = _Intervals(bettor, ratios, values)
    capital = bettor.log_capital(*ratios["score_loss"].above(0.0))
    p_value = math.exp(-max(0.0, capital))
    return Measured(pairs, values, intervals, p_value, EARLY_LEVEL, early=True)


def _ratios(pairs: Pairs, bounds: Bounds) -> dict[str, Ratio]:
    """By field of :class:`statistics.Shares`."""
    columns = summands(pairs)
    total, right, reference_right, broken, log_total, rise = columns.T
    highest_rise = LARGEST_RISE * log_total
    return {
        "score": Ratio(right, total, 0.0, 1.0),
        "reference_score": Ratio(reference_right, total, 0.0, 1.0),
        "retention": Ratio(right, reference_right, 0.0, 1.0, unbased=1.0, end=LARGEST_RETENTION),
        "broken": Ratio(broken, reference_right, 0.0, 1.0),
        "score_loss": Ratio(reference_right - right, total, -1.0, 1.0),
        "log_score_loss": Ratio(
            np.minimum(rise, highest_rise),
            log_total,
            -bounds.largest_loss,
            LARGEST_RISE,
            bounded=bool((rise <= highest_rise).all()),
        ),
    }


class _Bettor:
    def __init__(self, looks: Ints, largest_weight: float) -> None:
        self._looks = looks
        self._largest_weight = largest_weight

    def log_capital(self, gains: Floats, reach: float) -> float:
        """The logarithm of the largest capital at any look.

        Args:
            gains: float64 [n], with a mean of at most 0 unless the bet is right.
            reach: the most that a case of weight 1 loses.
        """
        most = self._largest_weight * max(reach, SMALLEST_REACH)
        # The largest possible loss leaves a fifth of the capital: 0.8 is the boldest stake.
        growth = np.log1p(gains[:, None] * (STAKES / most))
        sums = np.vstack([np.zeros(len(STAKES)), np.cumsum(growth, axis=0)])[self._looks]
        largest = sums.max(axis=1)
        capitals = largest + np.log(np.exp(sums - largest[:, None]).mean(axis=1))
        return float(capitals.max())

    def interval(self, ratio: Ratio, point: float) -> Interval:
        """All values of the figure that no bet has made 1 / level against, up to now."""
        needed = -math.log(EARLY_LEVEL)
        low = _last_true(lambda m: self.log_capital(*ratio.above(m)) >= needed, ratio.lowest, point)
        high = math.inf
        if ratio.bounded:
            end = ratio.highest if ratio.end is None else ratio.end
            high = _last_true(lambda m: self.log_capital(*ratio.below(m)) >= needed, end, point)
        return Interval(low=min(low, point), high=max(high, point))


class _Intervals(Mapping[str, Interval]):
    """The intervals that somebody asks for; each takes a search."""

    def __init__(self, bettor: _Bettor, ratios: Mapping[str, Ratio], values: Shares) -> None:
        self._bettor = bettor
        self._ratios = ratios
        self._values = values
        self._found: dict[str, Interval] = {}

    def __getitem__(self, name: str) -> Interval:
        if name not in self._found:
            point = float(getattr(self._values, name))
            self._found[name] = self._bettor.interval(self._ratios[name], point)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ratios)

    def __len__(self) -> int:
        return len(self._ratios)


def _last_true(holds: Callable[[float], bool], start: float, end: float) -> float:
    """The last place on the way from ``start`` to ``end`` at which ``holds``; else ``start``.

    Whatever can be shown of a limit can be shown of every limit that is further out, so halving
    finds the place.
    """
    for _ in range(BISECTIONS):
        middle = (start + end) / 2.0
        if holds(middle):
            start = middle
        else:
            end = middle
    return start
