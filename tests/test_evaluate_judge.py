"""Capabilities are judged as often wrongly, and as often rightly, as docs/evaluate.md says."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from edgedistill.evaluate import statistics
from edgedistill.evaluate.capabilities import (
    SIGNIFICANCE,
    UNNAMED,
    VISIBLE_LOSS,
    Measured,
    find_unnamed_losses,
    measure,
)
from edgedistill.evaluate.judge import judge
from edgedistill.evaluate.statistics import Pairs, holm, loss_p_value, shares
from edgedistill.floor import Floor, Sacrifice, SliceSpec
from edgedistill.results import FloorCheck, Interval
from tests.pairs import Rng, draw_pairs, draw_weights

WIDE = {"score_loss": Interval(low=-1.0, high=1.0)}


def slice_of(pairs: Pairs) -> Measured:
    """A slice as the search for unnamed losses needs it, without the cost of intervals."""
    return Measured(pairs, shares(pairs), WIDE, loss_p_value(pairs), SIGNIFICANCE)


def null_suite(rng: Rng, slices: int, cases: int, *, weighted: bool) -> dict[str, Measured]:
    """Slices in which as many answers break as are fixed: 5% of 60% and 7.5% of 40%."""
    found = {}
    for index in range(slices):
        weights = draw_weights(rng, cases) if weighted else None
        pairs = draw_pairs(rng, cases, broken=0.05, fixed=0.075, weights=weights)
        found[f"slice {index}"] = slice_of(pairs)
    return found


def one(checks: list[FloorCheck], clause: str, name: str) -> FloorCheck:
    (check,) = [c for c in checks if (c.clause, c.slice) == (clause, name)]
    return check


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_suites_without_a_loss_are_failed_no_more_often_than_stated(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the smallest loss that counts, so that the correction alone has to hold."""
    monkeypatch.setattr("edgedistill.evaluate.capabilities.TOLERATED_LOSS", 0.0)
    monkeypatch.setattr(statistics, "SIGN_FLIPS", 4000)
    rng, runs = np.random.default_rng(31), 400 if weighted else 2000
    alarms = uncorrected = 0
    for _ in range(runs):
        suite = null_suite(rng, slices=10, cases=400, weighted=weighted)
        alarms += bool(find_unnamed_losses(suite, Floor()))
        uncorrected += any(found.p_value < SIGNIFICANCE for found in suite.values())
    # 2.5% of 400 are 10 and of 2,000 are 50; so many more have a chance of 0.1%
    assert alarms <= (21 if weighted else 73), alarms
    assert uncorrected > 0.05 * runs  # what ten slices raise without Holm


def test_a_small_loss_is_tolerated_however_certain_it_is() -> None:
    rng = np.random.default_rng(3)
    pairs = draw_pairs(rng, 20_000, broken=0.025, fixed=0.0)  # 1.5 points of score, no doubt
    suite = {"big": slice_of(pairs)}
    assert loss_p_value(pairs) < 1e-6
    assert find_unnamed_losses(suite, Floor()) == []
    worse = {"big": slice_of(draw_pairs(rng, 20_000, broken=0.05, fixed=0.0))}
    (check,) = find_unnamed_losses(worse, Floor())
    assert (check.clause, check.slice, check.verdict) == (UNNAMED, "big", "fail")
    assert find_unnamed_losses(worse, Floor(retention=0.9)) == []  # 10% of 0.6 may go anyway


def test_holm_equals_the_closed_test_over_all_intersections() -> None:
    """Bonferroni on every intersection that holds a hypothesis: the definition of the closure."""
    rng = np.random.default_rng(8)
    for _ in range(50):
        p_values = (rng.random(5) ** 3).tolist()
        groups = [g for n in range(1, 6) for g in itertools.combinations(range(5), n)]
        closed = [
            min(1.0, max(len(g) * min(p_values[j] for j in g) for g in groups if i in g))
            for i in range(5)
        ]
        assert holm(p_values) == pytest.approx(closed)


def test_a_catastrophe_in_one_of_very_many_slices_is_found_in_spite_of_holm() -> None:
    rng = np.random.default_rng(12)
    pairs = draw_pairs(rng, 400, broken=0.3, fixed=0.0, weights=draw_weights(rng, 400))
    suite = {f"slice {i}": Measured(pairs, shares(pairs), WIDE, 1.0, 0.025) for i in range(2000)}
    suite["lost"] = slice_of(pairs)
    assert [check.slice for check in find_unnamed_losses(suite, Floor())] == ["lost"]


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_a_protected_slice_is_failed_wrongly_as_seldom_as_stated(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    monkeypatch.setattr(statistics, "SIGN_FLIPS", 2000)
    rng, runs, failed = np.random.default_rng(41), 300, 0
    for _ in range(runs):
        weights = draw_weights(rng, 500) if weighted else None
        found = measure(draw_pairs(rng, 500, broken=0.05, fixed=0.075, weights=weights))
        slices = {"all": found, "kept": found}
        checks, _ = judge(slices, Floor(), {"kept": SliceSpec(protected=True)})
        verdict = one(checks, "protected", "kept").verdict
        assert verdict in ("pass", "fail")
        failed += verdict == "fail"
    assert failed <= 17, failed  # 2.5% of 300 are 7.5; 18 or more have a chance of 0.1%


def test_a_protected_slice_that_lost_visibly_is_failed_nearly_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 100)
    rng, passed = np.random.default_rng(43), 0
    for _ in range(200):  # a fall of VISIBLE_LOSS: as many fixes, and 1/12 of 60% broken on top
        pairs = draw_pairs(rng, 500, broken=0.03 + VISIBLE_LOSS / 0.6, fixed=0.045)
        found = measure(pairs)
        checks, _ = judge({"all": found, "kept": found}, None, {"kept": SliceSpec(protected=True)})
        passed += one(checks, "protected", "kept").verdict == "pass"
    assert passed <= 12, passed  # a slice that passes would have shown it in 97.5%


def test_a_sacrifice_says_who_gave_the_slice_up_and_when() -> None:
    found = measure(draw_pairs(np.random.default_rng(1), 300, broken=0.5, fixed=0.0))
    record = Sacrifice(because="English only", by="Ann", on="2026-01-31")
    specs = {"fr": SliceSpec(sacrificed=record), "de": SliceSpec(sacrificed="English only")}
    checks, verdict = judge({"all": found, "fr": found, "de": found}, None, specs)
    assert verdict == "pass"
    assert one(checks, "sacrificed", "fr").note == "given up by Ann on 2026-01-31: English only"
    assert one(checks, "sacrificed", "de").note == "given up: English only"


@pytest.mark.parametrize(
    ("sacrificed", "place"),
    [
        ({"because": "x", "by": "Ann"}, "on"),
        ({"because": "x", "by": "Ann", "on": "31.1.2026"}, "on"),
        ({"because": "x", "by": "Ann", "on": "2026-02-30"}, "on"),
        ({"because": " ", "by": "Ann", "on": "2026-01-31"}, "because"),
        ({"because": "x", "by": "", "on": "2026-01-31"}, "by"),
        ({"because": "x", "by": "Ann", "on": "2026-01-31", "until": "x"}, "until"),
        ("", "reason"),
        (3, "record"),
    ],
)
def test_half_a_sacrifice_is_refused_in_one_place(sacrificed: Any, place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SliceSpec.model_validate({"sacrificed": sacrificed})
    (error,) = caught.value.errors()
    assert error["loc"][-1] == place
