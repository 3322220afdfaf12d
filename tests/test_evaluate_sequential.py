"""Stopping early errs no more often than was allowed, and pays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgedistill.chat import Chat
from edgedistill.errors import InputError
from edgedistill.evaluate import sequential, statistics, stopping
from edgedistill.evaluate.capabilities import SIGNIFICANCE
from edgedistill.evaluate.compare import compare
from edgedistill.evaluate.reference import score_reference
from edgedistill.evaluate.score import LogProbs, log_probs_of, read_scores, write_scores
from edgedistill.evaluate.score_early import sample, score_until_decided
from edgedistill.evaluate.sequential import (
    EARLY_LEVEL,
    FINAL_LEVEL,
    LARGEST_RISE,
    STAKES,
    Bounds,
    measure_anytime,
)
from edgedistill.evaluate.statistics import Pairs
from edgedistill.evaluate.stopping import STOPPING_FILE, Sampling, look_sizes, random_order
from edgedistill.evaluate.suite import Case, ChoiceCase, load_suite
from edgedistill.exporters.gguf import Gguf
from edgedistill.floor import Floor, SliceSpec
from edgedistill.plan import plan_build
from edgedistill.recipe_load import load_recipe
from edgedistill.results import Evaluation
from edgedistill.student import Student
from edgedistill.tasks import Score, ScoreUntilDecided
from tests.pairs import Rng, draw_pairs, draw_weights
from tests.recipes import MINIMAL, write_recipe, write_suite

Tiny = Callable[[str], Path]
BOUNDS = Bounds(largest_weight=1.9, largest_loss=8.0)
CASES = 1500
LOOKS = look_sizes(CASES)

# What the artifacts at the boundary are like; each limit is exactly what they reach.
EDGE_BROKEN, EDGE_FIXED = 0.06, 0.045
EDGE_SCORE = 0.6 * (1.0 - EDGE_BROKEN) + 0.4 * EDGE_FIXED


def at_the_edge(rng: Rng, weighted: bool) -> Pairs:
    weights = draw_weights(rng, CASES) if weighted else None
    return draw_pairs(rng, CASES, broken=EDGE_BROKEN, fixed=EDGE_FIXED, rise=0.03, weights=weights)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_no_end_of_any_interval_ever_passes_the_truth_too_often(weighted: bool) -> None:
    """2,000 artifacts at the boundary, looked at again and again."""
    truth = {
        "score": EDGE_SCORE,
        "retention": EDGE_SCORE / 0.6,
        "broken": EDGE_BROKEN,
        "score_loss": 0.6 - EDGE_SCORE,
        "log_score_loss": 0.03,
    }
    runs, rng = 2000, np.random.default_rng(71)
    below, above = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    bettor = sequential._Bettor(np.asarray(LOOKS), BOUNDS.largest_weight)
    needed = -math.log(EARLY_LEVEL)
    for _ in range(runs):
        ratios = sequential._ratios(at_the_edge(rng, weighted), BOUNDS)
        for name, value in truth.items():
            below[name] += bettor.log_capital(*ratios[name].above(value)) >= needed
            above[name] += bettor.log_capital(*ratios[name].below(value)) >= needed
    assert max(*below.values(), *above.values()) <= EARLY_LEVEL * runs, (below, above)


def test_an_interval_ends_where_no_capital_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bisection against a plain search on a grid, with the capital multiplied out."""
    rng = np.random.default_rng(2)
    pairs = draw_pairs(rng, 300, broken=0.1, fixed=0.05, weights=draw_weights(rng, 300))
    found = measure_anytime(pairs, BOUNDS, [100, 200, 300]).intervals["score"]
    gains = pairs.weights * pairs.artifact_right

    def largest_capital(limit: float, sign: float) -> float:
        reach = 1.9 * max(limit if sign > 0 else 1.0 - limit, 0.05)
        capitals = []
        for look in (100, 200, 300):
            bets = sign * (gains[:look] - limit * pairs.weights[:look])
            capitals.append(np.mean([np.prod(1.0 + s / reach * bets) for s in STAKES]))
        return float(max(capitals))

    grid = np.linspace(0.0, 1.0, 2001)
    free = [
        m for m in grid if max(largest_capital(m, 1.0), largest_capital(m, -1.0)) < 1 / EARLY_LEVEL
    ]
    assert found.low == pytest.approx(free[0], abs=6e-4)
    assert found.high == pytest.approx(free[-1], abs=6e-4)


