"""How a decoder lies in a GGUF file: tensor names, row order of rotated heads, norms as used."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError

# Family -> llama.cpp's architecture (src/llama-arch.cpp); mistral is llama there.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "granite": "granite",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
# Those that rotate neighbours (``llama_model_rope_type`` in src/llama-model.cpp), and those with
# norms behind the halves.
ROTATE_NEIGHBOURS = ("llama", "smollm3", "granite")
SANDWICHED = ("gemma2", "gemma3")
OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# The same name in a checkpoint is another norm where there are some behind the halves.
_NORM_NAMES = {"post_attention_layernorm": "ffn_norm"}
_SANDWICHED_NORM_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ROPE_DIVISORS = "rope_freqs.weight"
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def block_names(architecture: str) -> dict[str, str]:
    """Names inside a block: the checkpoint's -> GGUF's, of one of llama.cpp's architectures."""
    return _BLOCK_NAMES | (_SANDWICHED_NORM_NAMES if architecture in SANDWICHED else _NORM_NAMES)


def tensor_name(facts: DecoderFacts, name: str) -> str:
    """The GGUF name of a checkpoint's tensor: ``model.norm.weight`` -> ``output_norm.weight``."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    match, inner = _BLOCK.fullmatch(stem), block_names(ARCHITECTURES[facts.family])
    if match is None or match[2] not in inner:
        raise InputError(f"the tensor {name} has no place in a GGUF file")
    return f"blk.{match[1]}.{inner[match[2]]}.{kind}"


def row_order(facts: DecoderFacts, name: str) -> npt.NDArray[np.intp] | None:
    """Row numbers of a checkpoint's tensor in the order that GGUF stores them, or None: as it is.

    Some of llama.cpp's architectures rotate neighbours (2i, 2i + 1), a Hugging Face checkpoint
    halves (i, i + head_dim / 2); so the rows of q and k, weights and biases, are interleaved.
    """
    if ARCHITECTURES[facts.family] not in ROTATE_NEIGHBOURS:
        return None
    heads = {"q_proj": facts.heads, "k_proj": facts.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    rows = np.arange(heads * facts.head_dim).reshape(heads, 2, facts.head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def norm_offset(facts: DecoderFacts, name: str) -> float:
    """What a stored vector has more than the checkpoint's: llama.cpp's norms multiply alone."""
    return facts.norm_offset if name.endswith("norm.weight") else 0.0


def checkpoint_values(
    facts: DecoderFacts, name: str, stored: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """A tensor that was read from a GGUF file, as a checkpoint has it, in the same shape."""
    order, offset = row_order(facts, name), norm_offset(facts, name)
    if offset:
        return (stored - np.float32(offset)).astype(np.float32)
    if order is None:
        return stored
    restored = np.empty_like(stored)
    restored[order] = stored
    return restored
