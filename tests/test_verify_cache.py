"""Faults of a cache, planted into the judge's own model, are caught by the check meant for each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgedistill.chat import Chat
from edgedistill.reference_model import load_reference
from edgedistill.runtimes.torch_reference import TorchSession
from edgedistill.session import Agreement, Logits
from edgedistill.verify.cache import check_cache
from edgedistill.verify.judge import (
    TWO_TURNS,
    read_judge_logits,
    read_judge_stretches,
    write_judge_logits,
)

CONTEXT = 256
AGREEMENT = Agreement(1e-6, 0.999)
TEXT = "The quick brown fox jumps over the lazy dog, and 1234567890 is a number. " * 4


class ForgetsTheNewest(TorchSession):
    """Loses the newest token of its cache when several tokens follow."""

    def _append(self, ids: Sequence[int], keep: int) -> Logits:
        if self.position > 1 and len(ids) > 1:
            self._cache.crop(-1)
        return super()._append(ids, keep)


class StepsLeaveNoTrace(TorchSession):
    """Computes a single token rightly, but does not keep it."""

    def _append(self, ids: Sequence[int], keep: int) -> Logits:
        logits = super()._append(ids, keep)
        if len(ids) == 1 and self.position > 1:
            self._cache.crop(-1)
        return logits


class RewindsTooLittle(TorchSession):
    """Keeps one token more than it was asked to."""

    def rewind(self, position: int) -> None:
        super().rewind(position + 1 if 0 < position < self.position else position)
        self.position = position


class OddPromptsAreShort(TorchSession):
    """Reads an odd number of tokens without the first."""

    def _append(self, ids: Sequence[int], keep: int) -> Logits:
        odd = self.position == 0 and len(ids) in (63, 65)
        logits = super()._append(ids[1:] if odd else ids, keep)
        self.position += odd
        return logits


@pytest.fixture(scope="module")
def judge(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("judge")
    write_judge_logits(tiny("llama"), {"text": TEXT}, root, chat=Chat(), threads=1)
    return root


def failed(session: type[TorchSession], student: Path, judge: Path) -> set[str]:
    with session(load_reference(student, threads=1), student, CONTEXT) as opened:
        (text,) = read_judge_logits(judge)
        turns = read_judge_stretches(judge, TWO_TURNS)
        assert turns is not None
        checks = check_cache(opened, text, turns, AGREEMENT)
    assert len(checks) == 5
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize(
    ("session", "caught_by"),
    [
        (TorchSession, set()),
        (
            ForgetsTheNewest,
            {"cache: rewind", "cache: second turn", "cache: second turn as from nothing"},
        ),
        (
            StepsLeaveNoTrace,
            {
                "cache: token by token",
                "cache: rewind",
                "cache: second turn",
                "cache: second turn as from nothing",
            },
        ),
        (RewindsTooLittle, {"cache: rewind"}),
        (
            OddPromptsAreShort,
            {"cache: prompt lengths", "cache: token by token", "cache: rewind"},
        ),
    ],
)
def test_each_fault_of_a_cache_has_its_check(
    session: type[TorchSession],
    caught_by: set[str],
    tiny: Callable[[str], Path],
    judge: Path,
) -> None:
    assert failed(session, tiny("llama"), judge) == caught_by


def test_the_second_turn_is_the_templates(tiny: Callable[[str], Path], judge: Path) -> None:
    from transformers import AutoTokenizer

    turns = read_judge_stretches(judge, TWO_TURNS)
    assert turns is not None
    tokenizer = AutoTokenizer.from_pretrained(str(tiny("llama")))
    answer, second = turns.stretches
    first = tokenizer.decode(turns.ids[: answer.start])
    assert first.startswith("<|im_start|>user\n")
    assert first.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(turns.ids[answer.start : answer.stop]).endswith(".")
    follows = tokenizer.decode(turns.ids[second.start :])
    assert follows.startswith("<|im_end|>\n<|im_start|>user\n")
    assert follows.endswith("<|im_start|>assistant\n")
    assert second.stop == len(turns.ids)


def test_the_judges_rows_are_those_of_one_pass(tiny: Callable[[str], Path], judge: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    turns = read_judge_stretches(judge, TWO_TURNS)
    assert turns is not None
    model = AutoModelForCausalLM.from_pretrained(str(tiny("llama")), dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([turns.ids])).logits[0]
    whole = torch.log_softmax(logits.double(), -1).numpy()
    for number, stretch in enumerate(turns.stretches):
        expected = whole[stretch.start : stretch.stop]
        np.testing.assert_allclose(turns.of(number), expected, atol=1e-4)


@pytest.mark.parametrize(
    "template",
    [
        "<{{ messages[0].content }}>",
        "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}"
        "<{{ messages[0].content }}>",
        "<{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}>",
    ],
    ids=["the first turn alone", "refuses a second turn", "history is rewritten"],
)
def test_templates_without_a_history_still_get_a_second_part(
    template: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    student = shutil.copytree(tiny("llama"), tmp_path / "student")
    (student / "chat_template.jinja").write_text(template)
    judge = tmp_path / "judge"
    judge.mkdir()
    write_judge_logits(student, {"text": TEXT}, judge, chat=Chat(), threads=1)
    turns = read_judge_stretches(judge, TWO_TURNS)
    assert turns is not None
    answer, second = turns.stretches
    assert 0 < answer.start <= second.start < len(turns.ids)
    assert failed(TorchSession, student, judge) == set()