def test_an_interval_that_was_looked_at_never_grows_and_holds_the_value() -> None:
    rng = np.random.default_rng(4)
    pairs = draw_pairs(rng, 800, broken=0.1, fixed=0.05)
    last = None
    for size in (200, 400, 800):
        looks = [s for s in (200, 400, 800) if s <= size]
        found = measure_anytime(pairs.select(np.arange(size)), BOUNDS, looks)
        for name, interval in found.intervals.items():
            assert interval.low <= found.value(name) <= interval.high
        interval = found.intervals["score_loss"]
        if last is not None:
            assert interval.low >= min(last.low, found.value("score_loss")) - 1e-6
            assert interval.high <= max(last.high, found.value("score_loss")) + 1e-6
        last = interval


def test_a_rise_beyond_the_bound_leaves_the_log_score_undecided() -> None:
    rng = np.random.default_rng(5)
    pairs = draw_pairs(rng, 2000, broken=0.02, fixed=0.03)
    assert measure_anytime(pairs, BOUNDS, [2000]).intervals["log_score_loss"].high < 0.05
    pairs.artifact_loss[7] = pairs.reference_loss[7] + LARGEST_RISE + 1.0
    assert measure_anytime(pairs, BOUNDS, [2000]).intervals["log_score_loss"].high == math.inf


def test_without_a_case_everything_is_possible() -> None:
    pairs = draw_pairs(np.random.default_rng(5), 0, broken=0.1, fixed=0.1)
    found = measure_anytime(pairs, BOUNDS, [0])
    assert found.p_value == 1.0
    assert (found.intervals["score"].low, found.intervals["score"].high) == (0.0, 1.0)


# ---- the suite as a whole, with an artifact that answers by chance ----


def make_cases(count: int, *, tail: int = 10, seed: int = 0) -> list[ChoiceCase]:
    rng = np.random.default_rng(seed)
    rows = [
        {
            "id": f"c{i}",
            "kind": "choice",
            "messages": [{"role": "user", "content": f"text {i}"}],
            "choices": ["bad", "good"],
            "answer": int(rng.integers(2)),
            "slices": [("mail", "news")[i % 2], *(["tail"] if i % tail == 0 else [])],
            "weight": round(float(rng.uniform(0.5, 1.5)), 3),
        }
        for i in range(count)
    ]
    return [ChoiceCase.model_validate_json(json.dumps(row)) for row in rows]


class Model:
    """Answers by chance: right in 60%, where the artifact breaks and fixes some."""

    def __init__(self, cases: Sequence[ChoiceCase], rng: Rng, broken: float, fixed: float) -> None:
        self.asked: list[str] = []
        self.reference: dict[str, LogProbs] = {}
        self._artifact: dict[str, LogProbs] = {}
        for case in cases:
            right = rng.random() < 0.6
            kept = rng.random() >= broken if right else rng.random() < fixed
            self.reference[case.id] = self._scores(case, right)
            self._artifact[case.id] = self._scores(case, bool(kept))

    def score(self, batch: Sequence[Case]) -> dict[str, LogProbs]:
        self.asked += [case.id for case in batch]
        return {case.id: self._artifact[case.id] for case in batch}

    @staticmethod
    def _scores(case: ChoiceCase, right: bool) -> LogProbs:
        wanted = case.answer if right else 1 - case.answer
        return np.where(np.arange(2) == wanted, -0.7, -1.2)


def evaluate(
    root: Path, cases: Sequence[Case], model: Model, floor: Floor, specs: dict[str, SliceSpec]
) -> Evaluation:
    """Sample, write down, and judge, as the steps of a build do."""
    scores, found = sample(cases, model.reference, model.score, floor=floor, slices=specs)
    for name in ("reference", "artifact"):
        (root / name).mkdir(exist_ok=True)
    suite = root / "suite.jsonl"
    suite.write_text("".join(case.model_dump_json() + "\n" for case in cases))
    write_scores(root / "reference", cases, model.reference, seconds=1.0)
    scored = [case for case in cases if case.id in scores]
    write_scores(root / "artifact", scored, scores, seconds=1.0)
    (root / "artifact" / STOPPING_FILE).write_text(found.model_dump_json())
    out = root / "evaluation.json"
    compare(
        [suite],
        root / "reference",
        root / "artifact",
        floor=floor,
        slices=specs,
        runtime="r",
        out=out,
    )
    return Evaluation.model_validate_json(out.read_text())


