from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from edgedistill.beside import Beside
from edgedistill.errors import InputError
from edgedistill.evaluate import statistics
from edgedistill.evaluate.previous import question_sha256
from edgedistill.evaluate.suite import ChoiceCase
from edgedistill.evaluate.teacher import NO_ANSWER, read_teacher
from edgedistill.results import Against
from tests.choice_suite import CHOICES, Disk, Scores, disturb, make_cases, make_scores


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    return path


def against(disk: Disk, artifact: Scores, beside: Beside) -> Against:
    (found,) = disk.evaluate(artifact, beside).against
    return found


def test_a_teacher_stands_beside_the_reference_on_the_cases_that_it_answered(
    tmp_path: Path,
) -> None:
    cases = make_cases(300)
    reference = make_scores(cases, 1)
    disk = Disk.write(tmp_path, cases, reference)
    artifact = disturb(reference, 2)
    rng = np.random.default_rng(3)
    answered = {case.id: int(rng.integers(4)) for case in cases[:200]}
    lines = [{"id": name, "answer": CHOICES[i]} for name, i in answered.items()]
    teacher = write_lines(tmp_path / "answers.jsonl", [*lines, {"id": "elsewhere", "answer": "x"}])
    found = against(disk, artifact, Beside(teacher=teacher))
    assert (found.kind, found.cases) == ("teacher", 200)
    assert [part.slice for part in found.slices] == ["all", "common", "rare"]
    for part in found.slices:
        inside = [c for c in cases[:200] if part.slice in ("all", *c.slices)]
        total = sum(c.weight for c in inside)
        own = {c.id: int(artifact[c.id].argmax()) for c in inside}
        score = sum(c.weight for c in inside if answered[c.id] == c.answer) / total
        artifact_score = sum(c.weight for c in inside if own[c.id] == c.answer) / total
        alike = sum(c.weight for c in inside if own[c.id] == answered[c.id]) / total
        assert part.cases == len(inside)
        assert part.score == pytest.approx(score)
        assert part.artifact_score == pytest.approx(artifact_score)
        assert part.agreement == pytest.approx(alike)
        assert part.gain.value == pytest.approx(artifact_score - score)
        assert part.gain.interval.low < part.gain.value < part.gain.interval.high
        broken = [c for c in inside if answered[c.id] == c.answer != own[c.id]]
        fixed = [c for c in inside if answered[c.id] != c.answer == own[c.id]]
        assert (part.broken_cases, part.fixed_cases) == (len(broken), len(fixed))
        assert part.divergence is None
    assert found.slices[0].gain.interval.low > 0.2  # it answers at random
    flip = found.flips[0]
    assert flip.kind == "broken"
    assert flip.reference_answer == flip.expected == CHOICES[answered[flip.id]]


