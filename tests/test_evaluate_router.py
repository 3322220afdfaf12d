from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import softmax

from edgedistill.beside import Beside
from edgedistill.choice_results import Router
from edgedistill.evaluate import statistics
from edgedistill.evaluate.router import fit_router, fitting_half, write_queue
from edgedistill.evaluate.suite import ChoiceCase, load_suite
from edgedistill.results import Evaluation
from edgedistill.verdict import combine_quality
from tests.choice_suite import Disk, Scores, disturb, make_cases, make_scores

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)


def sureness(cases: list[ChoiceCase], scores: Scores) -> tuple[Floats, Bools]:
    rows = [softmax(scores[case.id]) for case in cases]
    right = [row.argmax() == case.answer for case, row in zip(cases, rows, strict=True)]
    return np.array([row.max() for row in rows]), np.array(right)


def fit(cases: list[ChoiceCase], confidence: Floats, right: Bools, target: float) -> Router:
    return fit_router(cases, confidence, right, target_accuracy=target, runtime="llama_cpp")


def test_the_threshold_keeps_the_most_that_reaches_the_target_on_its_half() -> None:
    cases = make_cases(1200)
    confidence, right = sureness(cases, make_scores(cases, 1))
    router = fit(cases, confidence, right, 0.8)
    assert router.threshold is not None
    fitted = fitting_half(cases)
    weights = np.array([case.weight for case in cases])

    def kept_and_accuracy(threshold: float, half: Bools) -> tuple[float, float]:
        stays = half & (confidence >= threshold)
        accuracy = np.average(right[stays], weights=weights[stays])
        return weights[stays].sum() / weights[half].sum(), float(accuracy)

    possible = [
        kept_and_accuracy(value, fitted)[0]
        for value in confidence[fitted]
        if (fitted & (confidence >= value)).sum() >= 30
        and kept_and_accuracy(value, fitted)[1] >= 0.8
    ]
    kept, accuracy = kept_and_accuracy(router.threshold, fitted)
    assert kept == pytest.approx(max(possible))
    assert accuracy >= 0.8
    assert 0.3 < kept < 0.95
    # what is reported is of the other half
    kept, accuracy = kept_and_accuracy(router.threshold, ~fitted)
    assert router.kept is not None
    assert router.accuracy is not None
    assert router.kept.value == pytest.approx(kept)
    assert router.accuracy.value == pytest.approx(accuracy)
    leaves = ~fitted & (confidence < router.threshold)
    elsewhere = np.average(right[leaves], weights=weights[leaves])
    assert router.accuracy_elsewhere == pytest.approx(elsewhere)
    assert elsewhere < 0.8
    assert (router.cases_fitted, router.cases_reported) == (fitted.sum(), (~fitted).sum())
    for point in router.curve:
        assert (point.kept, point.accuracy) == pytest.approx(
            kept_and_accuracy(point.threshold, ~fitted)
        )
    assert [p.kept for p in router.curve] == sorted(p.kept for p in router.curve)
    assert router.curve[-1].kept == pytest.approx(1.0)


def test_halves_are_alike_and_do_not_depend_on_the_order_or_on_other_strata() -> None:
    cases = make_cases(900)
    fitted = fitting_half(cases)
    for name in ("rare", "common"):
        for answer in range(4):
            inside = [f for c, f in zip(cases, fitted, strict=True) if _is(c, name, answer)]
            assert abs(2 * sum(inside) - len(inside)) <= 1
    chosen = {case.id for case, f in zip(cases, fitted, strict=True) if f}
    shuffled = [cases[i] for i in np.random.default_rng(0).permutation(900)]
    again = {c.id for c, f in zip(shuffled, fitting_half(shuffled), strict=True) if f}
    assert again == chosen
    added = [c.model_copy(update={"slices": ("new",)}) for c in make_cases(7, seed=5)]
    more = [*added, *cases]
    later = {c.id for c, f in zip(more, fitting_half(more), strict=True) if f}
    assert {name for name in later if name.startswith("c0-")} == chosen
    alone = [c.model_copy(update={"slices": (c.id,)}) for c in cases]  # a stratum each
    assert 380 < fitting_half(alone).sum() < 520


def _is(case: ChoiceCase, name: str, answer: int) -> bool:
    return case.slices == (name,) and case.answer == answer


def test_a_target_out_of_reach_has_no_threshold() -> None:
    cases = make_cases(400)
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1.0, 400)
    right = rng.random(400) < 0.4  # and confidence says nothing of it
    router = fit(cases, confidence, right, 0.95)
    assert (router.threshold, router.kept, router.accuracy) == (None, None, None)
    assert router.accuracy_elsewhere == pytest.approx(0.4, abs=0.1)
    assert not router.refuted


