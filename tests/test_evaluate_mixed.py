from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.errors import InputError
from edgedistill.evaluate import statistics
from edgedistill.evaluate.compare import compare
from edgedistill.evaluate.score import Answer, Score, TextBits, write_scores
from edgedistill.evaluate.statistics import Pairs, loss_p_value, share_intervals
from edgedistill.evaluate.suite import Case, load_suite, sample_cases
from edgedistill.evaluate.text_statistics import TextPairs
from edgedistill.floor import Floor, SliceSpec
from edgedistill.results import Evaluation, SliceQuality

CASES = 600  # 240 choices, 240 answers, 120 texts
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}]}


def make_case(i: int, rng: np.random.Generator) -> dict[str, Any]:
    case: dict[str, Any] = {
        "id": f"c{i}",
        "slices": [f"third={i % 3}"],
        "weight": round(float(rng.uniform(0.5, 1.5)), 3),
        "value": int(rng.integers(1, 4)),
    }
    if i % 5 < 2:
        return case | ASK | {"kind": "choice", "choices": ["a", "b", "c"], "answer": i % 3}
    if i % 5 < 4:
        fields = {"name": f"n{i % 7}", "count": i % 4}
        return case | ASK | {"kind": "generate", "json_fields": fields}
    return case | {"kind": "text", "text": "ab" * (1 + i % 11), "slices": ["texts"]}


def answer(case: Case, rng: np.random.Generator, right: float) -> Score:
    """What a model of some skill would do."""
    if case.kind == "choice":
        scores: npt.NDArray[np.float64] = rng.normal(0.0, 1.0, 3)
        if rng.random() < right:
            scores[case.stratum] += 10.0
        return scores
    if case.kind == "text":
        return TextBits(float(rng.uniform(1.0, 2.0)), 2)
    wanted = json.loads(case.expected)
    given = {k: v if rng.random() < right else "wrong" for k, v in wanted.items()}
    # two items expected, two given: the F1 is the share of those that are right
    grade = sum(given[k] == v for k, v in wanted.items()) / 2
    return Answer(json.dumps(given), grade)


@dataclass
class World:
    root: Path
    cases: list[Case]
    reference: dict[str, Score]
    artifact: dict[str, Score]

    def run(
        self,
        floor: Floor | None = None,
        slices: Mapping[str, SliceSpec] | None = None,
        only: str = "",
        suite: str = "suite.jsonl",
        **changes: Score,
    ) -> Evaluation:
        chosen = [case for case in self.cases if not only or case.kind == only]
        for name, scores in (
            ("reference", self.reference),
            ("artifact", self.artifact | changes),
        ):
            (self.root / name).mkdir(exist_ok=True)
            write_scores(self.root / name, chosen, scores, seconds=1.0)
        out = self.root / "evaluation.json"
        compare(
            [self.root / suite],
            self.root / "reference",
            self.root / "artifact",
            floor=floor,
            slices=slices or {},
            runtime="llama_cpp",
            out=out,
        )
        return Evaluation.model_validate_json(out.read_text())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    lines = [json.dumps(make_case(i, rng)) for i in range(CASES)]
    (tmp_path / "suite.jsonl").write_text("\n".join(lines))
    cases = load_suite([tmp_path / "suite.jsonl"])
    reference = {case.id: answer(case, rng, 0.8) for case in cases}
    artifact = {case.id: answer(case, rng, 0.7) for case in cases}
    return World(tmp_path, cases, reference, artifact)


def of(evaluation: Evaluation, name: str) -> SliceQuality:
    (found,) = [found for found in evaluation.slices if found.slice == name]
    return found


def right(score: Score, case: Case) -> float:
    if isinstance(score, Answer):
        return score.grade
    assert isinstance(score, np.ndarray)
    return float(score.argmax() == case.stratum)


@pytest.mark.parametrize("name", ["all", "third=1"])
def test_figures_over_kinds_equal_a_plain_computation(world: World, name: str) -> None:
    found = of(world.run(), name)
    cases = [c for c in world.cases if c.kind != "text" and name in ("all", *c.slices)]
    total = ours = theirs = lost = log_weight = log_loss = 0.0
    worse = better = 0
    for case in cases:
        weight = case.weight * case.value
        a, r = (right(s[case.id], case) for s in (world.artifact, world.reference))
        total, ours, theirs = total + weight, ours + weight * a, theirs + weight * r
        lost += weight * max(0.0, r - a)
        worse, better = worse + (a < r), better + (a > r)
        if case.kind == "choice":
            log_weight += weight
            for sign, scores in ((1, world.artifact), (-1, world.reference)):
                s = scores[case.id]
                assert isinstance(s, np.ndarray)
                log_loss += sign * weight * float(np.log(np.exp(s - s[case.stratum]).sum()))
    assert found.cases == len(cases)
    assert found.score == pytest.approx(ours / total)
    assert found.reference_score == pytest.approx(theirs / total)
    assert found.retention == pytest.approx(ours / theirs)
    assert found.broken == pytest.approx(lost / theirs)
    assert (found.broken_cases, found.fixed_cases) == (worse, better)
    assert found.log_score_loss == pytest.approx(log_loss / log_weight, abs=1e-5)
    assert found.score_interval.low < found.score < found.score_interval.high


