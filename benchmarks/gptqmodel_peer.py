"""GPTQModel 7.7 on a student: run by ``four_bit_peers.py`` in an environment of its own.

    python3 -m venv ENV && ENV/bin/pip install torch==2.14.1 gptqmodel==7.7.0

As its documentation recommends for quality: symmetric, ``act_group_aware`` in place of
``desc_act``, damping .05, sequential.  Everything in float32: this CPU has no bfloat16, and it
can only be better for the peer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

BITS, CODES_AN_INT = 4, 8


def main() -> None:
    """Quantize, pack, and write what the packed weights mean, float32."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True, help="int64 [sequences, tokens]")
    parser.add_argument("--out", type=Path, required=True, help="an empty directory")
    parser.add_argument("--fields", type=json.loads, required=True, help="of QuantizeConfig")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from gptqmodel import GPTQModel, QuantizeConfig

    examples = [
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}
        for ids in np.load(arguments.ids)
    ]
    config = QuantizeConfig(bits=BITS, **arguments.fields)
    model = GPTQModel.load(
        str(arguments.student), config, device="cpu", dtype=torch.float32, trust_remote_code=False
    )
    model.quantize(examples, batch_size=1)
    packed = arguments.out / "packed"
    model.save(str(packed))
    save_file(dequantized(packed), arguments.out / "linears.safetensors")


def dequantized(packed: Path) -> dict[str, torch.Tensor]:
    """Checkpoint name -> float32 [rows, columns], out of the GPTQ format's tensors.

    ``qweight`` int32 [columns / 8, rows], low bits first; ``qzeros`` int32 [groups, rows / 8] holds
    the zero point less one; ``scales`` [groups, rows]; ``g_idx`` [columns] is each column's group.
    """
    tensors: dict[str, Any] = {}
    for file in sorted(packed.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    stated = json.loads((packed / "quantize_config.json").read_text("utf-8"))
    offset = 1 if stated.get("checkpoint_format", stated.get("format")) == "gptq" else 0
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    found = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        stem = name.removesuffix(".qweight")
        qweight, qzeros = tensors[name], tensors[f"{stem}.qzeros"]
        columns, rows = qweight.shape[0] * CODES_AN_INT, qweight.shape[1]
        codes = (qweight[:, None, :] >> shifts[None, :, None]) & 15
        zeros = ((qzeros[:, :, None] >> shifts[None, None, :]) & 15).reshape(-1, rows) + offset
        group = tensors[f"{stem}.g_idx"].long()
        scales = tensors[f"{stem}.scales"].float()
        weights = (codes.reshape(columns, rows) - zeros[group]).float() * scales[group]
        found[f"{stem}.weight"] = weights.T.contiguous()
    return found


if __name__ == "__main__":
    main()
