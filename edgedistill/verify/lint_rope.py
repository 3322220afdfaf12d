"""Hold what an artifact says of its rotary embedding against the student's ``config.json``."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgedistill.results import Check
from edgedistill.verify.lint_check import lint_check, near
from edgedistill.verify.stated import Stated


def expected_rope(config: Any) -> tuple[float, np.ndarray]:
    """(theta, float64 [rotary_dim / 2] of divisors), by the code that ``transformers`` runs.

    Of a decoder with sliding layers those of the layers that attend to all, of LongRoPE the short
    ones.
    """
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    parameters = config.rope_parameters
    if "full_attention" in parameters:
        theta = float(parameters["full_attention"]["rope_theta"])
        frequencies = Gemma3RotaryEmbedding(config).full_attention_inv_freq.double().numpy()
    else:
        theta = float(parameters["rope_theta"])
        # Its own: it rotates a part of a head.
        kind = Phi3RotaryEmbedding if config.model_type == "phi3" else LlamaRotaryEmbedding
        frequencies = kind(config).inv_freq.double().numpy()
    count = len(frequencies)
    return theta, theta ** (-np.arange(count) / count) / frequencies


def rope_checks(stated: Stated, config: Any) -> list[Check]:
    """The checks of base and scaling, as far as the artifact tells them.

    Args:
        stated: what the artifact says.
        config: of ``transformers``.
    """
    theta, divisors = expected_rope(config)
    checks, alike = [], rotates_alike(stated, theta, divisors)
    if stated.rope_theta is not None:
        passed = alike or near(stated.rope_theta, theta, stated.rope_tolerance)
        shown = theta if alike else stated.rope_theta
        checks.append(lint_check("RoPE theta", passed, f"{theta:g}", f"{shown:.7g}"))
    if stated.rope_divisors is not None:
        found = divisors if alike else stated.rope_divisors
        same = found.shape == divisors.shape and bool(
            # The base's own error shows in every frequency, so the tables' tolerance holds twice.
            np.allclose(found, divisors, rtol=2 * stated.rope_tolerance, atol=0)
        )
        spans = (f"frequencies divided by {_span(each)}" for each in (divisors, found))
        checks.append(lint_check("RoPE scaling", same, *spans))
    return checks


def rotates_alike(stated: Stated, theta: float, divisors: np.ndarray) -> bool:
    """Whether the frequencies are right, whichever base and divisors they are taken apart into.

    Tables tell frequencies alone: YaRN may divide the second fastest already, and then the base
    that the two fastest seem to have is not the config's.
    """
    found = stated.rope_divisors
    if stated.rope_theta is None or found is None or found.shape != divisors.shape:
        return False
    places = -np.arange(len(divisors)) / len(divisors)
    frequencies, expected = stated.rope_theta**places / found, theta**places / divisors
    return bool(np.allclose(frequencies, expected, rtol=stated.rope_tolerance, atol=0))


def _span(divisors: np.ndarray) -> str:
    low, high = float(divisors.min(initial=np.inf)), float(divisors.max(initial=-np.inf))
    return f"{low:.4g}" if near(low, high, 1e-3) else f"{low:.4g} to {high:.4g}"
