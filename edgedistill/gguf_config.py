"""The ``config.json`` of the model in a GGUF file, from its metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgedistill.decoder_config import MOST_LAYERS
from edgedistill.errors import InputError
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_layout import LONG_DIVISORS, ROPE_DIVISORS, SHORT_DIVISORS
from edgedistill.gguf_limits import NO_ROPE_STEP, WIDE_SCALE_LAYERS
from edgedistill.gguf_tokenizer import special_id
from edgedistill.layer_kinds import KINDS, SLIDING_PATTERN
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
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "hidden_act": "silu",
        "no_rope_layer_interval": NO_ROPE_STEP,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "hidden_act": "silu",
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
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
        **_own_fields(file, stated, architecture),
        **special_ids(file.metadata),
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
    }


def _own_fields(file: GgufFile, stated: _Stated, architecture: str) -> dict[str, Any]:
    """What a family's config has of its own, and how it rotates."""
    if architecture == "gemma3":
        return _gemma3_fields(stated)
    if architecture == "phi3":
        return _phi3_fields(file, stated)
    ropes = _rope_fields(file, stated)
    if architecture == "gemma2":
        return ropes | _gemma2_fields(stated)
    return ropes | _granite_fields(stated) if architecture == "granite" else ropes


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
    if kind == "yarn":
        return _yarn_parameters(stated, theta)
    if kind != "none":
        raise InputError(f"rope.scaling.type {kind!r} is not read", where=stated.where)
    return {"rope_type": "default", "rope_theta": theta}


def _yarn_parameters(stated: _Stated, theta: float) -> dict[str, Any]:
    """As llama.cpp's src/llama-context.cpp reads them: its usual factor times the file's."""
    factor = stated.number("rope.scaling.factor")
    if not factor > 0.0:
        raise InputError(f"rope.scaling.factor is {factor}", where=stated.where)
    parameters = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
    context = stated.count("context_length")
    parameters["original_max_position_embeddings"] = stated.count(
        "rope.scaling.original_context_length", context
    )
    own = stated.number("rope.scaling.attn_factor", 1.0)
    if own != 1.0:
        parameters["attention_factor"] = own * (0.1 * math.log(max(1.0, factor)) + 1.0)
    return parameters


def _phi3_fields(file: GgufFile, stated: _Stated) -> dict[str, Any]:
    """What llama.cpp's src/models/phi3.cpp reads, and the window that it does not use."""
    context, theta = stated.count("context_length"), stated.number("rope.freq_base", 10000.0)
    wide = max(1, stated.count("embedding_length") // stated.count("attention.head_count"))
    width = stated.count("attention.key_length", wide)
    share = stated.count("rope.dimension_count", width) / width
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    if {SHORT_DIVISORS, LONG_DIVISORS} <= file.tensors.keys():
        # Of a float32 1.1 the number 1.1.
        short, long = (
            [float(str(factor)) for factor in file.read(name).reshape(-1)]
            for name in (SHORT_DIVISORS, LONG_DIVISORS)
        )
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope["attention_factor"] = stated.number("rope.scaling.attn_factor", 1.0)
    original = stated.count("rope.scaling.original_context_length", context)
    return {
        "rope_theta": theta,
        "partial_rotary_factor": share,
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": stated.number("attention.sliding_window", 0) or None,
    }


def _granite_fields(stated: _Stated) -> dict[str, Any]:
    """Scales; 0 is llama.cpp's word for none."""
    heads = stated.count("attention.head_count")
    wide = max(1, stated.count("embedding_length") // heads)
    width = stated.count("attention.key_length", wide)
    return {
        "attention_multiplier": stated.number("attention.scale", 0.0) or width**-0.5,
        "embedding_multiplier": stated.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": stated.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": stated.number("logit_scale"),
    }


def _gemma2_fields(stated: _Stated) -> dict[str, Any]:
    """What the metadata of Gemma 2 say, and what llama.cpp's src/models/gemma2.cpp says itself."""
    layers = _listed_layers(stated)
    period = stated.value("attention.sliding_window_pattern")
    if not isinstance(period, int) or isinstance(period, bool):  # a list is not read there
        period = 2
    slides = [not period or layer % period < period - 1 for layer in range(layers)]
    return {
        "query_pre_attn_scalar": _attention_scalar(stated, "gemma2"),
        "layer_types": [KINDS[one] for one in slides],
        "sliding_window": stated.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": stated.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": stated.number("final_logit_softcapping", 30.0),
    }


def _listed_layers(stated: _Stated) -> int:
    """How many there are, before as many are listed."""
    layers = stated.count("block_count")
    if layers > MOST_LAYERS:
        raise InputError(f"block_count is {layers}", where=stated.where)
    return layers


def _attention_scalar(stated: _Stated, architecture: str) -> int:
    """Whose inverse root scales attention; the one of 27B is scaled in another way."""
    wide = stated.count("embedding_length") // stated.count("attention.head_count")
    is_wide = stated.count("block_count") == WIDE_SCALE_LAYERS[architecture]
    return wide if is_wide else stated.count("attention.key_length", wide)


def _gemma3_fields(stated: _Stated) -> dict[str, Any]:
    """What the metadata of Gemma 3 say, and what llama.cpp's src/models/gemma3.cpp says itself."""
    layers, scalar = _listed_layers(stated), _attention_scalar(stated, "gemma3")
    if stated.text("rope.scaling.type", "none") == "yarn":
        raise InputError("YaRN of sliding layers is not read", where=stated.where)
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
        fields["layer_types"] = [KINDS[slides] for slides in _sliding_layers(stated, layers)]
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