@pytest.mark.slow
def test_a_verdict_at_the_boundary_is_wrong_as_seldom_as_without_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2,000 artifacts that keep exactly 95%, sampled until decided, the last look included."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    monkeypatch.setattr(sequential, "BISECTIONS", 12)
    monkeypatch.setattr(stopping, "SMALL_SLICE", 0)  # nothing is scored in full for its own sake
    monkeypatch.setattr(stopping, "LOOK_GROWTH", 1.4)
    cases = [case.model_copy(update={"slices": ()}) for case in make_cases(500)]
    rng, runs = np.random.default_rng(83), 2000
    floor = Floor(retention=0.95)
    wrong, early = dict.fromkeys(("pass", "fail"), 0), dict.fromkeys(("pass", "fail"), 0)
    for _ in range(runs):
        # 0.6 * 0.93 + 0.4 * 0.03 = 0.95 * 0.6
        pairs = draw_pairs(rng, len(cases), broken=0.07, fixed=0.03)
        sampling = Sampling(cases, pairs, floor, {})
        looks: list[int] = []
        for size in look_sizes(len(cases)):
            looks.append(size)
            scored = sampling.order[:size]
            verdict = sampling.verdict(pairs.select(np.array(scored)), scored, looks)
            if verdict is not None:
                wrong[verdict] += 1
                early[verdict] += size < len(cases)
                break
    assert max(early.values()) <= EARLY_LEVEL * runs, early
    assert max(wrong.values()) <= SIGNIFICANCE * runs, (wrong, early)
    assert sum(wrong.values()) > 0


def test_a_bad_artifact_is_stopped_at_once_and_a_good_one_when_it_is_certain(
    tmp_path: Path,
) -> None:
    cases = make_cases(4000)
    floor, specs = Floor(retention=0.9), {"tail": SliceSpec(protected=True)}
    bad = Model(cases, np.random.default_rng(1), broken=0.5, fixed=0.1)
    found = evaluate(tmp_path, cases, bad, floor, specs)
    assert (found.verdict, found.stopped_early) == ("fail", True)
    assert found.cases < 300
    good = Model(cases, np.random.default_rng(2), broken=0.03, fixed=0.04)
    found = evaluate(tmp_path, cases, good, floor, specs)
    assert (found.verdict, found.stopped_early) == ("pass", True)
    assert 400 < found.cases < 2500
    assert len(good.asked) == len(set(good.asked)) == found.cases
    quality = {q.slice: q for q in found.slices}
    assert quality["tail"].cases == 400  # protected: every case of it
    # all cases: none that were scored for the tail alone
    written = json.loads((tmp_path / "artifact" / STOPPING_FILE).read_text())
    assert quality["all"].cases == len(written["order"]) < found.cases


def test_a_loss_in_a_slice_that_nobody_named_keeps_the_sampling_going_or_fails_it(
    tmp_path: Path,
) -> None:
    cases = make_cases(4000, tail=8)
    model = Model(cases, np.random.default_rng(3), broken=0.02, fixed=0.03)
    worse = Model(cases, np.random.default_rng(3), broken=0.5, fixed=0.0)
    for case in cases:
        if "tail" in case.slices:
            model._artifact[case.id] = worse._artifact[case.id]
            model.reference[case.id] = worse.reference[case.id]
    found = evaluate(tmp_path, cases, model, Floor(retention=0.8), {})
    (check,) = [c for c in found.floor if c.verdict == "fail"]
    assert (check.clause, check.slice) == ("unnamed loss", "tail")
    assert found.cases < 2000


def test_what_cannot_be_decided_early_is_judged_on_the_whole_suite(tmp_path: Path) -> None:
    cases = make_cases(500)
    model = Model(cases, np.random.default_rng(4), broken=0.05, fixed=0.05)
    found = evaluate(tmp_path, cases, model, Floor(retention=0.985), {})
    assert (found.cases, found.stopped_early, found.verdict) == (500, False, "underpowered")
    assert found.floor[0].cases_needed is not None
    assert pytest.approx(SIGNIFICANCE) == EARLY_LEVEL + FINAL_LEVEL


def test_every_beginning_of_the_order_has_the_suites_mix() -> None:
    cases = make_cases(2000)
    order = random_order(cases)
    assert sorted(order) == list(range(2000))
    assert order == random_order(cases)
    for size in (100, 333, 1000):
        ahead = [cases[i] for i in order[:size]]
        for name, share in (("mail", 0.5), ("tail", 0.1)):
            # to within one case for each of the strata that hold the slice, and for the cut
            assert abs(sum(name in c.slices for c in ahead) - share * size) <= 4
    answers = [cases[i].answer for i in order[:500]]
    assert 200 < sum(answers) < 300
    assert order[:20] != sorted(order[:20])


