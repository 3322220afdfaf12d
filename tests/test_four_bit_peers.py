"""What the peers' scripts hand back is what their integers mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from four_bit_peers import GROUP_SIZE, most_levels
from gptqmodel_peer import dequantized


def packed(values: torch.Tensor) -> torch.Tensor:
    """int64 [n, m] in 0..15 -> int32 [n / 8, m], the first of eight in the low bits."""
    ints = torch.zeros(values.shape[0] // 8, values.shape[1], dtype=torch.int64)
    for row in range(values.shape[0]):
        ints[row // 8] += values[row] * 16 ** (row % 8)
    return torch.where(ints >= 2**31, ints - 2**32, ints).to(torch.int32)


def test_a_gptq_checkpoint_is_read_as_its_format_says(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    columns, rows, groups = 128, 24, 2
    codes = torch.randint(0, 16, (columns, rows), generator=draw)
    zeros = torch.randint(1, 16, (groups, rows), generator=draw)
    scales = torch.rand(groups, rows, generator=draw).half()
    tensors = {
        "m.q_proj.qweight": packed(codes),
        "m.q_proj.qzeros": packed((zeros - 1).T.contiguous()).T.contiguous(),
        "m.q_proj.scales": scales,
        "m.q_proj.g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"checkpoint_format": "gptq"}))
    found = dequantized(tmp_path)["m.q_proj.weight"]
    for row, column in [(0, 0), (5, 70), (23, 127), (11, 63), (11, 64)]:
        group = column // 64
        code, zero = int(codes[column, row]), int(zeros[group, row])
        assert found[row, column] == (code - zero) * scales[group, row].float()


def test_weights_that_four_bits_cannot_hold_are_seen() -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(-8, 8, (64, 2, GROUP_SIZE))
    scales = draw.uniform(0.5, 2, (64, 2, 1))
    weights = (codes * scales).astype(np.float32).reshape(64, -1)
    assert most_levels(weights) <= 16
    weights[3, 5] += 0.3
    assert most_levels(weights) == 17
    assert most_levels(draw.normal(size=(64, 128)).astype(np.float32)) == GROUP_SIZE
