"""Golden vectors are what transformers would say, and another model does not say them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgedistill.plugins import load_plugin
from edgedistill.quantized import Grid
from edgedistill.results import GoldenVector
from edgedistill.session import Logits, Session
from edgedistill.student import Student
from edgedistill.verify.golden import CLEAR_LEAD, STEPS, make_golden, replay_golden
from tests.rounded import round_student
from tests.tiny import write_student

Tiny = Callable[[str], Path]
FORMATS = ("gguf", "onnx", "coreml")
CONTEXT = 128


def open_exported(student: Path, dst: Path, format_name: str, context: int = CONTEXT) -> Session:
    dst.mkdir(parents=True)
    exporter = load_plugin("exporters", format_name)()
    exporter.export(Student(student), dst, context_tokens=context)
    runtime = load_plugin("runtimes", exporter.runtime)()
    session: Session = runtime.open(dst, context_tokens=context, threads=1)
    return session


@pytest.mark.parametrize("format_name", FORMATS)
def test_vectors_are_what_transformers_generates(
    tiny: Tiny, tmp_path: Path, format_name: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with open_exported(tiny("llama"), tmp_path / "a", format_name) as session:
        golden = make_golden(session, tiny("llama"))
        assert session.position == 0
        assert all(check.passed for check in replay_golden(session, golden))
    assert golden
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    for vector in golden:
        assert 3 <= len(vector.steps) <= STEPS
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([vector.ids]),
                attention_mask=torch.ones(1, len(vector.ids), dtype=torch.long),
                max_new_tokens=len(vector.steps),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert made.sequences[0, len(vector.ids) :].tolist() == vector.steps
        for row, lead in zip(made.logits, vector.leads, strict=True):
            first, second = row[0].topk(2).values.tolist()
            assert first - second == pytest.approx(lead, abs=0.1)
            assert lead >= CLEAR_LEAD


@pytest.mark.parametrize("format_name", ["gguf", "onnx"])
def test_another_model_does_not_say_them(tiny: Tiny, tmp_path: Path, format_name: str) -> None:
    with open_exported(tiny("llama"), tmp_path / "a", format_name) as session:
        golden = make_golden(session, tiny("llama"))
    other = write_student(tmp_path / "other", "llama", seed=1)
    with open_exported(other, tmp_path / "b", format_name) as session:
        tokens, leads = replay_golden(session, golden)
    assert not tokens.passed
    assert not leads.passed
    assert tokens.value == len(golden)
    assert "gives the token" in tokens.detail


def test_the_same_model_in_fewer_bits_is_another(tiny: Tiny, tmp_path: Path) -> None:
    with open_exported(tiny("llama"), tmp_path / "a", "gguf") as session:
        golden = make_golden(session, tiny("llama"))
    rounded = round_student(tiny("llama"), tmp_path / "rounded", Grid(4, 32))
    with open_exported(rounded, tmp_path / "b", "gguf") as session:
        assert not all(check.passed for check in replay_golden(session, golden))


class Scripted(Session):
    """Says what it is told: token n is followed by n + 1, by a lead that a table gives."""

    vocab_size = 512

    def __init__(self, leads: dict[int, float], context_tokens: int = 64) -> None:
        self.context_tokens = context_tokens
        self.leads = leads
        self.cache: list[int] = []

    @property
    def position(self) -> int:  # type: ignore[override]
        return len(self.cache)

    def _logits(self) -> Logits:
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[(self.cache[-1] + 1) % self.vocab_size] = self.leads.get(len(self.cache), 2.0)
        return logits

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.cache += ids
        return self._logits()

    def stream_logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        for token in ids:
            yield self.prefill([token])[None]

    def rewind(self, position: int) -> None:
        del self.cache[position:]

    def close(self) -> None:
        self.cache = []


def vector(steps: int, lead: float = 2.0) -> GoldenVector:
    ids = [3, 4, 5]
    return GoldenVector(
        prompt="count", ids=ids, steps=[6 + i for i in range(steps)], leads=[lead] * steps
    )


def test_a_vector_ends_before_the_first_small_lead(tiny: Tiny) -> None:
    small = dict.fromkeys(range(0, 4096, 8), CLEAR_LEAD - 0.01)
    golden = make_golden(Scripted(small, 4096), tiny("llama"))
    assert golden
    for made in golden:
        assert 3 <= len(made.steps) < 8
        assert (len(made.ids) + len(made.steps)) % 8 == 0
    full = make_golden(Scripted({}, 4096), tiny("llama"))
    assert [len(v.steps) for v in full] == [STEPS] * 4
    assert all(v.leads == [2.0] * STEPS for v in full)
    assert make_golden(Scripted(dict.fromkeys(range(4096), 0.3), 4096), tiny("llama")) == []


def test_a_short_context_still_gives_vectors(tiny: Tiny) -> None:
    golden = make_golden(Scripted({}, context_tokens=8), tiny("llama"))
    assert golden
    assert all(len(v.ids) + len(v.steps) <= 8 for v in golden)


def test_a_replay_tells_tokens_from_leads() -> None:
    good = replay_golden(Scripted({}), [vector(8)])
    assert [check.passed for check in good] == [True, True]
    tokens, leads = replay_golden(Scripted({5: 3.1}), [vector(8)])
    assert (tokens.passed, leads.passed) == (True, False)
    assert leads.value == pytest.approx(1.1, abs=1e-6)
    tokens, leads = replay_golden(Scripted({5: -1.0}), [vector(8)])
    assert (tokens.passed, leads.passed) == (False, False)
    assert "step 2" in tokens.detail
    tokens, _ = replay_golden(Scripted({3: float("nan")}), [vector(8)])
    assert not tokens.passed


@pytest.mark.parametrize(
    "damaged",
    [
        vector(4).model_copy(update={"ids": []}),
        vector(4).model_copy(update={"leads": [2.0]}),
        vector(4).model_copy(update={"steps": [6, 7, 8, 512]}),
        vector(4).model_copy(update={"ids": [-1]}),
        vector(4).model_copy(update={"ids": [3] * 70}),
    ],
)
def test_a_damaged_vector_fails_and_does_not_crash(damaged: GoldenVector) -> None:
    tokens, leads = replay_golden(Scripted({}), [vector(4), damaged])
    assert (tokens.passed, tokens.value, leads.passed) == (False, 1.0, False)