def test_bits_per_byte_are_all_bits_over_all_bytes(world: World) -> None:
    evaluation = world.run()
    for name in ("all", "texts"):
        found, figures = of(evaluation, name), []
        for scores in (world.artifact, world.reference):
            bits = size = 0.0
            for case in world.cases:
                score = scores[case.id]
                if isinstance(score, TextBits):
                    length = len(case.question.encode()) * case.weight * case.value
                    bits, size = bits + length * score.bits_per_byte, size + length
            figures.append(bits / size)
        assert found.text_cases == CASES // 5
        assert found.bits_per_byte == pytest.approx(figures[0], abs=1e-5)
        assert found.reference_bits_per_byte == pytest.approx(figures[1], abs=1e-5)
        assert found.bits_per_byte_loss == pytest.approx(figures[0] - figures[1], abs=1e-5)
    assert of(evaluation, "texts").cases == 0
    assert math.isnan(of(evaluation, "texts").score)
    assert of(evaluation, "third=1").bits_per_byte is None


def test_texts_are_held_by_a_clause_of_their_own(world: World) -> None:
    answers = {k: s for k, s in world.reference.items() if not isinstance(s, TextBits)}
    world.artifact |= answers  # so that nothing else is lost
    for limit, verdict in ((0.5, "pass"), (0.0, "underpowered")):
        evaluation = world.run(Floor(max_bits_per_byte_loss=limit))
        (check,) = evaluation.floor
        assert (check.clause, check.verdict) == ("max_bits_per_byte_loss", verdict)
        assert evaluation.verdict == verdict
        assert (check.cases_needed is None) == (verdict == "pass")
    for case_id, score in world.artifact.items():
        if isinstance(score, TextBits):
            world.artifact[case_id] = TextBits(score.bits_per_byte + 0.4, score.size_bytes)
    evaluation = world.run(Floor(score=0.5, max_bits_per_byte_loss=0.05))
    assert [check.verdict for check in evaluation.floor] == ["pass", "fail", "fail"]
    assert evaluation.verdict == "fail"
    row = {"texts": SliceSpec(max_bits_per_byte_loss=0.05)}
    (_, held) = world.run(Floor(score=0.5), row).floor
    assert (held.clause, held.verdict) == ("max_bits_per_byte_loss", "fail")
    (_, unnamed) = world.run(Floor(score=0.5)).floor
    assert (unnamed.clause, unnamed.slice) == ("unnamed loss in texts", "texts")
    given_up = {"texts": SliceSpec(sacrificed="nobody reads them")}
    assert world.run(Floor(score=0.5), given_up).verdict == "pass"


def test_a_sample_without_texts_leaves_their_clause_open(world: World) -> None:
    evaluation = world.run(Floor(score=0.5, max_bits_per_byte_loss=1.0), only="generate")
    assert [check.verdict for check in evaluation.floor] == ["pass", "not measured"]
    assert evaluation.verdict == "underpowered"
    assert math.isnan(evaluation.overall.log_score_loss)
    assert math.isnan(evaluation.overall.macro_f1)


def test_a_suite_of_texts_alone_is_judged(world: World) -> None:
    evaluation = world.run(Floor(max_bits_per_byte_loss=1.0), only="text")
    assert evaluation.verdict == "pass"
    assert [found.slice for found in evaluation.slices] == ["all", "texts"]
    assert evaluation.overall.text_cases == evaluation.cases == CASES // 5
    assert evaluation.flips == []
    assert world.run(only="text").verdict == "unjudged"


@pytest.mark.parametrize(
    ("only", "floor", "message"),
    [
        ("text", Floor(retention=0.9), "retention is held on 'all'"),
        ("generate", Floor(max_log_score_loss=0.1), "max_log_score_loss is held on 'all'"),
    ],
)
def test_a_clause_on_a_figure_that_no_case_gives_is_refused(
    world: World, only: str, floor: Floor, message: str
) -> None:
    lines = (world.root / "suite.jsonl").read_text().split("\n")
    kept = [line for line in lines if json.loads(line)["kind"] == only]
    (world.root / "kept.jsonl").write_text("\n".join(kept))
    with pytest.raises(InputError, match=message):
        world.run(floor, only=only, suite="kept.jsonl")


def test_a_sample_that_lacks_a_kind_leaves_its_clauses_open(world: World) -> None:
    evaluation = world.run(Floor(retention=0.5, max_log_score_loss=9.0), only="text")
    assert [check.verdict for check in evaluation.floor] == ["not measured"] * 2
    evaluation = world.run(Floor(retention=0.5, max_log_score_loss=9.0), only="generate")
    assert [check.verdict for check in evaluation.floor] == ["pass", "not measured"]
    assert evaluation.verdict == "underpowered"


