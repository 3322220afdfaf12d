"""How a decoder lies in a GGUF file: tensor names, and the row order of rotated heads."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError

# Family -> llama.cpp's architecture (src/llama-arch.cpp); mistral is llama there.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_DIVISORS = "rope_freqs.weight"
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def tensor_name(name: str) -> str:
    """The GGUF name of a checkpoint's tensor: ``model.norm.weight`` -> ``output_norm.weight``."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    match = _BLOCK.fullmatch(stem)
    if match is None or match[2] not in BLOCK_NAMES:
        raise InputError(f"the tensor {name} has no place in a GGUF file")
    return f"blk.{match[1]}.{BLOCK_NAMES[match[2]]}.{kind}"


def row_order(facts: DecoderFacts, name: str) -> npt.NDArray[np.intp] | None:
    """Row numbers of a checkpoint's tensor in the order that GGUF stores them, or None: as it is.

    llama.cpp's ``llama`` architecture rotates neighbours (2i, 2i + 1), a Hugging Face checkpoint
    halves (i, i + head_dim / 2); so the rows of q and k, weights and biases, are interleaved.
    """
    if ARCHITECTURES[facts.family] != "llama":
        return None
    heads = {"q_proj": facts.heads, "k_proj": facts.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    rows = np.arange(heads * facts.head_dim).reshape(heads, 2, facts.head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)
