"""Paired statistics of an artifact and its reference on the same cases.

Shares are weighted by the cases' weights.  Intervals come from a bootstrap over cases (Efron and
Tibshirani, An Introduction to the Bootstrap, chapter 13: percentiles), both models resampled
together, so what they share cancels.  Because a bootstrap cannot see an event that has not
happened yet, one broken and one fixed case are added to the resampled shares: with no flip in n
cases the upper end comes to about 3 / n, as it should.  docs/evaluate.md has the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from edgedistill.results import Interval

CONFIDENCE = 0.95
RESAMPLES = 4000
SIGN_FLIPS = 20_000
COUNTED_PATTERNS = 10  # as many random patterns as large make their share a fair estimate
PINELIS = 3.18
SEED = 20140601
POWER = 0.80
# Quantiles of the normal distribution: two-sided 95%, one-sided 80%.
Z_CONFIDENCE, Z_POWER = 1.959964, 0.841621
SMALLEST_MARGIN = 1e-4  # a measured value this near to its limit counts as this far from it
CHUNK_NUMBERS = 4_000_000  # numbers of one bootstrap chunk: bounds the memory at about 100 MB

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """What two models did on the same n cases; all arrays are [n].

    Attributes:
        weights: positive.
        answers: index of the right choice.
        reference: index of the reference's choice; ``artifact`` likewise.
        reference_loss: cross-entropy of the reference in nats; ``artifact_loss`` likewise.
        reference_grade: how right an answer in the model's own words is, in [0, 1], and NaN where
            the case is a choice, whose other arrays then count; ``artifact_grade`` likewise.
            Left out, all cases are choices.
    """

    weights: Floats
    answers: Ints
    reference: Ints
    artifact: Ints
    reference_loss: Floats
    artifact_loss: Floats
    reference_grade: Floats = field(default_factory=lambda: np.empty(0))
    artifact_grade: Floats = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        for name in ("reference_grade", "artifact_grade"):
            if len(getattr(self, name)) != self.count:
                object.__setattr__(self, name, np.full(self.count, np.nan))

    @property
    def count(self) -> int:
        """The number of cases."""
        return len(self.weights)

    @property
    def is_choice(self) -> Bools:
        """Where the case is a choice."""
        return np.isnan(self.reference_grade)

    @property
    def reference_score(self) -> Floats:
        """How right the reference is, in [0, 1]: 0 or 1 for a choice."""
        right = np.equal(self.reference, self.answers)
        return np.where(self.is_choice, right, self.reference_grade)

    @property
    def artifact_score(self) -> Floats:
        """How right the artifact is, in [0, 1]: 0 or 1 for a choice."""
        right = np.equal(self.artifact, self.answers)
        return np.where(self.is_choice, right, self.artifact_grade)

    @property
    def reference_right(self) -> Bools:
        """Where the reference is wholly right."""
        return np.equal(self.reference_score, 1.0)

    @property
    def artifact_right(self) -> Bools:
        """Where the artifact is wholly right."""
        return np.equal(self.artifact_score, 1.0)

    @property
    def broken(self) -> Bools:
        """Where the artifact is less right than the reference."""
        return self.artifact_score < self.reference_score

    @property
    def fixed(self) -> Bools:
        """Where the artifact is more right than the reference."""
        return self.artifact_score > self.reference_score

    def select(self, chosen: Bools | Ints) -> Pairs:
        """The pairs of some cases, by a mask or by their places."""
        return replace(self, **{name: values[chosen] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Shares:
    """The figures of :class:`Pairs`, or arrays of them over resamples.

    Attributes:
        score: weighted share of right answers of the artifact; ``reference_score`` likewise.
        retention: score / reference_score; 1 where the reference has none right.
        broken: weighted share of the reference's right answers that the artifact gets wrong.
        score_loss: reference_score - score.
        log_score_loss: mean cross-entropy of the artifact minus the reference's, in nats, over
            the choices; 0 where there are none.
    """

    score: Floats
    reference_score: Floats
    retention: Floats
    broken: Floats
    score_loss: Floats
    log_score_loss: Floats


def shares(pairs: Pairs) -> Shares:
    """The figures themselves, as arrays of shape []."""
    return _shares(summands(pairs).sum(axis=0))


def share_intervals(pairs: Pairs, confidence: float = CONFIDENCE) -> dict[str, Interval]:
    """Field of :class:`Shares` -> its interval.  At least one case is needed."""
    columns = np.concatenate([summands(pairs), _unseen_flips(pairs)])
    resampled = _shares(bootstrap_sums(columns))
    observed = shares(pairs)
    tail = (1.0 - confidence) / 2.0
    intervals = {}
    for name, values in vars(resampled).items():
        low, high = np.quantile(values, [tail, 1.0 - tail])
        point = float(getattr(observed, name))
        intervals[name] = Interval(low=min(float(low), point), high=max(float(high), point))
    return intervals


def summands(pairs: Pairs) -> Floats:
    """float64 [n, 6]: what every figure is a ratio of sums of, times the weight of each case.

    Columns: 1, right answer of the artifact, of the reference, broken, 1, rise of the
    cross-entropy.
    """
    weights = pairs.weights
    return np.stack(
        [
            weights,
            weights * pairs.artifact_score,
            weights * pairs.reference_score,
            weights * np.maximum(pairs.reference_score - pairs.artifact_score, 0.0),
            weights * pairs.is_choice,
            weights * (pairs.artifact_loss - pairs.reference_loss),
        ],
        axis=1,
    )


def _unseen_flips(pairs: Pairs) -> Floats:
    """float64 [2, 6]: a broken and a fixed case of the effective weight, without a log-score.

    The weight is sum(w^2) / sum(w): that of a flip which is met in proportion to traffic.
    """
    weight = float((pairs.weights**2).sum() / pairs.weights.sum())
    broken = [weight, 0.0, weight, weight, 0.0, 0.0]
    fixed = [weight, weight, 0.0, 0.0, 0.0, 0.0]
    return np.array([broken, fixed])


def _shares(sums: Floats) -> Shares:
    """From sums of columns, float64 [..., 6]."""
    total, right, reference_right, broken, log_total, loss = np.moveaxis(sums, -1, 0)
    return Shares(
        score=_ratio(right, total, 0.0),
        reference_score=_ratio(reference_right, total, 0.0),
        retention=_ratio(right, reference_right, 1.0),
        broken=_ratio(broken, reference_right, 0.0),
        score_loss=_ratio(reference_right - right, total, 0.0),
        log_score_loss=_ratio(loss, log_total, 0.0),
    )


def _ratio(numerator: Floats, denominator: Floats, otherwise: float) -> Floats:
    safe = np.where(denominator > 0.0, denominator, 1.0)
    return np.where(denominator > 0.0, numerator / safe, otherwise)


def bootstrap_sums(columns: Floats) -> Floats:
    """Sums of the columns over resampled rows: [n, k] -> float64 [RESAMPLES, k]."""
    rng = np.random.default_rng(SEED)
    count = len(columns)
    chunk = max(1, min(RESAMPLES, CHUNK_NUMBERS // count))
    sums = []
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        sums.append(times.astype(np.float64) @ columns)
    return np.concatenate(sums)


def cross_entropy(log_probs: Floats, soft_label: Floats) -> float:
    """Nats: of the softmax over the choices' log-probabilities against the (normalized) label.

    Args:
        log_probs: float64 [choices], of the choices' token sequences.
        soft_label: float64 [choices], non-negative with a positive sum.
    """
    shifted = log_probs - log_probs.max()
    normalized = shifted - np.log(np.exp(shifted).sum())
    return float(-(soft_label / soft_label.sum() * normalized).sum())


def macro_f1(answers: Ints, predictions: Ints, weights: Floats) -> float:
    """Unweighted mean over classes of the weighted F1; classes are those answered or predicted."""
    scores = []
    for kind in np.union1d(answers, predictions):
        true, predicted = answers == kind, predictions == kind
        both = weights[true & predicted].sum()
        scores.append(2.0 * both / (weights[true].sum() + weights[predicted].sum()))
    return float(np.mean(scores))


def loss_p_value(pairs: Pairs) -> float:
    """One-sided p-value of "the artifact loses no right answers", given which cases flipped.

    Were the artifact no worse, each flip would as likely fix as break: the weighted sum of broken
    minus fixed is held against all signs.  With equal weights that is McNemar's exact test.  An
    answer that is right in part counts with the part that changed.
    """
    drops = pairs.reference_score - pairs.artifact_score
    flipped = drops != 0.0
    weights, signs = (pairs.weights * np.abs(drops))[flipped], np.sign(drops[flipped])
    count = len(signs)
    if count == 0:
        return 1.0
    if np.allclose(weights, weights[0]):
        broken = int((signs > 0).sum())
        as_many = sum(math.comb(count, k) for k in range(broken, count + 1))
        return float(as_many / 2**count)
    observed = float(weights @ signs)
    as_large = _patterns_as_large(observed - 1e-9 * float(weights.sum()), weights)
    counted = (1 + as_large) / (1 + SIGN_FLIPS)
    return counted if as_large >= COUNTED_PATTERNS else min(counted, _sign_tail(observed, weights))


def _patterns_as_large(observed: float, weights: Floats) -> int:
    """How many of ``SIGN_FLIPS`` random sign patterns give a sum of at least ``observed``."""
    rng, found = np.random.default_rng(SEED), 0
    chunk = max(1, CHUNK_NUMBERS // len(weights))
    for start in range(0, SIGN_FLIPS, chunk):
        size = (min(chunk, SIGN_FLIPS - start), len(weights))
        signs = 2.0 * rng.integers(2, size=size, dtype=np.int8) - 1.0
        found += int((signs @ weights >= observed).sum())
    return found


def _sign_tail(observed: float, weights: Floats) -> float:
    """An upper bound of the chance of a weighted sum of random signs as large as this.

    Far out, where random patterns show nothing: 3.18 times the normal tail (Pinelis 2012, "An
    asymptotically Gaussian bound on the Rademacher tails", Electronic Journal of Probability 17).
    Without it no slice of very many could be significant after Holm.
    """
    spread = float(np.sqrt((weights**2).sum()))
    return PINELIS * NormalDist().cdf(-observed / spread)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that hold the chance of any false alarm (Holm 1979), in the same order."""
    count, adjusted, largest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def more_cases_needed(cases: int, half_width: float, margin: float) -> int:
    """How many more cases decide with 80% power, if the measured value is the true one.

    Args:
        cases: that gave the interval.
        half_width: from the value to the end of its interval that crosses the limit; it shrinks
            with the square root of the number of cases.
        margin: from the value to the limit, in the same unit.
    """
    widening = (Z_CONFIDENCE + Z_POWER) / Z_CONFIDENCE
    ratio = widening * half_width / max(abs(margin), SMALLEST_MARGIN)
    return max(1, math.ceil(cases * ratio**2) - cases)
