from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from edgedistill.evaluate import statistics
from edgedistill.evaluate.statistics import (
    Pairs,
    cross_entropy,
    holm,
    loss_p_value,
    macro_f1,
    more_cases_needed,
    share_intervals,
    shares,
)

Rng = np.random.Generator


def make_pairs(
    reference_right: list[int], artifact_right: list[int], weights: list[float] | None = None
) -> Pairs:
    """Pairs in which choice 0 is right and 1 is wrong, and both lose nothing."""
    count = len(reference_right)
    zeros = np.zeros(count)
    return Pairs(
        weights=np.array(weights) if weights else np.ones(count),
        answers=np.zeros(count, dtype=np.int64),
        reference=1 - np.array(reference_right),
        artifact=1 - np.array(artifact_right),
        reference_loss=zeros,
        artifact_loss=zeros,
    )


def simulate(rng: Rng, cases: int, broken: float, fixed: float, weighted: bool) -> Pairs:
    """A reference that is right in 60%; the artifact breaks and fixes with given chances."""
    right = rng.random(cases) < 0.6
    kept = np.where(right, rng.random(cases) >= broken, rng.random(cases) < fixed)
    loss = rng.gamma(1.0, 0.3, cases)
    return Pairs(
        weights=rng.gamma(2.0, 0.5, cases) + 0.1 if weighted else np.ones(cases),
        answers=np.zeros(cases, dtype=np.int64),
        reference=1 - right.astype(np.int64),
        artifact=1 - kept.astype(np.int64),
        reference_loss=loss,
        artifact_loss=loss + rng.normal(0.02, 0.2, cases),
    )


def test_weighted_shares_follow_their_definitions() -> None:
    pairs = make_pairs([1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1.0, 2.0, 3.0, 4.0, 5.0])
    found = shares(pairs)
    assert found.score == pytest.approx((1 + 3 + 4) / 15)
    assert found.reference_score == pytest.approx((1 + 2 + 3) / 15)
    assert found.retention == pytest.approx(8 / 6)
    assert found.broken == pytest.approx(2 / 6)
    assert found.score_loss == pytest.approx(-2 / 15)