def test_a_teacher_may_give_distributions_scores_or_no_answer(tmp_path: Path) -> None:
    cases = make_cases(4)
    reference = make_scores(cases, 1)
    lines = [
        {"id": cases[0].id, "distribution": [0.1, 0.6, 0.3, 0.0]},
        {"id": cases[1].id, "log_probs": [-9.0, -8.0, -7.0, -10.0]},
        {"id": cases[2].id, "answer": 3},
        {"id": cases[3].id, "answer": None},
    ]
    teacher = write_lines(tmp_path / "answers.jsonl", lines)
    answers = read_teacher(teacher, cases)
    assert [answers.answers[case.id] for case in cases] == [1, 2, 3, NO_ANSWER]
    np.testing.assert_allclose(
        np.exp(answers.log_probs[cases[1].id]), softmax([-9.0, -8.0, -7.0, -10.0])
    )
    disk = Disk.write(tmp_path, cases, reference)
    found = against(disk, reference, Beside(teacher=teacher))
    rows = [softmax(np.round(reference[case.id], 6)) for case in cases[:2]]
    soft = np.maximum([0.1, 0.6, 0.3, 0.0], 1e-6)
    kl = [entropy(soft, rows[0]), entropy(softmax([-9.0, -8.0, -7.0, -10.0]), rows[1])]
    weights = [case.weight for case in cases[:2]]
    assert found.slices[0].divergence == pytest.approx(np.average(kl, weights=weights), rel=1e-4)
    # who gave no answer was wrong, and has nothing to show in a list of flips
    assert all(flip.id != cases[3].id for flip in found.flips)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "c0-00000", "answer": "goood"}', r"answer = \"goood\" is none of"),
        ('{"id": "c0-00000", "answer": 4}', "answer = 4 is none of"),
        ('{"id": "c0-00000", "answer": true}', "answer = true is none of"),
        ('{"id": "c0-00000", "answer": 1, "log_probs": [0, 0, 0, 0]}', "has not one of"),
        ('{"id": "c0-00000"}', "has not one of"),
        ('{"id": "c0-00000", "distribution": [0.5, 0.5]}', "has not 4 numbers"),
        ('{"id": "c0-00000", "distribution": [0.5, 0.7, -0.2, 0]}', "is no distribution"),
        ('{"id": "c0-00000", "distribution": [0, 0, 0, 0]}', "is no distribution"),
        ('{"id": "c0-00000", "log_probs": [0, NaN, 0, 0]}', "is no distribution"),
        ('{"id": "c0-00000", "log_probs": [0, "1", 0, 0]}', "has not 4 numbers"),
        ('{"id": "c0-00000", "log_probs": [1' + "0" * 400 + ", 0, 0, 0]}", "too large"),
        ('{"id": "c0-00000", "answer": 1}\n' * 2, "was answered before"),
        ('{"id": "other", "answer": 1}', "answers no case of the suite"),
        ("[1]", "is not an object with an id"),
        ("{", "is not JSON"),
        ("", "answers no case of the suite"),
        (None, "cannot be read"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_damaged_file_of_answers_is_refused(
    tmp_path: Path, line: str | bytes | None, message: str
) -> None:
    path = tmp_path / "answers.jsonl"
    if line is not None:
        path.write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(InputError, match=message):
        read_teacher(path, make_cases(3))


def rewrite(case: ChoiceCase, **changes: Any) -> ChoiceCase:
    return ChoiceCase.model_validate(case.model_dump() | changes)


def test_the_previous_release_is_compared_where_the_question_is_the_same(tmp_path: Path) -> None:
    cases = make_cases(300)
    reference = make_scores(cases, 1)
    last = disturb(reference, 2)
    Disk.write(tmp_path / "last", cases, reference).evaluate(last)
    changed = [
        rewrite(case, messages=({"role": "user", "content": "rewritten"},)) if i < 50 else case
        for i, case in enumerate(cases[:250])  # and 50 that are gone
    ]
    # a corrected label or another slice is no other question
    changed[249] = rewrite(changed[249], answer=(changed[249].answer + 1) % 4, slices=("new",))
    disk = Disk.write(tmp_path / "now", changed, reference)
    artifact = disturb(reference, 3)
    found = against(
        disk,
        artifact,
        Beside(previous=tmp_path / "last" / "artifact", previous_name="int8/gguf"),
    )
    assert (found.name, found.kind, found.cases) == ("int8/gguf", "previous release", 200)
    common = changed[50:]
    broken = {
        case.id
        for case in common
        if last[case.id].argmax() == case.answer != artifact[case.id].argmax()
    }
    fixed = {
        case.id
        for case in common
        if last[case.id].argmax() != case.answer == artifact[case.id].argmax()
    }
    assert {f.id for f in found.flips if f.kind == "broken"} == broken
    assert {f.id for f in found.flips if f.kind == "fixed"} == fixed
    assert broken
    assert fixed
    rows = [
        (softmax(np.round(last[c.id], 6)), softmax(np.round(artifact[c.id], 6))) for c in common
    ]
    kl = np.average([entropy(p, q) for p, q in rows], weights=[c.weight for c in common])
    assert found.slices[0].divergence == pytest.approx(kl)


def test_the_same_release_again_has_no_flips(tmp_path: Path) -> None:
    cases = make_cases(200)
    reference = make_scores(cases, 1)
    disk = Disk.write(tmp_path, cases, reference)
    artifact = disturb(reference, 2)
    disk.evaluate(artifact, name="last")
    found = against(disk, artifact, Beside(previous=tmp_path / "last"))
    assert found.flips == []
    assert found.slices[0].agreement == 1.0
    assert found.slices[0].divergence == pytest.approx(0.0, abs=1e-9)
    gain = found.slices[0].gain
    assert gain.value == 0.0
    assert gain.interval.high < 6.0 / 200


def test_what_a_question_is_decides_its_hash() -> None:
    (case,) = make_cases(1)
    same = rewrite(case, id="other", answer=3, weight=9.0, slices=("a",))
    assert question_sha256(same) == question_sha256(case)
    assert question_sha256(rewrite(case, choices=tuple(CHOICES[::-1]))) != question_sha256(case)
    shown = ({"role": "assistant", "content": case.messages[0].content},)
    assert question_sha256(rewrite(case, messages=shown)) != question_sha256(case)


@pytest.mark.parametrize("damage", ["no cases", "no scores", "torn", "foreign"])
def test_damaged_scores_of_the_previous_release_are_refused(tmp_path: Path, damage: str) -> None:
    cases = make_cases(30)
    reference = make_scores(cases, 1)
    disk = Disk.write(tmp_path, cases, reference)
    disk.evaluate(reference, name="last")
    asked = tmp_path / "last" / "cases.jsonl"
    if damage == "no cases":
        asked.unlink()
    elif damage == "no scores":
        (tmp_path / "last" / "scores.jsonl").unlink()
    elif damage == "torn":
        asked.write_text(asked.read_text()[:-20])
    else:
        asked.write_text(asked.read_text().replace("c0-", "d0-"))
    messages = {
        "no cases": "cannot be read",
        "no scores": "no scores",
        "torn": "is not a line of cases",
        "foreign": "was asked none of these cases",
    }
    with pytest.raises(InputError, match=messages[damage]):
        disk.evaluate(reference, Beside(previous=tmp_path / "last"))
