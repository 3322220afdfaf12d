"""Scales, soft caps and YaRN that a GGUF file states, as llama.cpp reads them.

Where a file says nothing, what llama.cpp takes: ``load_arch_hparams`` in ``src/models/*.cpp``, and
``src/llama-context.cpp``.  YaRN's frequencies are ggml's (``ggml_rope_yarn_corr_dims``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.verify.lint_numbers import (
    ATTENTION_SCALE,
    ATTENTION_SOFTCAP,
    EMBEDDING_SCALE,
    LOGITS_DIVISOR,
    LOGITS_SOFTCAP,
    RESIDUAL_SCALE,
    ROPE_MAGNITUDE,
    plain_numbers,
)

# The Gemmas whose attention is scaled by hidden size over heads are known by their layers.
WIDE_GEMMAS = {("gemma2", 46), ("gemma3", 62)}
# Turns within the original context where YaRN begins and ends to interpolate.
YARN_FAST, YARN_SLOW = 32.0, 1.0


def gguf_numbers(
    metadata: dict[str, Any], architecture: str, counts: dict[str, int]
) -> dict[str, float | None]:
    """Every number of :mod:`edgedistill.verify.lint_numbers`; nothing without a head size.

    Args:
        metadata: of the file.
        architecture: llama.cpp's.
        counts: as in :class:`edgedistill.verify.stated.Stated`.
    """
    head_dim, hidden, heads = (counts.get(n, 0) for n in ("head_dim", "hidden_size", "heads"))
    if head_dim < 1 or hidden < 1 or heads < 1:
        return {}

    def stated(key: str) -> float | None:
        return number(metadata, f"{architecture}.{key}")

    found = plain_numbers(head_dim)
    if architecture in ("gemma2", "gemma3"):
        wide = (architecture, counts.get("layers")) in WIDE_GEMMAS
        found[ATTENTION_SCALE] = max(1, hidden // heads if wide else head_dim) ** -0.5
        found[EMBEDDING_SCALE] = math.sqrt(hidden)
        found[LOGITS_SOFTCAP] = stated("final_logit_softcapping") or None
    if architecture == "gemma2":
        attention, logits = (stated(f"{k}_logit_softcapping") for k in ("attn", "final"))
        found[ATTENTION_SOFTCAP] = 50.0 if attention is None else attention
        found[LOGITS_SOFTCAP] = 30.0 if logits is None else logits
    if architecture == "granite":
        found[ATTENTION_SCALE] = stated("attention.scale") or found[ATTENTION_SCALE]
        found[EMBEDDING_SCALE] = stated("embedding_scale") or 1.0
        found[RESIDUAL_SCALE] = stated("residual_scale") or 1.0
        found[LOGITS_DIVISOR] = stated("logit_scale")
    if metadata.get(f"{architecture}.rope.scaling.type") == "yarn":
        factor = stated("rope.scaling.factor")
        own = stated("rope.scaling.attn_factor")
        usual = 0.1 * math.log(factor) + 1.0 if factor is not None and factor > 1.0 else 1.0
        found[ROPE_MAGNITUDE] = usual * (1.0 if own is None else own)
    return found


def yarn_divisors(
    metadata: dict[str, Any], architecture: str, head_dim: int
) -> npt.NDArray[np.float64] | None:
    """float64 [head_dim / 2]: what YaRN divides each frequency by; None where keys are missing."""
    base = number(metadata, f"{architecture}.rope.freq_base") or 10000.0
    factor = number(metadata, f"{architecture}.rope.scaling.factor")
    context = whole(metadata, f"{architecture}.rope.scaling.original_context_length")
    context = context or whole(metadata, f"{architecture}.context_length")
    if not factor or factor <= 0.0 or not context or context < 1 or base <= 1.0:
        return None
    ends = [
        head_dim * math.log(context / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))
        for turns in (YARN_FAST, YARN_SLOW)
    ]
    first, last = max(0, math.floor(ends[0])), min(head_dim - 1, math.ceil(ends[1]))
    interpolated = (np.arange(head_dim // 2) - first) / max(0.001, last - first)
    interpolated = np.clip(interpolated, 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1.0 / (1.0 - interpolated + interpolated / factor)
    return divisors


def whole(metadata: dict[str, Any], key: str) -> int | None:
    """A whole number of the metadata; None for anything else."""
    value = metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(metadata: dict[str, Any], key: str) -> float | None:
    """A number of the metadata; None for anything else."""
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
