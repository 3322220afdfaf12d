"""The families of decoders that are known: what a ``model_type`` implies, an entry each.

Everything that tells one family from another stands here; exporters and stages read facts and never
look at ``model_type``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgedistill.layer_kinds import (
    LayerRule,
    above_max_window_layers,
    all_but_every_second,
    all_layers,
    by_no_rope,
    by_sliding_window_pattern,
    unrotated_ones,
)

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Family:
    """What a ``model_type`` implies beyond its config.

    Attributes:
        attention_bias, output_bias, qk_norm: as of :class:`DecoderFacts`.
        optional_bias: whether ``attention_bias`` of its config gives both.
        norm_offset, post_norms, scaled_embedding: as of :class:`DecoderFacts`.
        windows: which of its layers attend to a window; None: none can.
        unrotated: which of its layers are not rotated; None: all are rotated.
        two_ropes: whether layers that attend to a window have a rotary embedding of their own.
        scalar_key: what its config calls the number whose inverse root is the attention scale.
        numbers: other facts -> what its config calls them; what is null there is left out.
        activation_key: where the config names the activation, and ``activation`` its default.
        defaults: of keys that its config may leave out, those of its class in transformers.
        partly_rotated: whether its config may rotate a share of a head alone.
        rope_types: scalings of the rotary embedding that it has in transformers; empty: any.
        fused: as ``fused_modules`` of :class:`DecoderFacts`.
    """

    attention_bias: bool = False
    output_bias: bool = False
    optional_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embedding: bool = False
    windows: LayerRule | None = None
    unrotated: LayerRule | None = None
    two_ropes: bool = False
    scalar_key: str | None = None
    numbers: dict[str, str] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    activation: str = "silu"
    defaults: dict[str, Any] = field(default_factory=dict)
    partly_rotated: bool = False
    rope_types: tuple[str, ...] = ()
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)


_GEMMA = Family(
    norm_offset=1.0,
    post_norms=True,
    scaled_embedding=True,
    scalar_key="query_pre_attn_scalar",
    activation_key="hidden_activation",
    activation="gelu_pytorch_tanh",
    defaults={
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)
FAMILIES: dict[str, Family] = {
    "llama": Family(optional_bias=True),
    "mistral": Family(windows=all_layers, defaults={"sliding_window": 4096}),
    "qwen2": Family(
        attention_bias=True,
        windows=above_max_window_layers,
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        optional_bias=True,
        qk_norm=True,
        windows=above_max_window_layers,
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "smollm3": Family(
        optional_bias=True,
        windows=unrotated_ones,
        unrotated=by_no_rope,
        defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    ),
    "granite": Family(
        optional_bias=True,
        numbers={
            "attention_scale": "attention_multiplier",
            "embedding_multiplier": "embedding_multiplier",
            "residual_multiplier": "residual_multiplier",
            "logits_divisor": "logits_scaling",
        },
        defaults={
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "gemma2": replace(
        _GEMMA,
        windows=all_but_every_second,
        numbers={
            "attention_softcap": "attn_logit_softcapping",
            "logits_softcap": "final_logit_softcapping",
        },
        defaults=_GEMMA.defaults
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": replace(
        _GEMMA,
        qk_norm=True,
        windows=by_sliding_window_pattern,
        two_ropes=True,
        # Not that of attention, which transformers itself leaves out unless it runs "eager".
        numbers={"logits_softcap": "final_logit_softcapping"},
    ),
    "phi3": Family(
        windows=all_layers,
        partly_rotated=True,
        rope_types=("longrope",),
        # Of transformers' Phi3Config, which looks for it there first.
        defaults={"original_max_position_embeddings": 4096},
        fused={"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")},
    ),
}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
