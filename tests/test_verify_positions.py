"""The far end of the context: judged on a few stretches, the worst position named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgedistill.chat import Chat
from edgedistill.errors import StageError
from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.reference_model import load_reference
from edgedistill.results import Check
from edgedistill.runtimes.torch_reference import TorchSession
from edgedistill.session import Agreement, Logits
from edgedistill.student import Student
from edgedistill.verify.artifact import verify_artifact
from edgedistill.verify.judge import (
    LONG,
    JudgedStretches,
    read_judge_stretches,
    read_texts,
    stretches_of,
    write_judge_logits,
)
from edgedistill.verify.long_positions import check_positions
from edgedistill.verify.texts import load_texts
from tests.tiny import write_student

CONTEXT = 600
TEXTS = {name: text[:160] for name, text in load_texts({}).items()}
AGREEMENT = Agreement(1e-6, 0.999)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("long"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def judge(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged(student, tmp_path_factory.mktemp("judge"))


def judged(student: Path, root: Path, context_tokens: int | None = CONTEXT) -> Path:
    root.mkdir(exist_ok=True)
    write_judge_logits(student, TEXTS, root, chat=Chat(), threads=1, context_tokens=context_tokens)
    return root


def long(judge: Path) -> JudgedStretches:
    found = read_judge_stretches(judge, LONG)
    assert found is not None
    return found


def check(session: type[TorchSession], student: Path, judge: Path) -> Check:
    with session(load_reference(student, threads=1), student, CONTEXT) as opened:
        return check_positions(opened, long(judge), AGREEMENT)


class BlindAfter400(TorchSession):
    """A window of the cache that the model does not have: the first token falls out at last."""

    def _append(self, ids: Sequence[int], keep: int) -> Logits:
        if self.position >= 400:
            ids = [3, *ids[1:]]
        return super()._append(ids, keep)


class WrongAt590(TorchSession):
    """Right but for the logits of one position."""

    def _append(self, ids: Sequence[int], keep: int) -> Logits:
        start = self.position
        logits = super()._append(ids, keep).copy()
        if start <= 590 < start + len(ids) and keep == len(ids):
            logits[590 - start] = np.roll(logits[590 - start], 1)
        return logits


def test_a_model_agrees_with_itself_to_its_last_position(student: Path, judge: Path) -> None:
    found = check(TorchSession, student, judge)
    assert found.passed
    assert found.name == "positions: near the end of the context"
    assert "536 to 599 of 600" in found.detail


def test_a_fault_far_out_is_caught(student: Path, judge: Path) -> None:
    found = check(BlindAfter400, student, judge)
    assert not found.passed
    near, _, far = found.detail.partition(" at tokens 86 to 149")
    assert float(near.split()[-1]) < 1e-6
    assert "536 to 599" in far


def test_the_worst_position_is_named(student: Path, judge: Path) -> None:
    found = check(WrongAt590, student, judge)
    assert not found.passed
    assert found.detail.endswith("at token 590")


def test_the_judges_rows_are_those_of_one_pass(student: Path, judge: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kept = long(judge)
    model = AutoModelForCausalLM.from_pretrained(str(student), dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([kept.ids])).logits[0]
    whole = torch.log_softmax(logits.double(), -1).numpy()
    assert [list(s) for s in kept.stretches] == [
        list(range(86, 150)),
        list(range(236, 300)),
        list(range(536, 600)),
    ]
    for number, stretch in enumerate(kept.stretches):
        np.testing.assert_allclose(kept.of(number), whole[list(stretch)], atol=1e-4)


def test_the_long_prompt_is_the_texts_said_again_as_one_message(student: Path, judge: Path) -> None:
    from transformers import AutoTokenizer

    kept = long(judge)
    assert len(kept.ids) == CONTEXT
    read = AutoTokenizer.from_pretrained(str(student)).decode(kept.ids)
    assert read.startswith("<|im_start|>user\n" + TEXTS["prose"].strip()[:40])
    assert read.count(TEXTS["code"].strip()[:40]) >= 2
    assert read.count("<|im_start|>") == 1


@pytest.mark.parametrize("tokens", [1, 2, 64, 200, 255, 256, 257, 2048, 8191])
def test_stretches_lie_apart_and_end_with_the_context(tokens: int) -> None:
    stretches = stretches_of(tokens)
    positions = [p for stretch in stretches for p in stretch]
    assert positions == sorted(set(positions))
    assert positions[-1] == tokens - 1
    assert len(positions) <= 256


def test_the_long_prompt_ends_where_the_model_does(student: Path, tmp_path: Path) -> None:
    assert len(long(judged(student, tmp_path / "judge", 10_000)).ids) == CONTEXT


def test_without_a_length_there_is_no_long_prompt(student: Path, tmp_path: Path) -> None:
    assert read_judge_stretches(judged(student, tmp_path / "judge", None), LONG) is None


def verified(artifact_of: Path, student: Path, judge: Path, root: Path, name: str) -> set[str]:
    """The checks that an artifact of one student fails against another student."""
    root.mkdir()
    load_plugin("exporters", name)().export(Student(artifact_of), root, context_tokens=CONTEXT)
    found = verify_artifact(
        root,
        name,
        student=student,
        weights_judge=judge,
        reference_judge=judge,
        base_judge=None,
        context_tokens=CONTEXT,
        threads=1,
    )
    return {c.name for c in found.checks if not c.passed}


@pytest.mark.parametrize("format_name", plugin_names("exporters"))
def test_lost_rope_scaling_shows_near_the_end_of_the_context(
    format_name: str, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT // 2,
    }
    student = write_student(
        tmp_path / "student", max_position_embeddings=CONTEXT, rope_parameters=rope, head_dim=32
    )
    judge = judged(student, tmp_path / "judge")
    assert verified(student, student, judge, tmp_path / "good", format_name) == set()
    faulty = shutil.copytree(student, tmp_path / "faulty")
    config = json.loads((faulty / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    (faulty / "config.json").write_text(json.dumps(config))
    found = verified(faulty, student, judge, tmp_path / "bad", format_name)
    assert "positions: near the end of the context" in found


def test_a_prompt_that_is_longer_than_the_artifacts_context_is_refused(
    student: Path, judge: Path, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(StageError, match="600 tokens, the artifact claims a context of 300"):
        verify_artifact(
            tmp_path,
            "gguf",
            student=student,
            weights_judge=judge,
            reference_judge=judge,
            base_judge=None,
            context_tokens=300,
            threads=1,
        )


def test_no_text_is_judged_beyond_where_longrope_turns_it_anew(tmp_path: Path) -> None:
    """The judge reads a text whole, an artifact with its context's factors: they would differ."""
    student = write_student(tmp_path, "phi4_mini", original_max_position_embeddings=64)
    text = "The quick brown fox jumps over the lazy dog. " * 20
    assert len(read_texts(student, {"text": text}, Chat())["text"]) == 64
    whole = write_student(tmp_path / "whole", "phi4_mini", rope_parameters=None)
    assert len(read_texts(whole, {"text": text}, Chat())["text"]) > 64
