"""What is said of choices, answers in words and texts holds for a suite that has them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.beside import Beside
from edgedistill.errors import InputError, UsageError
from edgedistill.evaluate.compare import compare
from edgedistill.evaluate.power import Spread, plan_clauses
from edgedistill.evaluate.score import Answer, Score, TextBits, write_scores
from edgedistill.evaluate.score_early import sample
from edgedistill.evaluate.stopping import STOPPING_FILE, look_sizes
from edgedistill.evaluate.suite import Case, load_suite
from edgedistill.evaluate.waivers import Waiver, apply_waivers
from edgedistill.floor import Floor, SliceSpec
from edgedistill.lowered import held_limits, is_weaker
from edgedistill.recipe_load import load_recipe
from edgedistill.results import Evaluation
from tests.recipes import MINIMAL, write_recipe

Tiny = Callable[..., Path]
SURE, UNSURE = np.array([-0.1, -2.4]), np.array([-0.9, -0.6])


def write_mixed(path: Path, count: int, *, texts: int = 0) -> list[Case]:
    """Half choices (slice ``picks``), half answers in words (slice ``words``), then texts."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        asked = {"id": f"c{i:05d}", "messages": [{"role": "user", "content": f"question {i}"}]}
        if i % 2:
            chosen = {"kind": "choice", "choices": ["yes", "no"], "answer": 0, "slices": ["picks"]}
            rows.append(asked | chosen)
        else:
            rows.append(
                asked | {"kind": "generate", "exact": "yes", "max_tokens": 8, "slices": ["words"]}
            )
    rows += [
        {"id": f"t{i}", "kind": "text", "text": f"text {i}", "slices": ["texts"]}
        for i in range(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_suite([path])


def score(case: Case, *, right: bool, bits: float = 1.0) -> Score:
    if case.kind == "choice":
        return SURE if right else UNSURE
    if case.kind == "generate":
        return Answer("yes" if right else "no", float(right))
    return TextBits(bits, len(case.question.encode()))


def judge(
    root: Path,
    cases: Sequence[Case],
    reference: Mapping[str, Score],
    artifact: Mapping[str, Score],
    floor: Floor | None,
    specs: Mapping[str, SliceSpec] | None = None,
    beside: Beside | None = None,
) -> Evaluation:
    for name, scores in (("reference", reference), ("artifact", artifact)):
        (root / name).mkdir(exist_ok=True)
        scored = [case for case in cases if case.id in scores]
        write_scores(root / name, scored, scores, seconds=1.0)
    compare(
        [root / "suite.jsonl"],
        root / "reference",
        root / "artifact",
        floor=floor,
        slices=specs or {},
        runtime="llama_cpp",
        out=root / "evaluation.json",
        beside=beside,
    )
    return Evaluation.model_validate_json((root / "evaluation.json").read_text())


def test_a_loss_of_answers_in_words_that_nobody_named_fails_until_it_is_waived(
    tmp_path: Path,
) -> None:
    cases = write_mixed(tmp_path / "suite.jsonl", 400, texts=3)
    lost = {case.id for case in cases if case.kind == "generate"} & {
        case.id for i, case in enumerate(cases) if i % 8 == 0
    }
    reference = {case.id: score(case, right=True) for case in cases}
    artifact = {case.id: score(case, right=case.id not in lost, bits=1.2) for case in cases}
    floor = Floor(score=0.5, max_bits_per_byte_loss=0.1)
    found = judge(tmp_path, cases, reference, artifact, floor)
    assert found.verdict == "fail"
    failed = {(c.clause, c.slice): c.value for c in found.floor if c.verdict == "fail"}
    assert failed == {
        ("unnamed loss", "words"): pytest.approx(0.25),
        ("max_bits_per_byte_loss", "all"): pytest.approx(0.2),
    }

    def waiver(name: str, clause: str, value: float) -> Waiver:
        return Waiver(
            slice=name,
            by="Ann",
            because="a test",
            on="2026-01-01",
            until="2026-02-01",
            recipe="x",
            rung="int4",
            format="gguf",
            sha256="0" * 64,
            consented={clause: value},
        )

    words = waiver("words", "unnamed loss", 0.25)
    for limit, verdict in ((0.21, "pass"), (0.19, "fail")):
        waivers = [words, waiver("all", "max_bits_per_byte_loss", limit)]
        waived = apply_waivers(found, waivers, floor=floor, today=date(2026, 1, 15))
        assert waived.verdict == verdict


def test_the_router_and_calibration_are_of_the_choices_alone(tmp_path: Path) -> None:
    cases = write_mixed(tmp_path / "suite.jsonl", 400, texts=2)
    scores = {case.id: score(case, right=i % 4 != 3) for i, case in enumerate(cases)}
    found = judge(tmp_path, cases, scores, scores, None, beside=Beside(router_accuracy=0.9))
    assert found.router is not None
    # Of the choices those that are wrong are unsure, and all answers in words are right.
    assert found.router.cases_fitted + found.router.cases_reported == 200
    assert found.router.accuracy is not None
    assert found.router.accuracy.value == 1.0
    queue = [json.loads(line)["id"] for line in (tmp_path / "queue.jsonl").read_text().splitlines()]
    assert set(queue) == {case.id for i, case in enumerate(cases[:400]) if i % 4 == 3}
    quality = {part.slice: part for part in found.slices}
    assert [name for name, part in quality.items() if part.choice] == ["all", "picks"]
    overall = quality["all"].choice
    assert overall is not None
    assert (overall.cases, overall.chance) == (200, 0.5)


@pytest.mark.parametrize(("broken", "verdict"), [(0.0, "pass"), (0.5, "fail")])
def test_sampling_stops_early_on_choices_and_answers_together(
    tmp_path: Path, broken: float, verdict: str
) -> None:
    cases = write_mixed(tmp_path / "suite.jsonl", 6000)
    rng = np.random.default_rng(3)
    reference = {case.id: score(case, right=True) for case in cases}
    artifact = {case.id: score(case, right=bool(rng.random() >= broken)) for case in cases}
    floor = Floor(retention=0.9)
    found, stopping = sample(
        cases,
        reference,
        lambda batch: {case.id: artifact[case.id] for case in batch},
        floor=floor,
        slices={},
    )
    assert len(found) < 3000
    assert stopping.looks == look_sizes(6000)[: len(stopping.looks)]
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / STOPPING_FILE).write_text(stopping.model_dump_json())
    early = judge(tmp_path, cases, reference, found, floor)
    assert (early.verdict, early.stopped_early) == (verdict, True)
    (tmp_path / "artifact" / STOPPING_FILE).unlink()
    assert judge(tmp_path, cases, reference, artifact, floor).verdict == verdict


def test_sampling_does_not_stop_early_on_texts(tmp_path: Path, tiny: Tiny) -> None:
    cases = write_mixed(tmp_path / "suite.jsonl", 20, texts=2)
    scores = {case.id: score(case, right=True) for case in cases}
    with pytest.raises(InputError, match="t0 is a text, and sampling cannot stop early"):
        sample(cases, scores, lambda batch: scores, floor=Floor(score=0.1), slices={})
    text = MINIMAL + "suite: suite.jsonl\nfloor: {{score: 0.1}}\nevaluate: {{stop_early: true}}\n"
    recipe = write_recipe(tmp_path, tiny(), text)
    with pytest.raises(UsageError, match="stop_early: the suite holds texts"):
        load_recipe(recipe)
    write_mixed(tmp_path / "suite.jsonl", 20)
    load_recipe(recipe)


def test_what_needs_choices_is_refused_on_a_suite_without_any(tmp_path: Path, tiny: Tiny) -> None:
    write_mixed(tmp_path / "suite.jsonl", 1)
    text = MINIMAL + "suite: suite.jsonl\nrouter: {{target_accuracy: 0.8}}\n"
    recipe = write_recipe(tmp_path, tiny(), text)
    with pytest.raises(UsageError, match="router: the suite has no case of the kind 'choice'"):
        load_recipe(recipe)
    write_mixed(tmp_path / "suite.jsonl", 2)
    load_recipe(recipe)


def test_the_plan_counts_the_cases_that_a_clause_rests_on(tmp_path: Path) -> None:
    cases = write_mixed(tmp_path / "suite.jsonl", 800, texts=5)
    alone = [case for case in cases if case.kind == "choice"]
    assumed = Spread(flips=0.06, log_score_sd=0.25, reference_score=0.7)

    def plan(chosen: Sequence[Case]) -> dict[tuple[str, str], float]:
        floor = Floor(retention=0.95, max_log_score_loss=0.03)
        planned = plan_clauses(chosen, floor, {}, {}, assumed)
        return {(clause.slice, clause.clause): clause.smallest for clause in planned}

    mixed, choices = plan(cases), plan(alone)
    assert not any(name == "texts" for name, _ in mixed)
    log_score = ("all", "max_log_score_loss")
    assert mixed[log_score] == pytest.approx(choices[log_score])
    retention = ("all", "retention")
    assert mixed[retention] == pytest.approx(choices[retention] / 2**0.5, rel=0.02)
    assert plan([case for case in cases if case.kind == "text"]) == {}


def test_a_lowered_clause_on_texts_is_found(tmp_path: Path) -> None:
    held = held_limits(Floor(max_bits_per_byte_loss=0.02), {}, [])
    assert held["all", "max_bits_per_byte_loss"] == 0.02
    assert is_weaker("max_bits_per_byte_loss", 0.03, 0.02)
    assert not is_weaker("max_bits_per_byte_loss", 0.01, 0.02)
