from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.chat import Chat
from edgedistill.errors import InputError, StageError, UsageError
from edgedistill.evaluate import reference
from edgedistill.evaluate.prompts import Prompt, render_prompts
from edgedistill.evaluate.reference import equal_length_batches, score_reference
from edgedistill.evaluate.score import (
    group_by_beginning,
    log_probs_of,
    read_scores,
    read_seconds,
    score_artifact,
    score_prompts,
)
from edgedistill.evaluate.suite import load_suite, sample_cases
from edgedistill.exporters.gguf import Gguf
from edgedistill.runtimes.torch_reference import TorchReference, TorchSession
from edgedistill.session import Logits
from edgedistill.student import Student
from tests.tiny import write_student

Tiny = Callable[..., Path]
CHAT = Chat(system="Rate it.")
WORDS = ["I", "love", "terrible", "plot", "12", "345", "naïve", "café", "🙂", "the", "quick", "fox"]
SHORT = ["A", "B", "C"]  # a token each
LONG = ["terrible", "bad", "A", "quick brown fox"]


def write_suite(path: Path, choices: Sequence[str], count: int = 40) -> Path:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
            case = {
                "id": f"c{i}",
                "kind": "choice",
                "messages": [{"role": "user", "content": text}],
                "choices": list(choices),
                "answer": i % len(choices),
            }
            file.write(json.dumps(case) + "\n")
    return path


def one_by_one(student: Path, prompts: Sequence[Prompt]) -> npt.NDArray[np.float64]:
    """The definition: a whole forward pass of transformers for every choice, nothing shared."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    scores = []
    for prompt in prompts:
        for choice in prompt.choices:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt.ids + choice])).logits[0].double()
            log_probs = torch.log_softmax(logits, dim=-1)[len(prompt.ids) - 1 : -1]
            scores.append(float(log_probs[range(len(choice)), list(choice)].sum()))
    return np.array(scores).reshape(len(prompts), -1)


def scores_of(directory: Path) -> npt.NDArray[np.float64]:
    return np.stack(list(log_probs_of(read_scores(directory)).values()))


@pytest.mark.parametrize("choices", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
def test_batches_and_sessions_score_as_one_pass_a_choice_does(
    tiny: Tiny, tmp_path: Path, family: str, choices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BATCH_ROWS", 3)  # so that a length needs several batches
    changes = {"sliding_window": 24} if family == "mistral" else {}
    student = write_student(tmp_path / "m", family, **changes) if changes else tiny(family)
    suite = write_suite(tmp_path / "suite.jsonl", choices)
    prompts = render_prompts(student, load_suite([suite]), CHAT, context_tokens=256)
    assert {len(c) > 1 for p in prompts for c in p.choices} == ({False} | {choices is LONG})
    assert min(len(prompt.ids) for prompt in prompts) > 24  # longer than the sliding window
    expected = one_by_one(student, prompts)
    for name in ("batched", "session"):
        (tmp_path / name).mkdir()
    score_reference(
        student, [suite], tmp_path / "batched", chat=CHAT, threads=1, context_tokens=256
    )
    score_artifact(
        student,
        "torch_reference",
        student,
        [suite],
        tmp_path / "session",
        sample=None,
        chat=CHAT,
        threads=1,
        context_tokens=256,
    )
    np.testing.assert_allclose(scores_of(tmp_path / "batched"), expected, atol=1e-4)
    np.testing.assert_allclose(scores_of(tmp_path / "session"), expected, atol=1e-4)


def test_scores_are_written_in_suite_order_and_the_same_again(tiny: Tiny, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", LONG)
    written = []
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        score_reference(tiny(), [suite], tmp_path / name, chat=CHAT, threads=1, context_tokens=256)
        written.append((tmp_path / name / "scores.jsonl").read_bytes())
    assert written[0] == written[1]
    assert list(read_scores(tmp_path / "once")) == [f"c{i}" for i in range(40)]
    assert read_seconds(tmp_path / "once") > 0.0


def test_a_sample_is_scored_as_in_the_whole_suite(tiny: Tiny, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", LONG)
    for name, sample in (("all", None), ("some", 7)):
        (tmp_path / name).mkdir()
        score_artifact(
            tiny(),
            "torch_reference",
            tiny(),
            [suite],
            tmp_path / name,
            sample=sample,
            chat=CHAT,
            threads=1,
            context_tokens=256,
        )
    whole, some = (log_probs_of(read_scores(tmp_path / name)) for name in ("all", "some"))
    assert list(some) == [case.id for case in sample_cases(load_suite([suite]), 7)]
    for case_id, values in some.items():
        np.testing.assert_allclose(values, whole[case_id], atol=1e-4)


class Counting(TorchSession):
    """Counts the tokens that it computes."""

    computed = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.computed += len(ids)
        return super().prefill(ids)


def test_what_prompts_share_is_computed_once(tiny: Tiny, tmp_path: Path) -> None:
    cases = load_suite([write_suite(tmp_path / "suite.jsonl", SHORT)])
    chat = Chat(system="You rate films and tell nothing else but a letter.")
    prompts = render_prompts(tiny(), cases, chat, context_tokens=256)
    plain = TorchReference().open(tiny(), context_tokens=256, threads=1)
    assert isinstance(plain, TorchSession)
    session = Counting(plain._model, tiny(), 256)
    score_prompts(session, prompts)
    total = sum(len(prompt.ids) for prompt in prompts)
    distinct = {prompt.ids[:n] for prompt in prompts for n in range(1, len(prompt.ids) + 1)}
    assert session.computed >= len(distinct)  # a tree of prefixes is the least possible
    assert session.computed <= len(distinct) + 2 * len(prompts)  # groups compute some ids again
    assert session.computed < total / 2


def test_questions_on_the_same_document_share_it() -> None:
    rng = np.random.default_rng(2)
    prompts = []
    for _ in range(4):
        document = (1, 2, *rng.integers(5, 500, 300).tolist())
        for question in range(5):
            ids = (*document, 3, *rng.integers(5, 500, 8).tolist())
            prompts.append(Prompt(f"{document[2]}-{question}", ids, ((1,), (2,))))
    groups = list(group_by_beginning(sorted(prompts, key=lambda prompt: prompt.ids)))
    assert [len(group) for _, group in groups] == [5, 5, 5, 5]
    assert all(shared == 303 for shared, _ in groups)


def test_groups_hold_every_prompt_once_and_leave_it_an_id() -> None:
    rng = np.random.default_rng(3)
    prompts = [
        Prompt(f"c{i}", tuple(rng.integers(0, 3, rng.integers(1, 9)).tolist()), ((1,), (2,)))
        for i in range(300)
    ]
    groups = list(group_by_beginning(sorted(prompts, key=lambda prompt: prompt.ids)))
    assert sorted(p.id for _, group in groups for p in group) == sorted(p.id for p in prompts)
    for shared, group in groups:
        assert len({prompt.ids[:shared] for prompt in group}) == 1
        assert all(len(prompt.ids) > shared for prompt in group)
    assert list(group_by_beginning([])) == []


def test_batches_hold_one_length_and_lose_no_case() -> None:
    rng = np.random.default_rng(1)
    prompts = [
        Prompt(f"c{i}", tuple(range(length)), ((1,), (2,)))
        for i, length in enumerate([*rng.integers(1, 40, 500), 5000, 5000])
    ]
    batches = list(equal_length_batches(prompts))
    assert sorted(p.id for batch in batches for p in batch) == sorted(p.id for p in prompts)
    for batch in batches:
        assert len({len(prompt.ids) for prompt in batch}) == 1
        assert len(batch) == 1 or len(batch) * len(batch[0].ids) <= reference.BATCH_TOKENS
    assert len(batches) < 60


class Overflowing(TorchSession):
    """Logits as a float16 graph leaves them when it overflows."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        logits = super().prefill(ids).copy()
        logits[7] = np.inf
        return logits


