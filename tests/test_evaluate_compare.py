from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.errors import InputError
from edgedistill.evaluate import statistics
from edgedistill.evaluate.compare import compare
from edgedistill.evaluate.score import write_scores
from edgedistill.evaluate.suite import ChoiceCase, load_suite
from edgedistill.floor import Floor, SliceSpec
from edgedistill.results import Evaluation, FloorCheck, SliceQuality

CASES = 3000
CHOICES = ["bad", "fair", "good"]
DOMAINS = ["domain=mail", "domain=news", "domain=film"]
Scores = npt.NDArray[np.float64]


@dataclass
class World:
    """A suite of three even domains and a tail of 5%, and a reference that is right in 60%."""

    root: Path
    cases: list[ChoiceCase]
    reference: Scores

    def run(
        self,
        artifact: Scores,
        floor: Floor | None = None,
        slices: Mapping[str, SliceSpec] | None = None,
        chosen: list[int] | None = None,
    ) -> Evaluation:
        indices = chosen if chosen is not None else list(range(len(self.cases)))
        cases = [self.cases[i] for i in indices]
        scores = {self.cases[i].id: artifact[i] for i in indices}
        (self.root / "artifact").mkdir(exist_ok=True)
        write_scores(self.root / "artifact", cases, scores, seconds=1.5)
        out = self.root / "evaluation.json"
        compare(
            [self.root / "suite.jsonl"],
            self.root / "reference",
            self.root / "artifact",
            floor=floor,
            slices=slices or {},
            runtime="llama_cpp",
            out=out,
        )
        return Evaluation.model_validate_json(out.read_text())

    def noisy(self) -> Scores:
        """An artifact of rounded weights: flips some answers either way."""
        noise = np.random.default_rng(1).normal(0.0, 0.15, self.reference.shape)
        return self.reference + noise

    def unharmed(self, seed: int) -> Scores:
        """An artifact that breaks as many answers as it fixes, apart from chance."""
        scores, rng = self.reference.copy(), np.random.default_rng(seed)
        for i, case in enumerate(self.cases):
            right = scores[i].argmax() == case.answer
            # 60% of the cases are right and 40% wrong: 4% and 6% of them are as many
            if rng.random() < (0.04 if right else 0.06):
                scores[i, case.answer] += -20.0 if right else 20.0
        return scores

    def break_answers(self, scores: Scores, slice_name: str, share: float) -> Scores:
        """Make the artifact wrong on a share of the reference's right answers in a slice."""
        broken, rng = scores.copy(), np.random.default_rng(9)
        for i, case in enumerate(self.cases):
            right = self.reference[i].argmax() == case.answer
            if slice_name in case.slices and right and rng.random() < share:
                broken[i, case.answer] -= 20.0
        return broken


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    lines, scores = [], rng.normal(0.0, 1.0, (CASES, 3))
    for i in range(CASES):
        answer = int(rng.integers(3))
        largest = answer if rng.random() < 0.6 else (answer + 1) % 3
        scores[i, largest] = scores[i].max() + rng.gamma(2.0, 0.5)
        soft = rng.dirichlet(np.where(np.arange(3) == answer, 6.0, 1.0))
        case = {
            "id": f"c{i:04d}",
            "kind": "choice",
            "messages": [{"role": "user", "content": f"text {i}"}],
            "choices": CHOICES,
            "answer": answer,
            "soft_label": [round(float(s), 3) for s in soft],
            "slices": [DOMAINS[i % 3], *(["tail"] if i % 20 == 0 else [])],
            "weight": round(float(rng.uniform(0.5, 1.5)), 3),
        }
        lines.append(json.dumps(case))
    suite = tmp_path / "suite.jsonl"
    suite.write_text("\n".join(lines))
    cases = [case for case in load_suite([suite]) if isinstance(case, ChoiceCase)]
    (tmp_path / "reference").mkdir()
    scored = {case.id: scores[i] for i, case in enumerate(cases)}
    write_scores(tmp_path / "reference", cases, scored, seconds=2.0)
    return World(tmp_path, cases, scores)


