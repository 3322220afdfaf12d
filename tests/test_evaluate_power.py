"""What the plan says of a suite comes true in simulations of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.build import Options
from edgedistill.evaluate import statistics
from edgedistill.evaluate.capabilities import Measured, find_unnamed_losses, measure
from edgedistill.evaluate.judge import judge
from edgedistill.evaluate.power import (
    PlannedClause,
    Spread,
    describe_clauses,
    measured_spreads,
    plan_clauses,
    reference_spreads,
)
from edgedistill.evaluate.statistics import Pairs, loss_p_value, shares
from edgedistill.evaluate.suite import Case
from edgedistill.floor import Floor, SliceSpec
from edgedistill.preview import describe, preview
from edgedistill.results import Evaluation, Interval, SliceQuality
from tests.pairs import Rng, draw_pairs, draw_weights
from tests.recipes import MINIMAL, write_recipe, write_suite

Tiny = Callable[[str], Path]
SPREAD = Spread(flips=0.06, log_score_sd=0.25, reference_score=0.6)
# 6% of the answers flip, as many either way: 5% of 60% and 7.5% of 40%.
BROKEN, FIXED = 0.05, 0.075


def make_cases(slices: dict[str, int], rng: Rng | None = None) -> list[Case]:
    """Cases of slices that do not overlap, with weights if ``rng`` is given."""
    cases = []
    for name, count in slices.items():
        weights = draw_weights(rng, count) if rng is not None else np.ones(count)
        for i in range(count):
            fields = {
                "id": f"{name}-{i}",
                "kind": "choice",
                "messages": ({"role": "user", "content": "x"},),
                "choices": ("a", "b"),
                "answer": 0,
                "slices": (name,),
                "weight": float(weights[i]),
            }
            cases.append(Case.model_validate(fields))
    return cases


def planned(
    cases: list[Case], floor: Floor | None, specs: dict[str, SliceSpec], clause: str, name: str
) -> PlannedClause:
    (found,) = [
        c
        for c in plan_clauses(cases, floor, specs, {}, SPREAD)
        if (c.clause, c.slice) == (clause, name)
    ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("clause", ["score", "retention", "max_broken", "max_log_score_loss"])
def test_what_lies_the_stated_distance_from_its_limit_is_decided_four_times_in_five(
    clause: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng, runs, count = np.random.default_rng(53), 200, 800
    cases = make_cases({"x": count}, rng if weighted else None)
    weights = np.array([case.weight for case in cases])
    smallest = planned(cases, Floor.model_validate({clause: 0.5}), {}, clause, "all").smallest
    # An artifact without a loss, and the limit so far away as is said to be decided.
    true = {"score": 0.6, "retention": 1.0, "max_broken": 0.05, "max_log_score_loss": 0.0}[clause]
    limit = true + (smallest if clause.startswith("max_") else -smallest)
    floor = Floor.model_validate({clause: limit})
    passed = 0
    for _ in range(runs):
        pairs = draw_pairs(rng, count, weights=weights, broken=BROKEN, fixed=FIXED)
        passed += judge({"all": measure(pairs)}, floor, {})[1] == "pass"
    # 80% of 200 are 160, give or take 3 standard deviations, and what rare flips add
    assert 140 <= passed <= 184, passed


@pytest.mark.slow
def test_an_unnamed_loss_of_the_stated_size_is_found_four_times_in_five() -> None:
    rng, runs = np.random.default_rng(59), 300
    slices = {f"s{i}": 500 for i in range(8)}
    smallest = planned(make_cases(slices), Floor(), {}, "unnamed loss", "s0").smallest
    assert 0.02 < smallest < 0.07
    wide = {"score_loss": Interval(low=-1.0, high=1.0)}

    def slice_of(pairs: Pairs) -> Measured:
        return Measured(pairs, shares(pairs), wide, loss_p_value(pairs), 0.025)

    found = 0
    for _ in range(runs):
        # 6% flip: so much more breaks than is fixed
        broken = (0.03 + smallest / 2.0) / 0.6
        fixed = (0.03 - smallest / 2.0) / 0.4
        suite = {"s0": slice_of(draw_pairs(rng, 500, broken=broken, fixed=max(fixed, 0.0)))}
        suite |= {
            f"s{i}": slice_of(draw_pairs(rng, 500, broken=BROKEN, fixed=FIXED)) for i in range(1, 8)
        }
        found += "s0" in [check.slice for check in find_unnamed_losses(suite, Floor())]
    assert 0.68 * runs <= found <= 0.93 * runs, found


def test_the_cases_that_are_said_to_be_lacking_are_enough() -> None:
    floor = Floor(retention=0.98)
    small = planned(make_cases({"x": 500}), floor, {}, "retention", "all")
    assert small.decides is False
    assert small.cases_needed is not None
    large = planned(make_cases({"x": 500 + small.cases_needed}), floor, {}, "retention", "all")
    assert large.decides
    nearly = planned(
        make_cases({"x": int(0.8 * (500 + small.cases_needed))}), floor, {}, "retention", "all"
    )
    assert nearly.decides is False


def test_a_protected_slice_needs_the_cases_that_the_judge_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 800)
    specs, rng = {"x": SliceSpec(protected=True)}, np.random.default_rng(61)
    for count in (40, 60, 150, 250):
        plan = planned(make_cases({"x": count}), None, specs, "protected", "x")
        verdicts = []
        for _ in range(15):
            found = measure(draw_pairs(rng, count, broken=BROKEN, fixed=FIXED))
            verdicts.append(judge({"all": found, "x": found}, None, specs)[0][0].verdict)
        assert plan.decides is (verdicts.count("underpowered") < 8), (count, verdicts)


def test_a_floor_that_even_an_unharmed_artifact_misses_is_never_decided() -> None:
    cases = make_cases({"x": 5000})
    broken = planned(cases, Floor(max_broken=0.04), {}, "max_broken", "all")
    assert (broken.decides, broken.cases_needed) == (False, None)  # 5% break by chance alone
    score = planned(cases, Floor(score=0.65), {}, "score", "all")
    assert (score.decides, score.cases_needed) == (False, None)


def test_weights_cost_cases() -> None:
    floor = Floor(retention=0.98)
    equal = planned(make_cases({"x": 1000}), floor, {}, "retention", "all")
    cases = make_cases({"x": 1000}, np.random.default_rng(2))
    weighted = planned(cases, floor, {}, "retention", "all")
    assert equal.effective_cases == 1000.0
    assert weighted.effective_cases < 900.0
    assert weighted.smallest > equal.smallest


def test_only_what_somebody_asked_for_is_planned() -> None:
    cases = make_cases({"a": 100, "b": 100, "c": 100})
    assert plan_clauses(cases, None, {}, {}, SPREAD) == []
    specs = {"a": SliceSpec(retention=0.9, protected=True), "b": SliceSpec(sacrificed="why")}
    rows = [(c.slice, c.clause) for c in plan_clauses(cases, Floor(score=0.5), specs, {}, SPREAD)]
    assert rows == [
        ("all", "score"),
        ("a", "retention"),
        ("a", "protected"),
        ("c", "unnamed loss"),
    ]


def test_spreads_are_read_off_what_was_measured() -> None:
    """The quality of pairs with known flips and a known spread gives both back."""
    rng = np.random.default_rng(67)
    pairs = draw_pairs(rng, 4000, rise_sd=0.4, broken=BROKEN, fixed=FIXED)
    found = measure(pairs)
    quality = SliceQuality(
        slice="all",
        cases=4000,
        score=found.value("score"),
        score_interval=found.intervals["score"],
        reference_score=found.value("reference_score"),
        retention=found.value("retention"),
        retention_interval=found.intervals["retention"],
        log_score=1.0,
        log_score_loss=found.value("log_score_loss"),
        log_score_loss_interval=found.intervals["log_score_loss"],
        macro_f1=0.5,
        broken=found.value("broken"),
        broken_cases=int(pairs.broken.sum()),
        fixed_cases=int(pairs.fixed.sum()),
    )
    evaluation = Evaluation(
        cases=4000,
        cases_in_suite=4000,
        runtime="r",
        slices=[quality],
        floor=[],
        flips=[],
        verdict="unjudged",
        seconds=1.0,
    )
    spread = measured_spreads(evaluation, make_cases({"x": 4000}))["all"]
    assert spread.flips == pytest.approx(0.06, abs=0.01)
    assert spread.log_score_sd == pytest.approx(0.4, rel=0.06)
    assert spread.reference_score == pytest.approx(0.6, abs=0.03)
    assumed = reference_spreads(SPREAD, [quality])["all"]
    assert (assumed.flips, assumed.reference_score) == (0.06, quality.score)


def test_what_cannot_be_decided_is_said_first() -> None:
    cases = make_cases({"big": 4000, "small": 60, "other": 60})
    specs = {"small": SliceSpec(retention=0.95), "big": SliceSpec(protected=True)}
    plan = plan_clauses(cases, Floor(retention=0.97), specs, {}, SPREAD)
    lines = list(describe_clauses(plan, "if 6% flip"))
    assert lines[0] == "what the suite can decide, if 6% flip:"
    assert [line.split()[0] for line in lines[1:]] == ["CANNOT", "decides", "decides", "unseen"]
    assert "small (60 cases): retention 0.95" in lines[1]
    assert "more cases" in lines[1]
    assert list(describe_clauses([], "")) == []


def test_a_plan_says_which_floors_the_suite_cannot_decide(tiny: Tiny, tmp_path: Path) -> None:
    text = MINIMAL + (
        "suite: suite.jsonl\nfloor: {{retention: 0.97}}\n"
        "slices:\n  odd: {{protected: true}}\n"
        "evaluate: {{expect: {{flips: 0.1}}}}\n"
    )
    recipe = write_recipe(tmp_path, tiny("llama"), text)
    write_suite(tmp_path / "suite.jsonl", cases=40)
    options = Options(recipe, cache=tmp_path / "cache", exports=tmp_path / "exports")
    plan = preview(options)
    assert {(c.slice, c.clause, c.decides) for c in plan.clauses} == {
        ("all", "retention", False),
        ("odd", "protected", False),
        ("even", "unnamed loss", None),
    }
    said = "\n".join(describe(plan))
    assert "if 10.0% of the answers flip and the reference is right in 70%" in said
    assert "CANNOT   all (40 cases): retention 0.97" in said
    assert plan.floor_lowered == []
