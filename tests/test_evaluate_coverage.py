"""Intervals and p-values against computations that share no code with them, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgedistill.evaluate import statistics
from edgedistill.evaluate.statistics import loss_p_value, share_intervals, shares
from tests.pairs import draw_pairs, draw_weights

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_intervals_equal_scipys_paired_bootstrap(weighted: bool) -> None:
    rng = np.random.default_rng(17)
    weights = draw_weights(rng, 3000) if weighted else None
    pairs = draw_pairs(rng, 3000, broken=0.06, fixed=0.05, weights=weights)
    w = pairs.weights
    columns = (w, w * pairs.artifact_right, w * pairs.reference_right)
    rises = pairs.artifact_loss - pairs.reference_loss
    wanted = {
        "score": lambda t, a, r: a.sum() / t.sum(),
        "retention": lambda t, a, r: a.sum() / r.sum(),
        "score_loss": lambda t, a, r: (r.sum() - a.sum()) / t.sum(),
    }
    found = share_intervals(pairs)
    for name, statistic in wanted.items():
        expected = stats.bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = expected.high - expected.low
        assert found[name].low == pytest.approx(expected.low, abs=0.08 * width)
        assert found[name].high == pytest.approx(expected.high, abs=0.08 * width)
    mean = np.average(rises, weights=w)
    error = math.sqrt(((w * (rises - mean)) ** 2).sum()) / w.sum()  # of a ratio, by linearization
    low, high = stats.norm.interval(0.95, mean, error)
    assert found["log_score_loss"].low == pytest.approx(low, abs=0.08 * (high - low))
    assert found["log_score_loss"].high == pytest.approx(high, abs=0.08 * (high - low))


def test_the_sign_test_equals_scipys_binomial_test() -> None:
    rng = np.random.default_rng(19)
    for cases in (40, 300, 5000):
        pairs = draw_pairs(rng, cases, broken=0.1, fixed=0.1)
        broken, fixed = int(pairs.broken.sum()), int(pairs.fixed.sum())
        expected = stats.binomtest(broken, broken + fixed, 0.5, alternative="greater").pvalue
        assert loss_p_value(pairs) == pytest.approx(expected, rel=1e-9)


def test_far_out_the_weighted_sign_test_stays_above_the_exact_tail() -> None:
    """Where no random pattern is as large, nearly equal weights have the binomial's tail."""
    rng = np.random.default_rng(23)
    pairs = draw_pairs(rng, 400, broken=0.25, fixed=0.0, weights=1.0 + 1e-3 * rng.random(400))
    flips = int(pairs.broken.sum())
    exact, found = 2.0**-flips, loss_p_value(pairs)
    assert exact < found < 1e-8
    normal = stats.norm.sf(math.sqrt(flips))
    assert found == pytest.approx(3.18 * normal, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("confidence", [0.95, 0.97])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_intervals_hold_the_truth_as_often_as_they_say(
    weighted: bool, confidence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng, runs, cases = np.random.default_rng(29), 1000, 400
    truth = {"score": 0.59, "retention": 0.59 / 0.6, "broken": 0.05, "score_loss": 0.01}
    truth["log_score_loss"] = 0.02
    below, above = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for _ in range(runs):
        weights = draw_weights(rng, cases) if weighted else None
        pairs = draw_pairs(rng, cases, broken=0.05, fixed=0.05, rise=0.02, weights=weights)
        intervals = share_intervals(pairs, confidence)
        for name, value in truth.items():
            below[name] += value < intervals[name].low
            above[name] += value > intervals[name].high
    # so many misses on one side have a chance of 0.1%, if the stated share of them is right
    most = int(stats.binom.ppf(0.999, runs, (1.0 - confidence) / 2.0)) + 1
    assert max(*below.values(), *above.values()) <= most, (below, above)
    # nor are they so wide that nothing could ever be decided
    assert sum(below.values()) + sum(above.values()) > 0.25 * (1 - confidence) * runs * len(truth)
    assert float(shares(pairs).reference_score) == pytest.approx(0.6, abs=0.15)
