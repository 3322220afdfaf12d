"""The ``config.json`` of the model in a GGUF file, from its metadata."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgedistill.decoder import MOST_LAYERS
from edgedistill.errors import InputError
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_layout import GEMMA3_27B_LAYERS, ROPE_DIVISORS
from edgedistill.gguf_tokenizer import special_id
from edgedistill.layer_kinds import SLIDING_PATTERN
from edgedistill.rope import Rope

# llama.cpp's architecture -> what opens the student in transformers, and what it implies.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
# The bands of Llama 3.1 and 3.2 (their config.json); a GGUF keeps only the divisors they give.
LLAMA3_BANDS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """What ``config.json`` has to say of the model in a GGUF file.

    Raises:
        InputError: an architecture that is not known, or metadata that are missing or damaged.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODELS:
        raise InputError(
            f"its architecture is {architecture!r}",
            where=str(file.path),
            hint=f"known: {', '.join(MODELS)}",
        )
    stated = _Stated(file, architecture)
    if stated.number("expert_count", 0) > 0:
        raise InputError("is a mixture of experts, which is not read", where=str(file.path))
    return {
        **MODELS[architecture],
        **_shape_fields(file, stated),
        **(_gemma3_fields(stated) if architecture == "gemma3" else _rope_fields(file, stated)),
        **special_ids(file.metadata),
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
    }


class _Stated:
    """The numbers that the file states under its architecture's name."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file, self._prefix = file, architecture
        self.where = str(file.path)

    def value(self, key: str) -> Any:
        """As it is stated; None for nothing."""
        return self._file.metadata.get(f"{self._prefix}.{key}")

    def text(self, key: str, default: str) -> str:
        return str(self._file.metadata.get(f"{self._prefix}.{key}", default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number, such as 1e-05 for the float32 9.999999747378752e-06; None: it is required."""
        value = self._file.metadata.get(f"{self._prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"{self._prefix}.{key} is {_brief(value)}, not a number",
                where=str(self._file.path),
            )
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """A number of something: a whole one, above zero."""
        value = self.number(key, default)
        if not isinstance(value, int) or value <= 0:
            raise InputError(f"{self._prefix}.{key} is {value}", where=str(self._file.path))
        return value


def _brief(value: object) -> str:
    if value is None:
        return "missing"
    return "a list (it differs by layer)" if isinstance(value, list) else repr(value)


def _shape_fields(file: GgufFile, stated: _Stated) -> dict[str, Any]:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError("has no tensor token_embd.weight", where=str(file.path))
    heads, hidden = stated.count("attention.head_count"), stated.count("embedding_length")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": stated.count("feed_forward_length"),
        "num_hidden_layers": stated.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated.count("attention.head_count_kv", heads),
        "head_dim": stated.count("attention.key_length", max(1, hidden // heads)),
        "max_position_embeddings": stated.count("context_length"),
        "rms_norm_eps": stated.number("attention.layer_norm_rms_epsilon"),
    }


def _rope_fields(file: GgufFile, stated: _Stated) -> dict[str, Any]:
    parameters = _rope_parameters(stated)
    theta = parameters["rope_theta"]
    if ROPE_DIVISORS in file.tensors:
        parameters |= _llama3_scaling(file, theta)
    # Both spellings: transformers 5 reads rope_parameters, mlx-lm only rope_theta.
    return {"rope_theta": theta, "rope_parameters": parameters}


def _rope_parameters(stated: _Stated) -> dict[str, Any]:
    theta = stated.number("rope.freq_base", 10000.0)
    kind = stated.text("rope.scaling.type", "none")
    if kind == "linear":
        factor = stated.number("rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "none":
        raise InputError(f"rope.scaling.type {kind!r} is not read", where=stated.where)
    return {"rope_type": "default", "rope_theta": theta}


def _gemma3_fields(stated: _Stated) -> dict[str, Any]:
    """What the metadata of Gemma 3 say, and what llama.cpp's src/models/gemma3.cpp says itself."""
    layers, heads = stated.count("block_count"), stated.count("attention.head_count")
    if layers > MOST_LAYERS:  # before as many are listed
        raise InputError(f"gemma3.block_count is {layers}", where=stated.where)
    wide = stated.count("embedding_length") // heads
    # The one of 27B scales its attention in another way.
    scalar = wide if layers == GEMMA3_27B_LAYERS else stated.count("attention.key_length", wide)
    sliding = stated.number("rope.freq_base_swa", 10000.0)
    fields: dict[str, Any] = {
        "query_pre_attn_scalar": scalar,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {
            "full_attention": _rope_parameters(stated),
            "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
        },
        "final_logit_softcapping": stated.number("final_logit_softcapping", 0.0) or None,
    }
    if stated.number("attention.sliding_window", 0) > 0:
        fields["sliding_window"] = stated.count("attention.sliding_window")
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[slides] for slides in _sliding_layers(stated, layers)]
    return fields


def _sliding_layers(stated: _Stated, layers: int) -> list[bool]:
    """Of each layer whether it attends to a window; by default all but every sixth."""
    pattern = stated.value("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(isinstance(slides, int) for slides in pattern):
            raise InputError(
                f"its sliding_window_pattern is not one of {layers} layers", where=stated.where
            )
        return [bool(slides) for slides in pattern]
    every = stated.count("attention.sliding_window_pattern", SLIDING_PATTERN)
    return [(layer + 1) % every != 0 for layer in range(layers)]


def _llama3_scaling(file: GgufFile, theta: float) -> dict[str, Any]:
    stored = file.read(ROPE_DIVISORS)
    if stored.ndim != 1 or stored.size == 0 or not stored.max() > 0:
        raise InputError(f"{ROPE_DIVISORS} holds no divisors", where=str(file.path))
    scaling = {"rope_type": "llama3", "factor": float(stored.max()), **LLAMA3_BANDS}
    wanted = Rope(theta, scaling).frequency_divisors(2 * stored.size)
    if not np.allclose(wanted, stored, rtol=1e-5):
        raise InputError(
            f"{ROPE_DIVISORS} is not Llama 3.1's scaling of the rotary frequencies",
            where=str(file.path),
            hint="start from the model's Hugging Face directory",
        )
    return scaling


def special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos, eos (a list where there are several) and pad, as ``config.json`` has them."""
    ends = [special_id(metadata, role) for role in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(i for i in ends if i is not None))
    return {
        "bos_token_id": special_id(metadata, "bos"),
        "eos_token_id": distinct[0] if len(distinct) == 1 else distinct or None,
        "pad_token_id": special_id(metadata, "padding"),
    }