def test_a_reference_without_right_answers_has_nothing_to_lose() -> None:
    pairs = make_pairs([0, 0, 0], [0, 1, 0])
    assert float(shares(pairs).retention) == 1.0
    assert float(shares(pairs).broken) == 0.0
    assert all(math.isfinite(i.low + i.high) for i in share_intervals(pairs).values())


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize(
    ("cases", "broken", "fixed"),
    [(60, 0.05, 0.05), (400, 0.01, 0.01), (400, 0.0, 0.0), (400, 0.15, 0.1), (1500, 0.004, 0.0)],
)
def test_intervals_cover_the_truth_as_often_as_they_claim(
    cases: int, broken: float, fixed: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    score = 0.6 * (1 - broken) + 0.4 * fixed
    truth = {
        "score": score,
        "retention": score / 0.6,
        "broken": broken,
        "score_loss": 0.6 - score,
        "log_score_loss": 0.02,
    }
    rng, runs = np.random.default_rng(5), 150
    missed = dict.fromkeys(truth, 0)
    for _ in range(runs):
        intervals = share_intervals(simulate(rng, cases, broken, fixed, weighted))
        for name, value in truth.items():
            missed[name] += not intervals[name].low - 1e-9 <= value <= intervals[name].high + 1e-9
    # 5% of 150 are 7.5; 18 or more have a chance of 0.1%; with 60 cases a bootstrap is rough
    assert max(missed.values()) <= (21 if cases == 60 else 17), missed


def test_intervals_are_no_wider_than_the_closed_form() -> None:
    pairs = simulate(np.random.default_rng(2), 4000, 0.1, 0.1, weighted=False)
    intervals, found = share_intervals(pairs), shares(pairs)
    right = float(found.score)
    binomial = 2 * 1.96 * math.sqrt(right * (1 - right) / 4000)
    assert intervals["score"].high - intervals["score"].low == pytest.approx(binomial, rel=0.06)
    # the paired difference: variance of (b - c) / n
    b, c = pairs.broken.mean(), pairs.fixed.mean()
    paired = 2 * 1.96 * math.sqrt((b + c - (b - c) ** 2) / 4000)
    loss = intervals["score_loss"]
    assert loss.high - loss.low == pytest.approx(paired, rel=0.06)
    differences = pairs.artifact_loss - pairs.reference_loss
    log_loss = intervals["log_score_loss"]
    normal = 2 * 1.96 * differences.std() / math.sqrt(4000)
    assert log_loss.high - log_loss.low == pytest.approx(normal, rel=0.06)


def test_no_flip_in_n_cases_leaves_room_for_three_in_n() -> None:
    pairs = make_pairs([1] * 300, [1] * 300)
    intervals = share_intervals(pairs)
    assert intervals["broken"].low == 0.0
    assert 2.5 / 300 < intervals["broken"].high < 4.5 / 300
    assert 1 - 4.5 / 300 < intervals["retention"].low < 1 - 2.5 / 300


def test_intervals_hold_the_value_and_are_the_same_again() -> None:
    pairs = simulate(np.random.default_rng(3), 200, 0.1, 0.05, weighted=True)
    intervals, found = share_intervals(pairs), shares(pairs)
    for name, interval in intervals.items():
        assert interval.low <= float(getattr(found, name)) <= interval.high
    assert share_intervals(pairs) == intervals


def test_chunks_do_not_change_what_an_interval_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = simulate(np.random.default_rng(4), 300, 0.1, 0.05, weighted=True)
    whole = share_intervals(pairs)["retention"]
    monkeypatch.setattr(statistics, "CHUNK_NUMBERS", 1000)
    chunked = share_intervals(pairs)["retention"]
    assert chunked.low == pytest.approx(whole.low, abs=0.005)
    assert chunked.high == pytest.approx(whole.high, abs=0.005)


def test_the_sign_test_is_mcnemars_exact_test_with_equal_weights() -> None:
    broken, fixed, both = 9, 2, 30
    right = [1] * broken + [0] * fixed + [1] * both
    kept = [0] * broken + [1] * fixed + [1] * both
    tail = sum(math.comb(11, k) for k in range(9, 12)) / 2**11
    assert loss_p_value(make_pairs(right, kept)) == pytest.approx(tail)
    assert loss_p_value(make_pairs(right, kept, [2.5] * 41)) == pytest.approx(tail)
    assert loss_p_value(make_pairs(kept, right)) > 0.99
    assert loss_p_value(make_pairs([1, 0], [1, 0])) == 1.0


def test_the_weighted_sign_test_equals_all_sign_patterns() -> None:
    weights = [0.3, 1.0, 2.2, 0.7, 1.6, 0.9, 1.1, 0.4, 1.3, 2.0]
    signs = [1, 1, 1, -1, 1, 1, -1, 1, 1, 1]
    right = [1 if sign > 0 else 0 for sign in signs]
    kept = [1 - value for value in right]
    observed = sum(w * s for w, s in zip(weights, signs, strict=True))
    patterns = list(itertools.product((-1, 1), repeat=10))
    larger = sum(
        sum(w * s for w, s in zip(weights, pattern, strict=True)) >= observed - 1e-9
        for pattern in patterns
    )
    found = loss_p_value(make_pairs(right, kept, weights))
    assert found == pytest.approx(larger / len(patterns), abs=0.004)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_an_unharmed_artifact_is_called_worse_in_five_of_a_hundred(weighted: bool) -> None:
    rng = np.random.default_rng(6)
    # broken 4% of 60% and fixed 6% of 40%: as many of each
    p_values = [loss_p_value(simulate(rng, 600, 0.04, 0.06, weighted)) for _ in range(300)]
    assert 1 <= sum(p < 0.05 for p in p_values) <= 26


def test_holm_adjusts_as_its_definition_says() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_cross_entropy_is_of_the_softmax_over_the_choices() -> None:
    probabilities = np.array([0.1, 0.6, 0.3])
    label = np.array([0.2, 0.5, 0.3])
    expected = -float((label * np.log(probabilities)).sum())
    assert cross_entropy(np.log(probabilities) - 40.0, label) == pytest.approx(expected)
    assert cross_entropy(np.log(probabilities), 2 * label) == pytest.approx(expected)
    assert cross_entropy(np.array([-900.0, -1.0]), np.array([0.0, 1.0])) == pytest.approx(0.0)


def test_macro_f1_is_the_mean_over_the_classes_met() -> None:
    answers, predictions = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 3])
    weights = np.array([1.0, 2.0, 1.0, 1.0, 1.0])
    # class 0: 1 of 3 found, all right; class 1: 2 found of weight 4 predicted; 2 and 3: never
    f1 = [2 * 1 / (3 + 1), 2 * 2 / (2 + 4), 0.0, 0.0]
    assert macro_f1(answers, predictions, weights) == pytest.approx(sum(f1) / 4)
    assert macro_f1(answers, answers, weights) == 1.0


def draw_retention(truth: float) -> Callable[[Rng, int], Pairs]:
    broken = (1 - truth) + 0.04 * 0.4 / 0.6
    return lambda rng, cases: simulate(rng, cases, broken, 0.04, weighted=False)


def test_the_cases_that_are_said_to_be_needed_decide_four_times_in_five(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    draw, limit, rng = draw_retention(truth=1.0), 0.98, np.random.default_rng(7)
    first = [draw(rng, 500) for _ in range(20)]
    half_widths = [float(shares(p).retention) - share_intervals(p)["retention"].low for p in first]
    more = more_cases_needed(500, float(np.median(half_widths)), 1.0 - limit)
    assert more > 500
    decided = sum(
        share_intervals(draw(rng, 500 + more))["retention"].low >= limit for _ in range(40)
    )
    assert 25 <= decided <= 38
    assert more_cases_needed(500, 0.01, 0.0) > 1_000_000
    assert more_cases_needed(500, 0.001, 0.1) == 1
