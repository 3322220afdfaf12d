"""Held against the model of transformers of lm-evaluation-harness: same tasks, same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.chat import Chat
from edgedistill.errors import InputError, UsageError
from edgedistill.evaluate.command import Request, evaluate_artifact
from edgedistill.evaluate.harness import HarnessTask, find_task, score_task
from edgedistill.evaluate.score import Answer, TextBits, read_scores
from edgedistill.exporters.gguf import Gguf
from edgedistill.runtimes.torch_reference import TorchReference
from edgedistill.student import Student

Tiny = Callable[..., Path]
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="the extra lm-eval is not installed",
)
WORDS = ["fox", "dog", "film", "plot", "number", "naïve", "café", "42", "lazy", "quick"]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "The quick brown {{word}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "I love this {{word}} ",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["!", "\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks of one's own, each with the same documents."""
    directory = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        words = rng.choice(WORDS, 4, replace=False).tolist()
        # The last is longer than the window of 64 tokens.
        text = " ".join(rng.choice(WORDS, 40 if i == 11 else 3 + i % 5).tolist())
        row = {"word": words[0], "choices": [f" {w}" for w in words[1:]], "answer": i % 3}
        rows.append(row | {"text": text})
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, fields in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(directory / "test.jsonl")}},
            "test_split": "test",
            **fields,
        }
        (directory / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return directory


def run_harness(model: Any, tasks: Path, name: str, *, chat: bool) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
    )
    return found


def numbers(values: Any) -> list[float]:
    """All numbers in a nest of lists and tuples; texts as they are."""
    if isinstance(values, str | int | float):
        return [values]  # type: ignore[list-item]
    return [number for value in values for number in numbers(value)]


def same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(found) == len(expected) and all(
        a == b if isinstance(a, str) else a == pytest.approx(b, abs=2e-3)
        for a, b in zip(found, expected, strict=True)
    )


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_gives_the_numbers_of_the_harness_itself(
    tiny: Tiny, tasks: Path, name: str, chat: bool
) -> None:
    from lm_eval.models.huggingface import HFLM

    from edgedistill.evaluate.harness_model import SessionLM

    theirs = HFLM(
        pretrained=str(tiny()), dtype="float32", device="cpu", batch_size=1, max_length=64
    )
    expected = run_harness(theirs, tasks, name, chat=chat)
    with TorchReference().open(tiny(), context_tokens=64, threads=1) as session:
        found = run_harness(SessionLM(session, tiny(), Chat()), tasks, name, chat=chat)
    for ours, other in zip(found["samples"][name], expected["samples"][name], strict=True):
        assert ours["arguments"] == other["arguments"]
        assert same(numbers(ours["resps"]), numbers(other["resps"]))
    scores = {k: v for k, v in expected["results"][name].items() if isinstance(v, float)}
    assert scores
    for key, value in scores.items():
        assert found["results"][name][key] == pytest.approx(value, rel=1e-3)


@needs_harness
@pytest.mark.slow
def test_a_changed_template_changes_the_numbers(tiny: Tiny, tasks: Path) -> None:
    """So that the test above could fail."""
    from edgedistill.evaluate.harness_model import SessionLM

    with TorchReference().open(tiny(), context_tokens=64, threads=1) as session:
        plain, spoken = (
            run_harness(SessionLM(session, tiny(), chat), tasks, "tiny_choice", chat=True)
            for chat in (Chat(), Chat(system="Rate it."))
        )
    resps = [numbers([s["resps"] for s in r["samples"]["tiny_choice"]]) for r in (plain, spoken)]
    assert not same(*resps)


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_is_judged_as_any_suite(tiny: Tiny, tasks: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "artifact").mkdir()
    Gguf().export(Student(tiny()), tmp_path / "artifact", context_tokens=64)
    request = Request(
        tmp_path / "artifact",
        (Path(f"lm_eval:{tasks}/{name}"),),
        str(tiny()),
        tmp_path / "cache",
        context_tokens=64,
        threads=1,
        sample=6,
    )
    outcome = evaluate_artifact(request)
    assert outcome.evaluation is not None
    evaluation = outcome.evaluation
    assert [found.slice for found in evaluation.slices] == ["all", name]
    assert (evaluation.cases, evaluation.verdict) == (6, "unjudged")
    if name == "tiny_text":
        assert abs(evaluation.overall.bits_per_byte_loss or 1.0) < 0.05
    else:
        assert evaluation.overall.score == evaluation.overall.reference_score