def test_looks_come_at_growing_distances_and_end_with_the_suite() -> None:
    assert look_sizes(60) == [60]
    assert look_sizes(100) == [100]
    sizes = look_sizes(5185)
    assert (sizes[0], sizes[-1]) == (100, 5185)
    assert sizes == sorted(set(sizes))
    assert len(sizes) < 32


def test_a_record_of_another_sampling_is_refused(tmp_path: Path) -> None:
    cases = make_cases(300)
    model = Model(cases, np.random.default_rng(4), broken=0.5, fixed=0.05)
    evaluate(tmp_path, cases, model, Floor(retention=0.985), {})
    path = tmp_path / "artifact" / STOPPING_FILE
    written = json.loads(path.read_text())

    def again() -> None:
        suite, out = tmp_path / "suite.jsonl", tmp_path / "evaluation.json"
        directories = tmp_path / "reference", tmp_path / "artifact"
        compare([suite], *directories, floor=Floor(), slices={}, runtime="r", out=out)

    again()
    for damaged in (
        "{",
        json.dumps(written | {"looks": []}),
        json.dumps(written | {"order": written["order"][1:]}),
        json.dumps(written | {"order": [*written["order"][1:], "c999"]}),
        json.dumps({"order": written["order"]}),
    ):
        path.write_text(damaged)
        with pytest.raises(InputError):
            again()


# ---- in the pipeline, with a real runtime ----

CHAT = Chat(system="Rate it.")


def test_an_artifact_in_its_runtime_gives_the_scores_that_it_gives_without_stopping(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "FIRST_LOOK", 4)
    suite = write_suite(tmp_path / "suite.jsonl", cases=12)
    for name in ("artifact", "reference", "early"):
        (tmp_path / name).mkdir()
    student = tiny("llama")
    Gguf().export(Student(student), tmp_path / "artifact", context_tokens=256)
    score_reference(
        student, [suite], tmp_path / "reference", chat=CHAT, threads=1, context_tokens=256
    )
    score_until_decided(
        tmp_path / "artifact",
        "llama_cpp",
        student,
        [suite],
        tmp_path / "reference",
        tmp_path / "early",
        floor=Floor(retention=0.99),
        slices={},
        chat=CHAT,
        threads=1,
        context_tokens=256,
    )
    found, expected = (log_probs_of(read_scores(tmp_path / n)) for n in ("early", "reference"))
    assert list(found) == [case.id for case in load_suite([suite])]
    for case_id, values in found.items():
        np.testing.assert_allclose(values, expected[case_id], atol=0.3)


def test_the_judging_format_stops_early_where_the_recipe_says_so(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = MINIMAL.replace("[gguf]", "[onnx, gguf]") + "suite: suite.jsonl\n"
    early = text + "floor: {{retention: 0.9}}\nevaluate: {{stop_early: true}}\n"
    write_suite(tmp_path / "suite.jsonl")

    def kinds(recipe: str, waivers: str = "") -> dict[str, type]:
        path = write_recipe(tmp_path, tiny("llama"), recipe)
        path.with_suffix(".waivers.yaml").write_text(waivers)
        steps = plan_build(load_recipe(path).recipe, tiny("llama"), machine="m").ordered()
        return {s.label: type(s.task) for s in steps if s.label.endswith("gguf: score")} | {
            s.label: type(s.task) for s in steps if s.label == "int8/onnx: score"
        }

    assert set(kinds(text).values()) == {Score}
    found = kinds(early)
    assert found["int8/gguf: score"] is found["float/gguf: score"] is ScoreUntilDecided
    assert found["int8/onnx: score"] is Score  # a sample is fixed beforehand
    assert set(kinds(early.replace("floor: {{retention: 0.9}}\n", "")).values()) == {Score}
    waived = (
        "- {slice: all, by: Ann, because: x, on: 2026-01-01, until: 2999-01-01, recipe: tiny, "
        f"rung: int8, format: gguf, sha256: {'a' * 64}, consented: {{retention: 0.5}}}}\n"
    )
    assert kinds(early, waived)["int8/gguf: score"] is Score  # what is waived is known in full
    assert kinds(early, waived)["float/gguf: score"] is ScoreUntilDecided
