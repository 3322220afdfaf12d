from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import softmax
from scipy.stats import binomtest, entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_fscore_support

from edgedistill.choice_results import ChoiceQuality
from edgedistill.evaluate import statistics
from edgedistill.evaluate.calibration import (
    calibration_figures,
    equal_mass_bins,
    reliability_curve,
    wilson,
)
from edgedistill.evaluate.choices import Choices, weigh_choices
from edgedistill.evaluate.classes import class_changes
from edgedistill.evaluate.describe import describe_slice
from edgedistill.evaluate.resampled import estimate
from tests.choice_suite import CHOICES, Disk, disturb, make_cases, make_scores

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
CASES = 900


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)


def make_choices(
    own: Floats,
    own_right: Bools,
    other: Floats,
    other_right: Bools,
    weights: Floats | None = None,
    divergence: Floats | None = None,
) -> Choices:
    count = len(own)
    return Choices(
        ids=np.array([f"c{i}" for i in range(count)]),
        weights=np.ones(count) if weights is None else weights,
        chance=np.full(count, 0.2),
        reference_right=own_right,
        artifact_right=other_right,
        reference_confidence=own,
        artifact_confidence=other,
        divergence=np.zeros(count) if divergence is None else divergence,
    )


def observed() -> tuple[Choices, list[Floats], list[Floats], Floats, npt.NDArray[np.int64]]:
    """Choices, both models' probabilities by scipy, weights, answers."""
    cases = make_cases(CASES)
    reference = make_scores(cases, 1)
    artifact = disturb(reference, 2)
    return (
        weigh_choices(cases, reference, artifact),
        [softmax(reference[case.id]) for case in cases],
        [softmax(artifact[case.id]) for case in cases],
        np.array([case.weight for case in cases]),
        np.array([case.answer for case in cases]),
    )


def test_confidence_and_divergence_are_of_the_softmax_over_the_choices() -> None:
    choices, own, other, _, answers = observed()
    np.testing.assert_allclose(choices.reference_confidence, [p.max() for p in own])
    np.testing.assert_allclose(choices.artifact_confidence, [p.max() for p in other])
    np.testing.assert_array_equal(choices.artifact_right, [p.argmax() for p in other] == answers)
    expected = [entropy(p, q) for p, q in zip(own, other, strict=True)]
    np.testing.assert_allclose(choices.divergence, expected, atol=1e-12)


def test_the_reliability_curve_is_scikit_learns_without_weights() -> None:
    choices, *_ = observed()
    confidence, right = choices.artifact_confidence, choices.artifact_right
    points = reliability_curve(confidence, right, np.ones(CASES))
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy="quantile")
    np.testing.assert_allclose([p.accuracy.value for p in points], accuracy)
    np.testing.assert_allclose([p.confidence for p in points], mean)
    assert [p.cases for p in points] == [CASES // 15] * 15
    first = points[0]
    share = binomtest(round(first.accuracy.value * first.cases), first.cases)
    judged = share.proportion_ci(method="wilson")
    assert first.accuracy.interval.low == pytest.approx(judged.low, abs=1e-4)
    assert first.accuracy.interval.high == pytest.approx(judged.high, abs=1e-4)


def test_the_error_of_equal_width_bins_is_scikit_learns_without_weights() -> None:
    choices, *_ = observed()
    plain = make_choices(
        choices.reference_confidence,
        choices.reference_right,
        choices.artifact_confidence,
        choices.artifact_right,
    )
    found = describe_slice(plain).calibration
    confidence, right = choices.artifact_confidence, choices.artifact_right
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy="uniform")
    counts, _ = np.histogram(confidence, bins=15, range=(0.0, 1.0))
    expected = float(np.abs(accuracy - mean) @ counts[counts > 0]) / CASES
    assert found.artifact.ece_equal_width == pytest.approx(expected)