def test_a_handful_of_lucky_answers_makes_no_threshold() -> None:
    cases = make_cases(400)
    confidence = np.linspace(0.3, 0.99, 400)
    right = np.arange(400) >= 360  # right where it is surest, in about 20 cases of each half
    assert fit(cases, confidence, right, 0.99).threshold is None
    right = np.arange(400) >= 320
    assert fit(cases, confidence, right, 0.99).threshold is not None


def test_a_target_that_all_answers_reach_keeps_everything() -> None:
    cases = make_cases(300)
    confidence, right = sureness(cases, make_scores(cases, 1, skill=3.0))
    router = fit(cases, confidence, right, 0.5)
    assert router.threshold == 0.0
    assert router.kept is not None
    assert router.kept.value == 1.0
    assert router.accuracy_elsewhere is None


def test_a_threshold_that_was_luck_is_refuted_by_the_other_half() -> None:
    cases = make_cases(600)
    fitted = fitting_half(cases)
    confidence = np.random.default_rng(2).uniform(0.3, 1.0, 600)
    right = fitted.copy()  # always right on the half that it is fitted on, never on the other
    router = fit(cases, confidence, right, 0.9)
    assert router.threshold == 0.0
    assert router.accuracy is not None
    assert router.accuracy.value == 0.0
    assert router.refuted


@pytest.mark.slow
def test_intervals_on_the_other_half_cover_the_truth() -> None:
    rng = np.random.default_rng(3)
    cases = [case.model_copy(update={"weight": 1.0}) for case in make_cases(700)]
    missed = {"kept": 0, "accuracy": 0}
    for _ in range(150):
        confidence = rng.uniform(0.25, 1.0, 700)
        router = fit(cases, confidence, rng.random(700) < confidence, 0.8)
        assert router.threshold is not None
        assert router.kept is not None
        assert router.accuracy is not None
        threshold = router.threshold
        kept, accuracy = router.kept.interval, router.accuracy.interval
        missed["kept"] += not kept.low <= (1.0 - threshold) / 0.75 <= kept.high
        missed["accuracy"] += not accuracy.low <= (1.0 + threshold) / 2 <= accuracy.high
    # 5% of 150 are 7.5; 18 or more have a chance of 0.1%
    assert max(missed.values()) <= 17, missed
    assert min(missed.values()) >= 1, missed


def test_the_queue_is_a_suite_of_the_least_sure_cases(tmp_path: Path) -> None:
    cases = make_cases(100)
    scores = make_scores(cases, 1)
    confidence, _ = sureness(cases, scores)
    threshold = float(np.quantile(confidence, 0.3))
    out = tmp_path / "queue.jsonl"
    out.write_text("what was there before")
    assert write_queue(cases, scores, threshold, out) == 30
    order = np.argsort(confidence)[:30]
    assert load_suite([out]) == [cases[i] for i in order]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["queue.jsonl"]
    assert write_queue(cases, scores, 0.0, out) == 0
    assert out.read_text() == ""


def test_an_evaluation_has_a_router_and_a_queue_where_one_is_asked_for(tmp_path: Path) -> None:
    cases = make_cases(400)
    reference = make_scores(cases, 1)
    disk = Disk.write(tmp_path, cases, reference)
    artifact = disturb(reference, 2)
    plain = disk.evaluate(artifact, name="plain")
    assert plain.router is None
    assert not (tmp_path / "plain" / "queue.jsonl").exists()
    found = disk.evaluate(artifact, Beside(router_accuracy=0.85))
    router = found.router
    assert router is not None
    assert (router.target_accuracy, router.runtime) == (0.85, "llama_cpp")
    assert router.threshold is not None
    confidence, _ = sureness(cases, {n: np.round(row, 6) for n, row in artifact.items()})
    below = {case.id for case, c in zip(cases, confidence, strict=True) if c < router.threshold}
    lines = (tmp_path / "artifact" / "queue.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == below
    assert found.model_copy(update={"router": None}) == plain


def test_a_sample_takes_the_router_of_the_whole_suite(tmp_path: Path) -> None:
    cases = make_cases(400)
    reference = make_scores(cases, 1)
    disk = Disk.write(tmp_path, cases, reference)
    beside = Beside(router_accuracy=0.85)
    judge = disk.evaluate(disturb(reference, 2), beside, name="judge")
    few = disturb({case.id: reference[case.id] for case in cases[::4]}, 3)
    own = disk.evaluate(few, beside, name="sample")
    assert own.router is not None
    assert own.router.cases_reported < 60
    combined = combine_quality(own, judge)
    assert isinstance(combined, Evaluation)
    assert combined.router == judge.router
    assert combined.cases == 100