def find(evaluation: Evaluation, clause: str, slice_name: str = "all") -> FloorCheck:
    (check,) = [c for c in evaluation.floor if (c.clause, c.slice) == (clause, slice_name)]
    return check


def quality(evaluation: Evaluation, name: str) -> SliceQuality:
    (found,) = [found for found in evaluation.slices if found.slice == name]
    return found


def test_figures_equal_a_plain_computation(world: World) -> None:
    artifact = world.break_answers(world.noisy(), "domain=news", 0.2)
    found = quality(world.run(artifact), "domain=news")
    total = right = reference_right = kept = log_score = log_loss = 0.0
    broken = 0
    for i, case in enumerate(world.cases):
        if "domain=news" not in case.slices:
            continue
        total += case.weight
        was, is_ = world.reference[i].argmax(), artifact[i].argmax()
        right += case.weight * (is_ == case.answer)
        reference_right += case.weight * (was == case.answer)
        kept += case.weight * (was == case.answer == is_)
        broken += was == case.answer != is_
        losses = []
        for scores in (artifact[i], world.reference[i]):
            soft = np.array(case.soft_label) / sum(case.soft_label or ())
            log_probs = scores - np.log(np.exp(scores).sum())
            losses.append(-float(soft @ log_probs))
        log_score += case.weight * losses[0]
        log_loss += case.weight * (losses[0] - losses[1])
    assert found.cases == 1000
    assert found.score == pytest.approx(right / total)
    assert found.reference_score == pytest.approx(reference_right / total)
    assert found.retention == pytest.approx(right / reference_right)
    assert found.broken == pytest.approx(1 - kept / reference_right)
    assert found.broken_cases == broken
    assert found.log_score == pytest.approx(log_score / total, abs=1e-5)
    assert found.log_score_loss == pytest.approx(log_loss / total, abs=1e-5)


def test_the_reference_against_itself_is_unharmed(world: World) -> None:
    floor = Floor(score=0.55, retention=0.99, max_log_score_loss=0.001, max_broken=0.01)
    evaluation = world.run(world.reference, floor)
    assert evaluation.verdict == "pass"
    assert (evaluation.overall.retention, evaluation.overall.log_score_loss) == (1.0, 0.0)
    assert evaluation.flips == []
    assert [found.slice for found in evaluation.slices] == ["all", *sorted(DOMAINS), "tail"]
    assert (evaluation.cases, evaluation.cases_in_suite) == (CASES, CASES)
    assert (evaluation.runtime, evaluation.seconds) == ("llama_cpp", 1.5)


@pytest.mark.slow
def test_an_unharmed_artifact_is_not_failed(world: World) -> None:
    protected = {"domain=mail": SliceSpec(protected=True)}
    verdicts = []
    for seed in range(12):
        evaluation = world.run(world.unharmed(seed), Floor(retention=0.95), protected)
        assert evaluation.overall.broken_cases > 30  # it does flip
        assert evaluation.overall.fixed_cases > 30
        verdicts.append(evaluation.verdict)
    # protected and unnamed slices are tested at 2.5% each: 3 or more of 12 have a chance of 2%
    assert verdicts.count("pass") >= 10, verdicts


def test_a_loss_in_a_slice_that_nobody_named_is_found(world: World) -> None:
    artifact = world.break_answers(world.noisy(), "tail", 0.3)
    evaluation = world.run(artifact, Floor(retention=0.95))
    assert find(evaluation, "retention").verdict == "pass"  # 5% of the cases hardly show overall
    check = find(evaluation, "unnamed loss", "tail")
    assert check.verdict == evaluation.verdict == "fail"
    assert check.value is not None
    assert check.value > 0.1 > check.limit
    assert [c.slice for c in evaluation.floor if c.clause == "unnamed loss"] == ["tail"]


