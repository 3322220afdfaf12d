from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.errors import InputError, UsageError
from edgedistill.quantized import Grid, QTensor
from edgedistill.runtimes.torch_reference import CHUNK_TOKENS, TorchReference
from edgedistill.session import Session
from edgedistill.student import Student, StudentWriter
from tests.tiny import FAMILY_CONFIGS, write_student

Tiny = Callable[..., Path]
IDS = [int(i) for i in np.random.default_rng(3).integers(3, 500, 2 * CHUNK_TOKENS - 7)]


def open_session(student: Path, context_tokens: int = 1024) -> Session:
    return TorchReference().open(student, context_tokens=context_tokens, threads=1)


def transformers_logits(student: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_way_through_the_cache_gives_the_logits_of_one_pass(tiny: Tiny, family: str) -> None:
    expected = transformers_logits(tiny(family), IDS)
    with open_session(tiny(family)) as session:
        chunks = list(session.stream_logits(IDS))
        assert len(chunks) == 2
        np.testing.assert_allclose(np.concatenate(chunks), expected, atol=2e-4)
        session.rewind(9)
        assert session.position == 9
        np.testing.assert_allclose(session.prefill(IDS[9:20]), expected[19], atol=2e-4)
        np.testing.assert_allclose(session.step(IDS[20]), expected[20], atol=2e-4)
        session.reset()
        np.testing.assert_allclose(session.prefill(IDS[:5]), expected[4], atol=2e-4)
        assert (session.position, session.vocab_size) == (5, expected.shape[1])


def test_a_sliding_window_survives_a_rewind(tmp_path: Path) -> None:
    student = write_student(tmp_path / "m", "mistral", sliding_window=16)
    expected = transformers_logits(student, IDS[:60])
    with open_session(student) as session:
        session.prefill(IDS[:50])
        session.rewind(30)
        np.testing.assert_allclose(session.prefill(IDS[30:60]), expected[-1], atol=2e-4)


def test_a_quantized_student_runs_on_its_dequantized_weights(tiny: Tiny, tmp_path: Path) -> None:
    name, grid = "model.layers.1.mlp.up_proj.weight", Grid(bits=4, group_size=32)
    student, quantized, plain = Student(tiny()), tmp_path / "quantized", tmp_path / "plain"
    rows, columns = student.shape(name)
    rng = np.random.default_rng(0)
    tensor = QTensor(
        grid,
        rng.integers(0, 16, (rows, columns), dtype=np.uint8),
        rng.uniform(0.01, 0.1, (rows, columns // 32)).astype(np.float16),
    )
    for dst, value in ((quantized, tensor), (plain, tensor.dequantize())):
        dst.mkdir()
        with StudentWriter(dst, student) as writer:
            for other in student.names():
                writer.write(other, value if other == name else student.read(other))
    expected = transformers_logits(plain, IDS[:20])
    assert np.abs(expected - transformers_logits(tiny(), IDS[:20])).max() > 0.1
    with open_session(quantized) as session:
        np.testing.assert_allclose(session.prefill(IDS[:20]), expected[-1], atol=1e-4)


def test_tokens_that_do_not_fit_are_refused(tiny: Tiny) -> None:
    with open_session(tiny(), context_tokens=8) as session:
        session.prefill(IDS[:6])
        with pytest.raises(UsageError, match="3 tokens after 6 do not fit into context_tokens = 8"):
            session.prefill(IDS[:3])
        with pytest.raises(UsageError, match="at least one token"):
            session.prefill([])
        with pytest.raises(UsageError, match="not in the vocabulary of 512"):
            session.step(512)
        with pytest.raises(UsageError, match="cannot rewind to 7"):
            session.rewind(7)
        assert session.position == 6


def test_text_is_tokenized_as_transformers_does(tiny: Tiny) -> None:
    from transformers import AutoTokenizer

    text = "<|im_start|>user\nnaïve café 2024 🙂  你好<|im_end|>"
    expected: Any = AutoTokenizer.from_pretrained(tiny())(text, add_special_tokens=False)
    with open_session(tiny()) as session:
        assert session.tokenize(text) == expected["input_ids"]


def test_a_student_with_a_tensor_missing_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    student = Student(tiny())
    with StudentWriter(tmp_path, student) as writer:
        for name in student.names()[:-1]:
            writer.write(name, student.read(name))
    with pytest.raises(InputError, match=f"missing keys: .*{student.names()[-1].split('.')[-1]}"):
        open_session(tmp_path)


def test_an_unknown_architecture_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for file in tiny().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"llama"', '"nobody"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="transformers cannot open it"):
        open_session(tmp_path)