def test_weighted_figures_equal_a_plain_computation() -> None:
    choices, own, other, weights, answers = observed()
    found = describe_slice(choices)
    calibration = found.calibration
    for probabilities, stated in ((own, calibration.reference), (other, calibration.artifact)):
        bold = sum(
            w
            for p, w, answer in zip(probabilities, weights, answers, strict=True)
            if p.max() >= 0.9 and p.argmax() != answer
        )
        assert stated.confident_wrong == pytest.approx(bold / weights.sum())
        ranked = sorted(zip(probabilities, weights, answers, strict=True), key=lambda t: t[0].max())
        before, gaps = 0.0, [0.0] * 15
        for p, w, answer in ranked:
            number = int((before + w / 2) / weights.sum() * 15)
            gaps[number] += w * (p.max() - (p.argmax() == answer))
            before += w
        assert stated.ece == pytest.approx(sum(map(abs, gaps)) / weights.sum())
    rise = calibration.artifact.ece - calibration.reference.ece
    assert calibration.ece_rise.value == pytest.approx(rise)
    assert calibration.ece_rise.interval.low <= rise <= calibration.ece_rise.interval.high
    kl = [entropy(p, q) for p, q in zip(own, other, strict=True)]
    assert found.divergence.mean.value == pytest.approx(np.average(kl, weights=weights))
    assert found.divergence.worst_case == f"c0-{int(np.argmax(kl)):05d}"
    assert found.divergence.max == pytest.approx(max(kl))
    beyond = weights[np.array(kl) > found.divergence.p99 + 1e-12].sum()
    reached = weights[np.array(kl) >= found.divergence.p99 - 1e-12].sum()
    assert beyond <= 0.01 * weights.sum() < reached


def test_bins_of_equal_mass_follow_the_weights_and_keep_equals_together() -> None:
    rng = np.random.default_rng(3)
    confidence, weights = rng.uniform(0.2, 1.0, 1000), rng.gamma(0.5, 2.0, 1000)
    masses = np.bincount(equal_mass_bins(confidence, weights), weights=weights)
    assert len(masses) == 15
    assert np.abs(masses - weights.sum() / 15).max() <= 1.001 * weights.max()
    rounded = np.round(confidence, 1)
    bins = equal_mass_bins(rounded, weights)
    assert all(len(set(bins[rounded == value])) == 1 for value in rounded)
    assert set(equal_mass_bins(np.full(500, 0.5), np.ones(500))) == {0}
    assert len(set(equal_mass_bins(confidence[:70], weights[:70]))) <= 3  # small slices: few bins


def test_a_model_that_claims_too_much_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(4)
    honest = rng.uniform(0.3, 0.95, 3000)
    right = rng.random(3000) < honest
    boastful = np.minimum(honest + 0.2, 0.999)
    found = describe_slice(make_choices(honest, right, boastful, right)).calibration
    assert found.reference.ece < 0.03 < 0.15 < found.artifact.ece
    assert found.ece_rise.interval.low > 0.1
    assert found.confident_wrong_rise.interval.low > 0.05
    assert found.artifact.confident_wrong > found.reference.confident_wrong
    same = describe_slice(make_choices(honest, right, honest, right)).calibration
    assert same.ece_rise.value == 0.0
    assert same.ece_rise.interval.low == pytest.approx(0.0, abs=1e-9)


def test_what_a_calibrated_model_shows_by_chance_is_said() -> None:
    rng = np.random.default_rng(5)
    confidence, weights = rng.uniform(0.3, 0.95, 300), rng.uniform(0.5, 2.0, 300)
    shown = []
    for _ in range(300):
        right = rng.random(300) < confidence
        shown.append(_ece(make_choices(confidence, right, confidence, right, weights)))
    stated = describe_slice(make_choices(confidence, right, confidence, right, weights))
    assert stated.calibration.artifact.ece_by_chance == pytest.approx(np.mean(shown), rel=0.08)


def _ece(choices: Choices) -> float:
    bins = equal_mass_bins(choices.artifact_confidence, choices.weights)
    gaps = choices.weights * (choices.artifact_confidence - choices.artifact_right)
    return float(np.abs(np.bincount(bins, weights=gaps)).sum() / choices.weights.sum())


def simulate(rng: np.random.Generator, count: int, boast: float) -> Choices:
    """Two models that share their knowledge; the artifact claims more than it knows."""
    knows = rng.uniform(0.3, 0.9, count)
    luck = rng.random(count)
    own = np.clip(knows + rng.normal(0.0, 0.03, count), 0.2, 0.99)
    other = np.clip(knows + boast + rng.normal(0.0, 0.03, count), 0.2, 0.99)
    swap = rng.random(count) < 0.05
    return make_choices(own, luck < knows, other, np.where(swap, rng.random(count), luck) < knows)