def test_scores_of_another_kind_are_refused(world: World) -> None:
    with pytest.raises(InputError, match="case c0 was not scored as a case of the kind 'choice'"):
        world.run(c0=Answer("a", 1.0))
    with pytest.raises(InputError, match="case c2 was not scored as a case of the kind 'generate'"):
        world.run(c2=np.array([0.0, 1.0]))


def test_fields_are_named_with_their_f1(world: World) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    found = {field.field: field for field in world.run().fields}
    assert list(found) == ["count", "name"]
    cases = [case for case in world.cases if case.kind == "generate"]
    for name, field in found.items():
        for scores, f1 in ((world.artifact, field.f1), (world.reference, field.reference_f1)):
            wanted, given, weights = [], [], []
            for case in cases:
                score, expected = scores[case.id], json.loads(case.expected)[name]
                assert isinstance(score, Answer)
                value = json.loads(score.text)[name]
                # An item for each value that is expected or given.
                for item in dict.fromkeys((expected, value)):
                    wanted.append(item == expected)
                    given.append(item == value)
                    weights.append(case.weight * case.value)
            expected_f1 = metrics.f1_score(wanted, given, sample_weight=weights)
            assert f1 == pytest.approx(expected_f1)
        assert field.cases == len(cases)


def test_flips_show_answers_in_words(world: World) -> None:
    flips = {flip.id: flip for flip in world.run(only="generate").flips}
    assert flips
    for case in world.cases:
        if case.id in flips:
            flip = flips[case.id]
            ours, theirs = world.artifact[case.id], world.reference[case.id]
            assert isinstance(ours, Answer)
            assert isinstance(theirs, Answer)
            assert (flip.artifact_answer, flip.reference_answer) == (ours.text, theirs.text)
            assert json.loads(flip.expected).keys() == {"name", "count"}
            assert (flip.kind == "broken") == (ours.grade < theirs.grade)


def pairs_of_grades(reference: list[float], artifact: list[float]) -> Pairs:
    zeros = np.zeros(len(reference), dtype=np.int64)
    return Pairs(
        weights=np.ones(len(reference)),
        answers=zeros,
        reference=zeros,
        artifact=zeros,
        reference_loss=zeros.astype(np.float64),
        artifact_loss=zeros.astype(np.float64),
        reference_grade=np.array(reference),
        artifact_grade=np.array(artifact),
    )


def test_a_loss_in_parts_is_held_against_all_signs() -> None:
    rng = np.random.default_rng(3)
    reference = rng.choice([0.0, 0.5, 2 / 3, 1.0], 14)
    artifact = np.clip(reference - rng.choice([0.0, 0.25, 0.5, 0.5, -0.25], 14), 0.0, 1.0)
    drops = (reference - artifact)[reference != artifact]
    patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=len(drops))))
    exact = float(((patterns @ np.abs(drops)) >= drops.sum() - 1e-9).mean())
    assert 0.01 < exact < 0.5
    found = loss_p_value(pairs_of_grades(reference.tolist(), artifact.tolist()))
    assert found == pytest.approx(exact, abs=0.01)
    even = pairs_of_grades([1.0] * 6 + [0.5], [0.5] * 6 + [1.0])
    assert loss_p_value(even) == pytest.approx(8 / 128)  # McNemar: 6 or more of 7


@pytest.mark.slow
def test_the_interval_of_partial_answers_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng, runs, covered = np.random.default_rng(1), 300, 0
    # The mean over many worlds: E min(1, g - d) for g uniform on thirds, d as drawn below.
    for _ in range(runs):
        reference = rng.integers(0, 4, 120) / 3
        drop = np.where(rng.random(120) < 0.1, reference, 0.0)
        interval = share_intervals(
            pairs_of_grades(reference.tolist(), (reference - drop).tolist())
        )["score_loss"]
        covered += interval.low <= 0.05 <= interval.high  # 10% of a mean of one half
    assert covered / runs > 0.92


@pytest.mark.slow
def test_the_interval_of_bits_per_byte_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng, runs, covered = np.random.default_rng(2), 300, 0
    for _ in range(runs):
        sizes = rng.integers(50, 500, 60).astype(np.float64)
        base = rng.normal(1.0, 0.3, 60)
        loss = rng.normal(0.02, 0.05, 60)
        interval = TextPairs(np.ones(60), sizes, base, base + loss).loss_interval()
        covered += interval.low <= 0.02 <= interval.high
    assert 0.90 < covered / runs < 0.98


def test_one_text_decides_nothing() -> None:
    one = TextPairs(*(np.array([x]) for x in (1.0, 100.0, 1.0, 1.5)))
    assert one.loss() == pytest.approx(0.5)
    interval = one.loss_interval()
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_a_sample_keeps_the_shares_of_kinds(world: World) -> None:
    sample = sample_cases(world.cases, 60)
    kinds = [case.kind for case in sample]
    assert abs(kinds.count("text") - 12) <= 1
    assert abs(kinds.count("choice") - 24) <= 3
    assert abs(kinds.count("generate") - 24) <= 3
