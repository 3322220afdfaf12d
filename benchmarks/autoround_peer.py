"""AutoRound 0.16 on a student: run by ``four_bit_peers.py`` in an environment of its own.

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 auto-round==0.16.1

Its default recipe (batches of 8, learning rate 1 / iterations) with fewer iterations where the
time does not allow 200.  Everything in float32: this CPU emulates bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    """Quantize, and write what the rounded weights are, float32."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True, help="int64 [sequences, tokens]")
    parser.add_argument("--out", type=Path, required=True, help="an empty directory")
    parser.add_argument("--fields", type=json.loads, required=True, help="of AutoRound")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = np.load(arguments.ids)
    model = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.student),
        scheme="W4A16",
        bits=4,
        dataset=[torch.from_numpy(sequence)[None] for sequence in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        device_map="cpu",
        **arguments.fields,
    )
    rounding.quantize_and_save(str(arguments.out / "rounded"), format="fake")
    save_file(linears(arguments.out), arguments.out / "linears.safetensors")


def linears(out: Path) -> dict[str, torch.Tensor]:
    """Checkpoint name -> float32 [rows, columns], of the blocks' matrices."""
    found = {}
    for file in sorted((out / "rounded").rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name.endswith("_proj.weight"):
                    found[name] = opened.get_tensor(name).float().contiguous()
    return found


if __name__ == "__main__":
    main()