def test_a_named_or_sacrificed_slice_is_held_to_its_own_row_alone(world: World) -> None:
    artifact = world.break_answers(world.noisy(), "tail", 0.3)
    sacrificed = {"tail": SliceSpec(sacrificed="the app never sees these")}
    evaluation = world.run(artifact, Floor(retention=0.95), sacrificed)
    assert evaluation.verdict == "pass"
    check = find(evaluation, "sacrificed", "tail")
    assert check.value is not None
    assert (check.verdict, check.value > 0.1) == ("pass", True)
    evaluation = world.run(artifact, Floor(retention=0.95), {"tail": SliceSpec(retention=0.5)})
    assert evaluation.verdict == "pass"
    evaluation = world.run(artifact, Floor(retention=0.95), {"tail": SliceSpec(retention=0.9)})
    assert find(evaluation, "retention", "tail").verdict == evaluation.verdict == "fail"


def test_a_small_loss_in_an_unnamed_slice_is_tolerated_as_the_floor_tolerates_it(
    world: World,
) -> None:
    artifact = world.break_answers(world.reference, "domain=film", 0.06)
    evaluation = world.run(artifact, Floor(score=0.5))
    check = find(evaluation, "unnamed loss", "domain=film")
    assert (check.verdict, check.limit) == ("fail", 0.02)
    # a floor that lets the whole suite lose 10% lets a slice lose it too
    evaluation = world.run(artifact, Floor(score=0.5, retention=0.9))
    assert evaluation.verdict == "pass"


def test_a_protected_slice_fails_on_any_significant_loss(world: World) -> None:
    artifact = world.break_answers(world.reference, "domain=film", 0.015)
    evaluation = world.run(artifact, Floor(), {"domain=film": SliceSpec(protected=True)})
    check = find(evaluation, "protected", "domain=film")
    assert check.verdict == evaluation.verdict == "fail"
    assert check.value is not None
    assert 0.0 < check.value < 0.02  # below what an unnamed slice may lose


def test_a_protected_slice_too_small_to_show_a_loss_decides_nothing(world: World) -> None:
    chosen = list(range(600))  # 30 of them in the tail
    protected = {"tail": SliceSpec(protected=True)}
    evaluation = world.run(world.unharmed(0), Floor(), protected, chosen)
    check = find(evaluation, "protected", "tail")
    assert check.verdict == evaluation.verdict == "underpowered"
    assert check.cases_needed is not None
    assert 10 < check.cases_needed < 5000


@pytest.mark.parametrize(
    ("floor", "clause", "verdict"),
    [
        (Floor(score=0.30), "score", "pass"),
        (Floor(score=0.80), "score", "fail"),
        (Floor(retention=0.5), "retention", "pass"),
        (Floor(retention=0.97), "retention", "fail"),
        (Floor(max_broken=0.5), "max_broken", "pass"),
        (Floor(max_broken=0.05), "max_broken", "fail"),
        (Floor(max_log_score_loss=20.0), "max_log_score_loss", "pass"),
        (Floor(max_log_score_loss=0.05), "max_log_score_loss", "fail"),
    ],
)
def test_each_clause_is_judged_by_its_interval(
    world: World, floor: Floor, clause: str, verdict: str
) -> None:
    artifact = world.break_answers(world.noisy(), "domain=film", 0.35)
    check = find(world.run(artifact, floor), clause)
    assert (check.verdict, check.limit) == (verdict, floor.limits()[clause])
    assert check.cases_needed is None


@pytest.mark.parametrize("clause", ["score", "retention", "max_log_score_loss", "max_broken"])
def test_a_limit_inside_the_interval_is_undecided(world: World, clause: str) -> None:
    overall = world.run(world.noisy()).overall
    measured = {
        "score": overall.score,
        "retention": overall.retention,
        "max_log_score_loss": overall.log_score_loss,
        "max_broken": overall.broken,
    }
    nudge = -0.001 if clause in ("score", "retention") else 0.001
    limit = {clause: measured[clause] + nudge}
    evaluation = world.run(world.noisy(), Floor.model_validate(limit))
    check = find(evaluation, clause)
    assert check.verdict == evaluation.verdict == "underpowered"
    assert check.cases_needed is not None
    assert check.cases_needed > CASES
    lenient = Floor.model_validate(limit | {"when_underpowered": "pass"})
    evaluation = world.run(world.noisy(), lenient)
    assert (find(evaluation, clause).verdict, evaluation.verdict) == ("underpowered", "pass")


