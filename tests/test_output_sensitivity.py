"""The weights of output errors against the Fisher information by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgedistill.output_sensitivity import output_weights
from edgedistill.student import Student

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("shared", [False, True], ids=["by token", "shared"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "gemma2", "gemma3"])
@pytest.mark.parametrize("short", ["q", "v", "o", "up", "down"])
def test_small_noise_on_outputs_costs_the_kl_that_is_predicted(
    tiny: Tiny, tmp_path: Path, family: str, short: str, shared: bool
) -> None:
    """``transformers`` with noise added to what one matrix puts out, and the KL that results."""
    from transformers import AutoModelForCausalLM

    student = Student(tiny(family))
    name = student.facts.linears(1)[short]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, student.facts.vocab_size, (16, 48), generator=draw)
    weight = output_weights(student, ids, tmp_path, seed=3)[name]
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    matrix = model.get_submodule(name.removesuffix(".weight"))
    predicted, measured = [], []
    with torch.no_grad():
        own = model(ids).logits.double().log_softmax(-1)
        for _ in range(6 if shared else 3):
            shape = (1, 1) if shared else (16, 48)
            noise = 0.01 * torch.randn(*shape, matrix.out_features, generator=draw)
            noise = noise.expand(16, 48, -1).clone()
            noise *= torch.rand(matrix.out_features, generator=draw) > 0.5  # some rows alone
            handle = matrix.register_forward_hook(lambda m, x, y, n=noise: y + n)
            other = model(ids).logits.double().log_softmax(-1)
            handle.remove()
            measured.append(float((own.exp() * (own - other)).sum(-1).mean()))
            predicted.append(weight.loss(noise))
    assert np.mean(predicted) == pytest.approx(np.mean(measured), rel=0.25)


def test_two_draws_agree_and_files_change_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedistill import hidden_stream

    student = Student(tiny("llama"))
    ids = torch.randint(3, student.facts.vocab_size, (8, 32))
    one, again = (output_weights(student, ids, tmp_path, seed=0) for _ in range(2))
    monkeypatch.setattr(hidden_stream, "HELD_BYTES", 0)
    filed = output_weights(student, ids, tmp_path, seed=0)
    for name, weight in one.items():
        for other in (again[name], filed[name]):
            torch.testing.assert_close(weight.rows, other.rows, rtol=0, atol=0)
            torch.testing.assert_close(weight.tokens, other.tokens, rtol=0, atol=0)
            torch.testing.assert_close(weight.shared, other.shared, rtol=0, atol=0)
