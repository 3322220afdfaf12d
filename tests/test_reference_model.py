"""The judge reads a large student a block at a time, and says the same as of a whole one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgedistill.errors import InputError
from edgedistill.reference_model import load_reference
from edgedistill.stages.quantize_rtn import GridChoice, QuantizeRtn
from edgedistill.student import Student
from tests.tiny import FAMILY_CONFIGS

Tiny = Callable[[str], Path]


def logits_and_cached(model: Any) -> torch.Tensor:
    """Of a prompt, and of more tokens through the cache behind it: [tokens, vocab]."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(), torch.arange(3, 43)[None]
    with torch.inference_mode():
        parts = [
            model(part, past_key_values=cache, use_cache=True).logits[0]
            for part in (ids[:, :24], ids[:, 24:])
        ]
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_streamed_model_says_exactly_what_a_held_one_says(tiny: Tiny, family: str) -> None:
    held = logits_and_cached(load_reference(tiny(family), threads=1))
    streamed = load_reference(tiny(family), threads=1, held_bytes=0)
    assert torch.equal(logits_and_cached(streamed), held)
    assert torch.equal(logits_and_cached(streamed), held)  # what was dropped is read again
    assert held.std() > 0.5


def test_nothing_is_held_between_two_passes(tiny: Tiny) -> None:
    model = load_reference(tiny("llama3"), threads=1, held_bytes=0)
    for _ in range(2):
        assert all(p.device.type == "meta" for p in model.parameters())
        logits_and_cached(model)


def test_a_quantized_student_is_streamed_too(tiny: Tiny, tmp_path: Path) -> None:
    QuantizeRtn(bits=4, embeddings=GridChoice(bits=8)).run(tiny("qwen3"), tmp_path)
    held, streamed = (
        logits_and_cached(load_reference(tmp_path, threads=1, held_bytes=size))
        for size in (1 << 30, 0)
    )
    assert torch.equal(held, streamed)
    assert not torch.equal(held, logits_and_cached(load_reference(tiny("qwen3"), threads=1)))


@pytest.mark.parametrize("held_bytes", [0, 1 << 30])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 4}, "missing keys"),
        ({"num_hidden_layers": 2}, "unexpected keys"),
        ({"intermediate_size": 96}, "mismatched"),
    ],
)
def test_weights_of_another_config_are_refused(
    tiny: Tiny, tmp_path: Path, held_bytes: int, change: dict[str, int], problem: str
) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "s")
    config = tmp_path / "s" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert Student(tmp_path / "s").facts.ffn_size == change.get("intermediate_size", 128)
    with pytest.raises(InputError, match=problem):
        load_reference(tmp_path / "s", threads=1, held_bytes=held_bytes)
