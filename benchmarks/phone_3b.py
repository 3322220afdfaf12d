"""A checkpoint of SmolLM3-3B's exact shape with seeded random weights, written shard by shard.

    python benchmarks/phone_3b.py make DIR --tokenizer-of STUDENT
    python benchmarks/phone_3b.py make DIR --tokenizer-of STUDENT --layers 8 --vocabulary 49152

No hub can be reached where this project is developed.  Memory, time, resume and exactness of large
students are measured on this; of quality it says nothing.  The tokenizer is that of a smaller
student, its vocabulary filled up.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgedistill.decoder import DecoderFacts
from edgedistill.student import INDEX_FILE, copy_side_files, write_json

# HuggingFaceTB/SmolLM3-3B, config.json.
SHAPE: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "no_rope_layer_interval": 4,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 1_000_000_000


def make_student(dst: Path, config: dict[str, Any], tokenizer_of: Path, seed: int = 0) -> None:
    """Write a student in bfloat16 whose logits are as peaked as a real one's.

    Args:
        dst: a directory that does not exist.
        config: of the model.
        tokenizer_of: a student directory whose tokenizer and template are taken.
        seed: of the weights.
    """
    dst.mkdir(parents=True)
    copy_side_files(tokenizer_of, dst)
    own = json.loads((tokenizer_of / "config.json").read_text("utf-8"))
    ids = {key: own[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in own}
    config = config | ids
    write_json(dst / "config.json", config)
    fill_vocabulary(dst / "tokenizer.json", config["vocab_size"])
    facts = DecoderFacts.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []

    def flush() -> None:
        save_file(shard, dst / f"shard-{len(files)}", {"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for name, shape in facts.tensor_shapes().items():
        if sum(2 * t.numel() for t in shard.values()) > SHARD_BYTES:
            flush()
        if len(shape) == 1:
            shard[name] = (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
        else:
            spread = 2.0 if name in (facts.embedding, facts.head) else 1.0
            values = torch.randn(shape, generator=generator)
            shard[name] = values.mul_(spread / math.sqrt(shape[1])).bfloat16()
    flush()
    weight_map = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (dst / f"shard-{number}").rename(dst / final)
        weight_map.update(dict.fromkeys(names, final))
    write_json(dst / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def fill_vocabulary(tokenizer: Path, size: int) -> None:
    """Add special tokens that no text has until the vocabulary is as large as the embedding."""
    described = json.loads(tokenizer.read_text("utf-8"))
    added = described["added_tokens"]
    known = max(len(described["model"]["vocab"]), 1 + max(token["id"] for token in added))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added += [
        {"id": number, "content": f"<|unused_{number}|>", "special": True, **flags}
        for number in range(known, size)
    ]
    tokenizer.write_text(json.dumps(described, ensure_ascii=False), "utf-8")


def main() -> None:
    """Make a student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["make"])
    parser.add_argument("dst", type=Path)
    parser.add_argument("--tokenizer-of", type=Path, required=True, help="a student directory")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=SHAPE["vocab_size"])
    arguments = parser.parse_args()
    shape = {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
    aside = arguments.dst.with_name(f".new-{arguments.dst.name}")
    shutil.rmtree(aside, ignore_errors=True)
    make_student(aside, SHAPE | shape, arguments.tokenizer_of)
    aside.rename(arguments.dst)


if __name__ == "__main__":
    main()