def test_without_a_floor_nothing_is_judged(world: World) -> None:
    evaluation = world.run(world.break_answers(world.noisy(), "domain=mail", 0.9))
    assert (evaluation.verdict, evaluation.floor) == ("unjudged", [])
    slices = {"domain=mail": SliceSpec(retention=0.9)}
    evaluation = world.run(world.break_answers(world.noisy(), "domain=mail", 0.9), slices=slices)
    assert evaluation.verdict == "fail"


def test_a_sample_is_compared_on_its_own_cases(world: World) -> None:
    chosen = list(range(1, CASES, 20))  # without the tail
    evaluation = world.run(
        world.reference,
        Floor(retention=0.9),
        {"tail": SliceSpec(protected=True, retention=0.9)},
        chosen,
    )
    assert (evaluation.cases, evaluation.cases_in_suite) == (len(chosen), CASES)
    weights = np.array([world.cases[i].weight for i in chosen])
    right = np.array([world.reference[i].argmax() == world.cases[i].answer for i in chosen])
    assert evaluation.overall.reference_score == pytest.approx(np.average(right, weights=weights))
    assert evaluation.overall.retention == 1.0
    for clause in ("protected", "retention"):
        check = find(evaluation, clause, "tail")
        assert (check.verdict, check.value, check.interval) == ("not measured", None, None)
    assert evaluation.verdict == "underpowered"


def test_flips_show_the_heaviest_broken_cases_first(world: World) -> None:
    evaluation = world.run(world.break_answers(world.noisy(), "domain=film", 0.2))
    assert len(evaluation.flips) == 50
    by_id = {case.id: (i, case) for i, case in enumerate(world.cases)}
    weights = []
    for flip in evaluation.flips:
        i, case = by_id[flip.id]
        assert flip.kind == "broken"
        assert flip.expected == flip.reference_answer == CHOICES[case.answer]
        assert flip.artifact_answer != flip.expected
        assert (flip.prompt, flip.slices) == (f"text {i}", list(case.slices))
        weights.append(case.weight)
    assert weights == sorted(weights, reverse=True)
    few = world.reference.copy()
    wrong = next(i for i, c in enumerate(world.cases) if few[i].argmax() != c.answer)
    right = next(i for i, c in enumerate(world.cases) if few[i].argmax() == c.answer)
    few[wrong, world.cases[wrong].answer] += 50.0
    few[right, world.cases[right].answer] -= 50.0
    assert [flip.kind for flip in world.run(few).flips] == ["broken", "fixed"]


def test_scores_of_another_suite_are_refused(world: World) -> None:
    lines = (world.root / "suite.jsonl").read_text().split("\n")
    (world.root / "suite.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match="case c0000 is not in the suite"):
        world.run(world.reference)
    changed = json.loads(lines[0]) | {"choices": [*CHOICES, "best"], "soft_label": None}
    (world.root / "suite.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
    with pytest.raises(InputError, match="case c0000 has 3 scores for 4 choices"):
        world.run(world.reference)


def test_a_case_that_the_reference_lacks_is_refused(world: World) -> None:
    scores = world.root / "reference" / "scores.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="case c0000 was not scored by the reference"):
        world.run(world.reference)


def test_a_slice_that_the_suite_lacks_is_refused(world: World) -> None:
    with pytest.raises(InputError, match="no case of the suite is in the slice 'domain=mial'"):
        world.run(world.reference, Floor(), {"domain=mial": SliceSpec(protected=True)})
