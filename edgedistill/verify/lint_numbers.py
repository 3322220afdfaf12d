"""Hold the scales and soft caps that an artifact states against the student's ``config.json``.

What is expected is what ``transformers`` reads from the config, by its class's own fields: a key
that the class does not know counts for nothing.
"""

from __future__ import annotations

import math
from typing import Any

from edgedistill.results import Check
from edgedistill.verify.stated import Stated

ATTENTION_SCALE = "attention scale"
ATTENTION_SOFTCAP = "soft cap of attention"
LOGITS_SOFTCAP = "soft cap of logits"
EMBEDDING_SCALE = "embedding scale"
RESIDUAL_SCALE = "residual scale"
LOGITS_DIVISOR = "divisor of logits"
ROPE_MAGNITUDE = "RoPE magnitude"
TOLERANCE = 1e-5


def number_checks(stated: Stated, config: Any) -> list[Check]:
    """A check of every number that is stated, unless it is what plain blocks have on both sides.

    Args:
        stated: what the artifact says.
        config: of ``transformers``.
    """
    expected, plain = expected_numbers(config), plain_numbers(_head_dim(config))
    checks = []
    for words, found in stated.numbers.items():
        wanted = expected[words]
        if _same(wanted, plain[words]) and _same(found, plain[words]):
            continue
        passed = _same(wanted, found)
        shown = [("none" if n is None else f"{n:.6g}") for n in (found, wanted)]
        detail = shown[0] if passed else f"{shown[0]}, expected {shown[1]}"
        checks.append(Check(name=f"lint: {words}", passed=passed, detail=detail))
    return checks + _unrotated(stated, config)


def plain_numbers(head_dim: int) -> dict[str, float | None]:
    """What a decoder of plain blocks has."""
    return {
        ATTENTION_SCALE: head_dim**-0.5,
        ATTENTION_SOFTCAP: None,
        LOGITS_SOFTCAP: None,
        EMBEDDING_SCALE: 1.0,
        RESIDUAL_SCALE: 1.0,
        LOGITS_DIVISOR: 1.0,
        ROPE_MAGNITUDE: 1.0,
    }


def expected_numbers(config: Any) -> dict[str, float | None]:
    """What ``transformers`` computes with."""
    numbers = plain_numbers(_head_dim(config))
    scalar, scale = _own(config, "query_pre_attn_scalar"), _own(config, "attention_multiplier")
    if scalar is not None:
        numbers[ATTENTION_SCALE] = float(scalar) ** -0.5
        # Gemma's classes alone have that number, and they multiply embeddings without a key.
        numbers[EMBEDDING_SCALE] = math.sqrt(config.hidden_size)
    elif scale is not None:
        numbers[ATTENTION_SCALE] = float(scale)
    for words, key in (
        (ATTENTION_SOFTCAP, "attn_logit_softcapping"),
        (LOGITS_SOFTCAP, "final_logit_softcapping"),
        (EMBEDDING_SCALE, "embedding_multiplier"),
        (RESIDUAL_SCALE, "residual_multiplier"),
        (LOGITS_DIVISOR, "logits_scaling"),
    ):
        value = _own(config, key)
        if value is not None:
            numbers[words] = float(value)
    numbers[ROPE_MAGNITUDE] = _rope_magnitude(config)
    return numbers


def _rope_magnitude(config: Any) -> float:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if "full_attention" in config.rope_parameters:  # such layers are scaled in no such way
        return 1.0
    return float(LlamaRotaryEmbedding(config).attention_scaling)


def _unrotated(stated: Stated, config: Any) -> list[Check]:
    rotated = _own(config, "no_rope_layers")
    layers = int(config.num_hidden_layers)
    wanted = [not one for one in rotated[:layers]] if rotated is not None else [False] * layers
    found = stated.unrotated_layers
    if found is None or not (any(wanted) or any(found)):
        return []
    shown = [", ".join(str(i) for i, bare in enumerate(x) if bare) for x in (found, wanted)]
    passed = list(found) == wanted
    detail = shown[0] if passed else f"{shown[0] or 'none'}, expected {shown[1] or 'none'}"
    return [Check(name="lint: layers without rotation", passed=passed, detail=detail)]


def _own(config: Any, key: str) -> Any:
    return getattr(config, key) if hasattr(type(config), key) else None


def _head_dim(config: Any) -> int:
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=TOLERANCE)