@pytest.mark.slow
@pytest.mark.parametrize("boast", [0.0, 0.12])
def test_intervals_cover_the_rise_that_suites_of_this_size_show_on_average(boast: float) -> None:
    rng = np.random.default_rng(6)
    points: dict[str, list[float]] = {}
    for _ in range(600):
        for name, figure in calibration_figures(simulate(rng, 800, boast)).items():
            points.setdefault(name, []).append(float(figure.value(figure.columns.sum(axis=0))))
    truth = {name: float(np.mean(values)) for name, values in points.items()}
    # the calibrated reference has an error by chance, which the rise lacks
    assert boast - 0.06 < truth["ece_rise"] < boast + 0.02
    missed, runs = dict.fromkeys(truth, 0), 150
    for _ in range(runs):
        choices = simulate(rng, 800, boast)
        for name, found in estimate(calibration_figures(choices)).items():
            missed[name] += not found.interval.low <= truth[name] <= found.interval.high
    # 5% of 150 are 7.5; 18 or more have a chance of 0.1%
    assert max(missed.values()) <= 17, missed


def test_no_bold_mistake_in_n_cases_leaves_room_for_three_in_n() -> None:
    rng = np.random.default_rng(7)
    confidence = rng.uniform(0.3, 0.8, 300)
    right = rng.random(300) < confidence
    found = describe_slice(make_choices(confidence, right, confidence, right)).calibration
    assert found.artifact.confident_wrong == 0.0
    interval = found.confident_wrong_rise.interval
    assert 2.0 / 300 < interval.high < 5.0 / 300
    assert -5.0 / 300 < interval.low < -2.0 / 300


def retained(own: list[int], other: list[int], weights: list[float]) -> ChoiceQuality:
    confidence = np.full(len(own), 0.5)
    return describe_slice(
        make_choices(
            confidence,
            np.array(own, dtype=bool),
            confidence,
            np.array(other, dtype=bool),
            np.array(weights),
        )
    )


