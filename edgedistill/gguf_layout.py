"""How a decoder lies in a GGUF file: tensor names, row order of rotated heads, norms as used."""

from __future__ import annotations

import re
from collections.abc import Container

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
    "phi3": "phi3",
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
# Matrices that an architecture has on top of each other, in the order of their use.
_STACKED_NAMES = {"phi3": {"mlp.gate_proj": "ffn_up"}}
ROPE_DIVISORS = "rope_freqs.weight"
SHORT_DIVISORS, LONG_DIVISORS = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = {ROPE_DIVISORS, SHORT_DIVISORS, LONG_DIVISORS}
# What llama.cpp takes in the place of attn_q, attn_k and attn_v (``create_tensor_qkv``).
_ONE_OF_THREE, _THREE_IN_ONE = re.compile(r"(blk\.\d+\.attn_)[qkv](\..+)"), r"\1qkv\2"
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def block_names(architecture: str) -> dict[str, str]:
    """Names inside a block: the checkpoint's -> GGUF's, of one of llama.cpp's architectures."""
    norms = _SANDWICHED_NORM_NAMES if architecture in SANDWICHED else _NORM_NAMES
    return _BLOCK_NAMES | norms | _STACKED_NAMES.get(architecture, {})


def file_tensors(facts: DecoderFacts, stored: Container[str] = ()) -> dict[str, list[str]]:
    """Each tensor of a GGUF file -> those of the checkpoint whose rows it has, in their order.

    Args:
        facts: of the decoder.
        stored: names in a file that somebody else made, who may have put q, k and v together.
    """
    found: dict[str, list[str]] = {}
    for name in facts.tensor_shapes():
        own = tensor_name(facts, name)
        together = _ONE_OF_THREE.sub(_THREE_IN_ONE, own)
        found.setdefault(together if together in stored else own, []).append(name)
    return found


def file_shape(facts: DecoderFacts, names: list[str]) -> tuple[int, ...]:
    """The shape of some tensors of a checkpoint on top of each other."""
    shapes = facts.tensor_shapes()
    return (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])


def tensor_name(facts: DecoderFacts, name: str) -> str:
    """The GGUF name of a checkpoint's tensor: ``model.norm.weight`` -> ``output_norm.weight``.

    Tensors whose rows lie on top of each other there (:func:`file_tensors`) share one.
    """
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.{kind}"
    match, inner = _BLOCK.fullmatch(stem), block_names(ARCHITECTURES[facts.family])
    if match is None or match[2] not in inner:
        raise InputError(f"the tensor {name} has no place in a GGUF file")
    return f"blk.{match[1]}.{inner[match[2]]}.{kind}"


def checkpoint_names(name: str, architecture: str) -> list[str]:
    """The checkpoint's tensors that lie in one of a GGUF file; its own name where that is none."""
    stem, _, kind = name.rpartition(".")
    outer = {there: here for here, there in OUTER_NAMES.items()}
    if stem in outer:
        return [f"{outer[stem]}.{kind}"]
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk":
        inner = block_names(architecture).items()
        own = ["attn_q", "attn_k", "attn_v"] if parts[2] == "attn_qkv" else [parts[2]]
        found = [here for stored in own for here, there in inner if there == stored]
        if found:
            return [f"model.layers.{parts[1]}.{here}.{kind}" for here in found]
    return [name]


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


def checkpoint_tensors(
    facts: DecoderFacts, names: list[str], stored: npt.NDArray[np.float32]
) -> dict[str, npt.NDArray[np.float32]]:
    """A tensor that was read from a GGUF file, as the tensors of a checkpoint that lie in it."""
    shapes = facts.tensor_shapes()
    ends = np.cumsum([shapes[name][0] for name in names])
    parts = np.split(stored, ends[:-1])
    return {n: checkpoint_values(facts, n, part) for n, part in zip(names, parts, strict=True)}


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