def test_infinite_logits_are_an_error_that_names_the_case(tiny: Tiny, tmp_path: Path) -> None:
    cases = load_suite([write_suite(tmp_path / "suite.jsonl", SHORT, count=1)])
    prompts = render_prompts(tiny(), cases, CHAT, context_tokens=256)
    plain = TorchReference().open(tiny(), context_tokens=256, threads=1)
    assert isinstance(plain, TorchSession)
    with pytest.raises(StageError, match="case c0 are not finite"):
        score_prompts(Overflowing(plain._model, tiny(), 256), prompts)


def test_an_unknown_runtime_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", SHORT)
    arguments: dict[str, Any] = {"sample": 1, "chat": CHAT, "threads": 1, "context_tokens": 256}
    with pytest.raises(UsageError, match="no runtime 'torch_referense'"):
        score_artifact(tiny(), "torch_referense", tiny(), [suite], tmp_path, **arguments)
    assert not (tmp_path / "scores.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no scores"),
        ('{"id": "a"}\n', "is not a line of scores"),
        ('{"id": "a", "log_probs": [-1.0, NaN]}\n', "not finite"),
        ('{"id": "a", "log_probs": [-1.0]}\n' * 2, "repeated"),
    ],
)
def test_damaged_scores_are_refused(tmp_path: Path, content: str, message: str) -> None:
    if content:
        (tmp_path / "scores.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_scores(tmp_path)


def test_llama_cpp_scores_an_exported_student_as_the_reference(tiny: Tiny, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", LONG)
    for name in ("artifact", "expected", "found"):
        (tmp_path / name).mkdir()
    Gguf().export(Student(tiny()), tmp_path / "artifact", context_tokens=256)
    score_reference(
        tiny(), [suite], tmp_path / "expected", chat=CHAT, threads=1, context_tokens=256
    )
    score_artifact(
        tmp_path / "artifact",
        "llama_cpp",
        tiny(),
        [suite],
        tmp_path / "found",
        sample=None,
        chat=CHAT,
        threads=1,
        context_tokens=256,
    )
    # float16 weights and cache: small beside scores that spread over tens of nats
    expected, found = scores_of(tmp_path / "expected"), scores_of(tmp_path / "found")
    assert expected.std() > 5.0
    np.testing.assert_allclose(found, expected, atol=0.3)
    assert np.abs(found - expected).mean() < 0.05