def test_retention_above_chance_takes_the_guesses_off_both_sides() -> None:
    # 12 of 16 and 10 of 16 by weight, five choices: (.625 - .2) / (.75 - .2)
    found = retained([1] * 12 + [0] * 4, [1] * 10 + [0] * 6, [2.0] * 16)
    assert found.chance == pytest.approx(0.2)
    assert found.retention_above_chance is not None
    assert found.retention_above_chance.value == pytest.approx(0.425 / 0.55)
    weighted = retained([1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [4.0, 3.0, 3.0, 1.0, 1.0])
    assert weighted.retention_above_chance is not None
    assert weighted.retention_above_chance.value == pytest.approx((10 - 2.4) / (11 - 2.4))


def test_an_artifact_that_guesses_has_retained_nothing() -> None:
    rng = np.random.default_rng(8)
    own, guesses = rng.random(4000) < 0.6, np.arange(4000) % 5 == 0
    found = retained(own.astype(int).tolist(), guesses.astype(int).tolist(), [1.0] * 4000)
    assert found.retention_above_chance is not None
    interval = found.retention_above_chance.interval
    assert -0.1 < interval.low < 0.0 < interval.high < 0.1
    assert guesses.mean() / own.mean() > 0.3  # what plain retention would call it


def test_a_reference_that_guesses_has_nothing_to_retain() -> None:
    rng = np.random.default_rng(9)
    own, other = rng.random(300) < 0.21, rng.random(300) < 0.2
    found = retained(own.astype(int).tolist(), other.astype(int).tolist(), [1.0] * 300)
    assert found.retention_above_chance is None


@pytest.mark.slow
def test_intervals_of_retention_above_chance_cover_the_truth() -> None:
    rng, missed = np.random.default_rng(10), 0
    for _ in range(200):
        own = rng.random(400) < 0.6
        other = np.where(own, rng.random(400) < 0.9, rng.random(400) < 0.05)
        found = retained(own.astype(int).tolist(), other.astype(int).tolist(), [1.0] * 400)
        assert found.retention_above_chance is not None
        interval = found.retention_above_chance.interval
        missed += not interval.low <= (0.6 * 0.9 + 0.4 * 0.05 - 0.2) / 0.4 <= interval.high
    assert missed <= 20  # 10 are expected; 21 or more have a chance of 0.1%


def test_classes_are_scikit_learns_precision_recall_and_f1() -> None:
    cases = make_cases(CASES)
    reference = make_scores(cases, 1)
    artifact = disturb(reference, 2)
    answers = np.array([case.answer for case in cases])
    weights = [case.weight for case in cases]
    own = np.array([int(reference[case.id].argmax()) for case in cases])
    other = np.array([int(artifact[case.id].argmax()) for case in cases])
    found = class_changes(cases, own, other)
    assert [change.answer for change in found] == CHOICES
    assert sum(change.cases for change in found) == CASES
    judged = [
        precision_recall_fscore_support(answers, predicted, sample_weight=weights)
        for predicted in (own, other)
    ]
    for i, change in enumerate(found):
        for figures, (precision, recall, f1, _) in zip(
            (change.reference, change.artifact), judged, strict=True
        ):
            assert figures.precision == pytest.approx(precision[i])
            assert figures.recall == pytest.approx(recall[i])
            assert figures.f1 == pytest.approx(f1[i])
        expected = judged[1][2][i] - judged[0][2][i]
        assert change.f1_change.value == pytest.approx(expected)
        assert change.f1_change.interval.low < expected < change.f1_change.interval.high


def test_an_answer_that_an_artifact_has_forgotten_stands_out() -> None:
    cases = make_cases(600)
    reference = make_scores(cases, 1, skill=3.0)
    artifact = {name: row.copy() for name, row in reference.items()}
    for row in artifact.values():
        row[2] -= 50.0
    own = np.array([int(reference[case.id].argmax()) for case in cases])
    other = np.array([int(artifact[case.id].argmax()) for case in cases])
    good = class_changes(cases, own, other)[2]
    assert (good.answer, good.artifact.precision, good.artifact.recall) == ("good", None, 0.0)
    assert good.f1_change.interval.high < -0.5


def test_choices_that_differ_in_every_case_form_no_classes() -> None:
    cases = [
        case.model_copy(update={"choices": tuple(f"{c} {i}" for c in CHOICES)})
        for i, case in enumerate(make_cases(20))
    ]
    answers = np.zeros(20, dtype=np.int64)
    assert class_changes(cases, answers, answers) == []


def test_every_slice_is_described_and_a_sample_on_its_own_cases(tmp_path: Path) -> None:
    cases = make_cases(300)
    reference = make_scores(cases, 1)
    disk = Disk.write(tmp_path, cases, reference)
    artifact = disturb(reference, 2)
    found = disk.evaluate(artifact)
    assert [q.slice for q in found.slices] == ["all", "common", "rare"]
    assert [q.choice.cases for q in found.slices if q.choice] == [300, 200, 100]
    rare = found.slices[2].choice
    assert rare is not None
    inside = [case for case in cases if case.slices == ("rare",)]
    own = [softmax(np.round(reference[case.id], 6)) for case in inside]
    other = [softmax(np.round(artifact[case.id], 6)) for case in inside]
    kl = [entropy(p, q) for p, q in zip(own, other, strict=True)]
    expected = np.average(kl, weights=[case.weight for case in inside])
    assert rare.divergence.mean.value == pytest.approx(expected)
    assert found.reliability is not None
    assert sum(point.share for point in found.reliability.artifact) == pytest.approx(1.0)
    assert [change.answer for change in found.classes] == CHOICES
    assert (found.router, found.against) == (None, [])
    sampled = disk.evaluate({case.id: artifact[case.id] for case in inside})
    assert sampled.overall.choice == rare


def test_wilson_stays_inside_and_holds_the_share() -> None:
    for share, cases in ((0.0, 5.0), (1.0, 5.0), (0.5, 1.0), (1 / 3, 80.5)):
        interval = wilson(share, cases)
        assert 0.0 <= interval.low <= share <= interval.high <= 1.0
    assert wilson(0.0, 100.0).high == pytest.approx(3.7 / 100, rel=0.05)
    assert math.isclose(wilson(0.0, 1e9).high, 0.0, abs_tol=1e-6)
