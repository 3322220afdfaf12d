"""What a config asks for that no fact of a decoder holds, in words, for a refusal that helps.

It reads configs of families that edgedistill does not know, so it only looks for keys that tell.
"""

from __future__ import annotations

from typing import Any

# What the keys of a config tell, wherever they are set; by families of transformers 5.
_TELLING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("several modalities", ("text_config", "vision_config", "audio_config")),
    ("an encoder", ("is_encoder_decoder",)),
    (
        "experts",
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    ),
    ("latent attention", ("kv_lora_rank",)),
    ("linear attention", ("linear_num_key_heads",)),
    ("convolutions", ("conv_L_cache",)),
    ("state-space layers", ("state_size", "mamba_d_state", "ssm_state_size")),
    (
        "norms that subtract a mean",
        ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "layernorm_epsilon"),
    ),
    ("attention and FFN side by side", ("use_parallel_residual", "parallel_attn")),
    ("positions as biases", ("alibi",)),
    ("clipped queries and keys", ("clip_qkv",)),
)
_KINDS = {"full_attention", "sliding_attention"}
# Where no key tells it: their modeling files in transformers.
_OF_FAMILY = {
    "cohere": ("attention and FFN side by side", "rotation of neighbours"),
    "cohere2": ("attention and FFN side by side", "rotation of neighbours"),
    "exaone4": ("norms behind the halves and none before",),
    "glm": ("rotation of neighbours",),
    "glm4": ("rotation of neighbours",),
    "gpt_oss": ("attention sinks",),
    "olmo": ("norms without weights",),
    "olmo2": ("norms behind the halves and none before",),
}


def missing_facts(config: dict[str, Any]) -> list[str]:
    """In words, each with the key that tells it; nothing where no key does.

    Args:
        config: of a family that is not known here, as JSON gives it.
    """
    found = list(_OF_FAMILY.get(str(config.get("model_type")), ()))
    for words, keys in _TELLING:
        for key in keys:
            value = config.get(key)
            if value and not (words == "experts" and value == 1):
                shown = "" if isinstance(value, dict | list) else f" {value}"
                found.append(f"{words} ({key}{shown})")
                break
    kinds = config.get("layer_types")
    others = sorted({str(k) for k in kinds} - _KINDS) if isinstance(kinds, list) else []
    return found + [f"layers of the kind {kind}" for kind in others]
