"""What a GGUF file says of the model in it, from its header alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgedistill.decoder_config import MOST_LAYERS
from edgedistill.errors import InputError
from edgedistill.gguf_blocks import F16, F32, Q2_0, Q4_0, Q4_1, Q5_0, Q8_0
from edgedistill.gguf_file import GgufFile, gguf_package
from edgedistill.gguf_layout import ROPE_DIVISORS, SHORT_DIVISORS, checkpoint_names
from edgedistill.gguf_tokenizer import adds_bos, special_id
from edgedistill.layer_kinds import SLIDING_PATTERN
from edgedistill.verify.lint_gguf_numbers import gguf_numbers, number, whole, yarn_divisors
from edgedistill.verify.stated import Stated, describe

# Counts that the metadata state under the architecture's name.
COUNT_KEYS = {
    "layers": "block_count",
    "hidden_size": "embedding_length",
    "ffn_size": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
STORAGE = {
    F32.type_id: "float32",
    F16.type_id: "float16",
    Q8_0.type_id: describe(8, 32, zeros=False, scales="float16"),
    Q5_0.type_id: describe(5, 32, zeros=False, scales="float16"),
    Q4_0.type_id: describe(4, 32, zeros=False, scales="float16"),
    Q4_1.type_id: describe(4, 32, zeros=True, scales="float16"),
    Q2_0.type_id: describe(2, 64, zeros=False, scales="float16"),
}
GEMMA2_WINDOW = 4096  # llama.cpp's own default
METADATA = {"name": "general.name", "licence": "general.license"}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def read_gguf(path: Path) -> Stated:
    """Read the header of a GGUF file; no tensor but the rotary divisors is looked at.

    Raises:
        InputError: the file is missing, truncated or not a GGUF file.
    """
    file = GgufFile(path)
    metadata = file.metadata
    architecture = str(metadata.get("general.architecture"))
    counts = _counts(file, architecture)
    template = metadata.get("tokenizer.chat_template")
    tokens = metadata.get("tokenizer.ggml.tokens")
    ends = (special_id(metadata, role) for role in ("eos", "eot", "eom"))
    theta = number(metadata, f"{architecture}.rope.freq_base")
    return Stated(
        counts=counts,
        context_tokens=whole(metadata, f"{architecture}.context_length"),
        tied_embeddings=_HEAD not in file.tensors,
        norm_epsilons=_some(number(metadata, f"{architecture}.attention.layer_norm_rms_epsilon")),
        # llama.cpp's own default, where the file says nothing
        rope_theta=10000.0 if theta is None else theta,
        rope_divisors=_divisors(file, architecture, counts.get("head_dim")),
        rope_tolerance=1e-5,
        **_sliding(metadata, architecture, counts.get("layers", 0)),
        unrotated_layers=_unrotated(architecture, counts.get("layers", 0)),
        numbers=gguf_numbers(metadata, architecture, counts),
        bos_id=special_id(metadata, "bos"),
        adds_bos=_adds_bos(metadata, str(path)),
        end_ids=frozenset(i for i in ends if i is not None),
        storage={
            name: storage_name(tensor.type_id)
            for stored, tensor in file.tensors.items()
            for name in checkpoint_names(stored, architecture)
        },
        tokens=len(tokens) if isinstance(tokens, list) else 0,
        chat_template=template if isinstance(template, str) else None,
        architecture=architecture,
        metadata={n: str(metadata[k]) for n, k in METADATA.items() if k in metadata},
    )


def _sliding(metadata: dict[str, Any], architecture: str, layers: int) -> dict[str, Any]:
    """What is said of sliding windows; where it is not, what llama.cpp takes for the two Gemmas."""
    default = {"gemma2": GEMMA2_WINDOW, "gemma3": 0}.get(architecture, 0)
    window = whole(metadata, f"{architecture}.attention.sliding_window")
    window = default if window is None else window
    if architecture not in ("gemma2", "gemma3") or not window:
        return {"sliding_layers": ()}
    key, layers = f"{architecture}.attention.sliding_window_pattern", min(layers, MOST_LAYERS)
    theta = number(metadata, f"{architecture}.rope.freq_base_swa")
    if architecture == "gemma2":
        theta = number(metadata, f"{architecture}.rope.freq_base") if theta is None else theta
        period = whole(metadata, key)  # a list is not read
        period = 2 if period is None else period
        pattern = [not period or layer % period < period - 1 for layer in range(layers)]
    else:
        stated = metadata.get(key, SLIDING_PATTERN)
        every = stated if isinstance(stated, int) and stated > 0 else SLIDING_PATTERN
        pattern = [(layer + 1) % every != 0 for layer in range(layers)]
        pattern = stated if isinstance(stated, list) else pattern
    return {
        "window_tokens": window,
        "sliding_layers": tuple(bool(slides) for slides in pattern),
        "sliding_rope_theta": 10000.0 if theta is None else theta,
    }


def _unrotated(architecture: str, layers: int) -> tuple[bool, ...]:
    """Nothing is said of it; llama.cpp's SmolLM3 leaves every fourth layer as it is."""
    bare = architecture == "smollm3"
    return tuple(bare and layer % 4 == 3 for layer in range(min(layers, MOST_LAYERS)))


def storage_name(type_id: int) -> str:
    """The block type in words where it holds one of our grids, else by ggml's name."""
    if type_id in STORAGE:
        return STORAGE[type_id]
    return str(gguf_package().GGMLQuantizationType(type_id).name)


def _counts(file: GgufFile, architecture: str) -> dict[str, int]:
    found = {name: whole(file.metadata, f"{architecture}.{k}") for name, k in COUNT_KEYS.items()}
    if found["kv_heads"] is None:
        found["kv_heads"] = found["heads"]
    if found["head_dim"] is None and found["hidden_size"] and found["heads"]:
        found["head_dim"] = found["hidden_size"] // found["heads"]
    if _EMBEDDING in file.tensors:
        found["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    return {name: value for name, value in found.items() if value is not None}


def _divisors(file: GgufFile, architecture: str, head_dim: int | None) -> Any:
    """A linear factor, a tensor of divisors (of LongRoPE's the short ones), or ones."""
    if head_dim is None or not 2 <= head_dim <= 4096:
        return None
    for name in (ROPE_DIVISORS, SHORT_DIVISORS):
        if name in file.tensors:
            return file.read(name).astype(np.float64).reshape(-1)
    rotated = whole(file.metadata, f"{architecture}.rope.dimension_count")
    head_dim = rotated if rotated is not None and 2 <= rotated <= head_dim else head_dim
    kind = str(file.metadata.get(f"{architecture}.rope.scaling.type", "none"))
    factor = number(file.metadata, f"{architecture}.rope.scaling.factor")
    if kind == "none" or factor is None:
        return np.ones(head_dim // 2)
    if kind == "yarn":
        return yarn_divisors(file.metadata, architecture, head_dim)
    # Others are told by a factor on every frequency, which no student's has: they fail.
    return np.full(head_dim // 2, factor)


def _adds_bos(metadata: dict[str, Any], where: str) -> bool | None:
    try:
        return adds_bos(metadata, where)
    except InputError:  # a pre-tokenizer that is not known here: only what is stated counts
        stated = metadata.get("tokenizer.ggml.add_bos_token")
        return stated if isinstance(stated, bool) else None


def _some(value: float | None) -> frozenset[float]:
    return frozenset() if value is None else frozenset({value})