@needs_harness
@pytest.mark.slow
def test_the_grade_of_a_case_is_the_metric_of_its_document(
    tiny: Tiny, tasks: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(
        pretrained=str(tiny()), dtype="float32", device="cpu", batch_size=1, max_length=64
    )
    for name in ("tiny_choice", "tiny_text"):
        expected = run_harness(theirs, tasks, name, chat=True)["results"][name]
        dst = tmp_path / name
        dst.mkdir()
        score_task(
            tiny(),
            "torch_reference",
            tiny(),
            HarnessTask(name=name, directory=tasks),
            dst,
            sample=None,
            chat=Chat(),
            threads=1,
            context_tokens=64,
        )
        scores = read_scores(dst).values()
        assert len(scores) == 12
        if name == "tiny_choice":
            grades = [score.grade for score in scores if isinstance(score, Answer)]
            assert np.mean(grades) == pytest.approx(expected["acc,none"])
        else:
            texts = [score for score in scores if isinstance(score, TextBits)]
            bits = sum(t.bits_per_byte * t.size_bytes for t in texts)
            found = bits / sum(t.size_bytes for t in texts)
            assert found == pytest.approx(expected["bits_per_byte,none"], rel=1e-4)


@needs_harness
def test_a_task_that_is_not_there_is_named(tiny: Tiny, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no task 'tiny_chioce'"):
        score_task(
            tiny(),
            "torch_reference",
            tiny(),
            HarnessTask(name="tiny_chioce", directory=tasks),
            tmp_path,
            sample=None,
            chat=Chat(),
            threads=1,
            context_tokens=64,
        )


@needs_harness
def test_what_a_session_cannot_do_is_refused(tiny: Tiny) -> None:
    from lm_eval.api.instance import Instance

    from edgedistill.evaluate.harness_model import SessionLM

    def ask(options: dict[str, Any]) -> Instance:
        return Instance("generate_until", {}, ("Who?", options), 0)

    with TorchReference().open(tiny(), context_tokens=64, threads=1) as session:
        model = SessionLM(session, tiny(), Chat())
        with pytest.raises(UsageError, match="samples its answers"):
            model.generate_until([ask({"do_sample": True, "max_gen_toks": 4})])
        with pytest.raises(UsageError, match="leaves no room"):
            model.generate_until([ask({"max_gen_toks": 64})])
        with pytest.raises(UsageError, match="a continuation of 65 tokens does not fit"):
            model._loglikelihood_tokens([(None, [1], [5] * 65)])


def test_a_task_is_a_suite_of_its_own(tmp_path: Path) -> None:
    assert find_task([Path("suite.jsonl")]) is None
    assert find_task([Path("lm_eval:hellaswag")]) == HarnessTask(name="hellaswag")
    own = find_task([Path(f"lm_eval:{tmp_path}/mine")])
    assert own == HarnessTask(name="mine", directory=tmp_path)
    for wrong in (["lm_eval:a", "lm_eval:b"], ["lm_eval:a", "suite.jsonl"], ["lm_eval:"]):
        with pytest.raises(UsageError, match="is a suite of its own"):
            find_task([Path(text) for text in wrong])
    with pytest.raises(UsageError, match="there is no directory"):
        find_task([Path(f"lm_eval:{tmp_path}/nowhere/mine")])


def test_a_task_without_a_grade_is_refused() -> None:
    from edgedistill.evaluate.harness import _cases

    document = {"doc_id": 0, "metrics": ["bleu"], "bleu": ("a", "b"), "arguments": [("x",)]}
    with pytest.raises(InputError, match=r"no metric of the task t \(bleu\) grades"):
        list(_cases({"t": [document]}))
