"""Rotary position embeddings: their bases and scalings, as data read from a config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError

LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
SCALINGS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of halves (``rotate_half``, the Hugging Face convention).

    Attributes:
        theta: base of the frequencies.
        scaling: None, or the config's parameters of a scaling in ``SCALINGS``.
        attention_factor: what cosines and sines are multiplied by.
    """

    theta: float
    scaling: dict[str, Any] | None = None
    attention_factor: float = 1.0

    def inverse_frequencies(self, head_dim: int) -> npt.NDArray[np.float32]:
        """float32 [head_dim / 2], scaling applied."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        return (plain / self.frequency_divisors(head_dim)).astype(np.float32)

    def frequency_divisors(self, head_dim: int) -> npt.NDArray[np.float32]:
        """float32 [head_dim / 2]: what each frequency is divided by (GGUF's ``rope_freqs``).

        Llama 3.1's rule: https://github.com/meta-llama/llama-models, ``apply_scaling``.
        YaRN: Peng et al., arXiv 2309.00071, section 3.2.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        if self.scaling is None:
            return np.ones(exponents.shape, dtype=np.float32)
        factor = float(self.scaling["factor"])
        if self.scaling["rope_type"] == "linear":
            return np.full(exponents.shape, factor, dtype=np.float32)
        if self.scaling["rope_type"] == "yarn":
            kept = 1.0 - _yarn_ramp(self.theta, self.scaling, head_dim)
            return (1.0 / (kept + (1.0 - kept) / factor)).astype(np.float32)
        wavelengths = 2 * math.pi * self.theta**exponents
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        turns = float(self.scaling["original_max_position_embeddings"]) / wavelengths
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1.0 / (smooth + (1.0 - smooth) / factor)).astype(np.float32)


def read_rope(config: dict[str, Any], where: str) -> Rope:
    """The rotary embedding of a config whose layers all have the same one.

    Args:
        config: of transformers 5, with ``rope_parameters``, or 4, with ``rope_theta`` beside
            ``rope_scaling``.
        where: its path, for errors.

    Raises:
        InputError: a scaling that is not known.
        KeyError, TypeError, ValueError: a parameter is missing, or of the wrong kind.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if parameters.get("rope_type", parameters.get("type")) == "yarn":
        # Where transformers looks for it, first and last.
        key = "original_max_position_embeddings"
        stated = config.get(key) or parameters.get(key) or config["max_position_embeddings"]
        parameters[key] = stated
    return _rope(parameters, config.get("rope_theta", 10000.0), where)


def read_layered_ropes(config: dict[str, Any], where: str) -> tuple[Rope, Rope]:
    """(of full attention, of sliding attention), of a config that tells them apart.

    transformers 5 nests the parameters by layer type; transformers 4 states ``rope_theta`` and
    ``rope_local_base_freq``, and scales full attention alone.  The defaults are Gemma 3's.

    Args:
        config: of such a decoder.
        where: its path, for errors.

    Raises:
        InputError, KeyError, TypeError, ValueError: as :func:`read_rope`.
    """
    nested = dict(config.get("rope_parameters") or {})
    full = dict(nested.get("full_attention") or config.get("rope_scaling") or {})
    sliding = dict(nested.get("sliding_attention") or {})
    return (
        _rope(full, config.get("rope_theta", 1_000_000.0), where),
        _rope(sliding, config.get("rope_local_base_freq", 10_000.0), where),
    )


def positive(config: dict[str, Any], key: str) -> float:
    """A number above 0 in a config.

    Raises:
        KeyError, TypeError, ValueError: it is missing, or something else.
    """
    value = float(config[key])
    if not 0.0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}, not a number above 0")
    return value


def _rope(parameters: dict[str, Any], theta_beside: Any, where: str) -> Rope:
    stated = parameters.get("rope_theta", theta_beside)
    theta = positive({"rope_theta": stated}, "rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind not in SCALINGS:
        raise InputError(
            f"rope_type {kind!r} is not supported yet",
            where=where,
            hint=f"scalings that are known: {', '.join(SCALINGS)}",
        )
    parameters = parameters | {"rope_type": kind}
    for key in LLAMA3_KEYS if kind == "llama3" else ("factor",):
        positive(parameters, key)
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise ValueError("high_freq_factor is not above low_freq_factor")
    if kind != "yarn":
        return Rope(theta, parameters)
    for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        parameters[key] = positive({key: parameters.get(key) or usual}, key)
    positive(parameters, "original_max_position_embeddings")
    if theta <= 1.0:
        raise ValueError(f"rope_theta is {theta!r}, which no YaRN stretches")
    return Rope(theta, parameters, _yarn_attention_factor(parameters))


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """As stated, or ``0.1 ln(factor) + 1`` (arXiv 2309.00071, section 3.4).

    DeepSeek's two ``mscale`` stand before the logarithm, and their quotient counts.
    """
    if scaling.get("attention_factor") is not None:
        return positive(scaling, "attention_factor")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(max(1.0, float(scaling["factor"]))) + 1.0

    keys = ("mscale", "mscale_all_dim")
    if all(scaling.get(key) for key in keys):
        over, under = (magnitude(positive(scaling, key)) for key in keys)
        return over / under
    return magnitude(1.0)


def _yarn_ramp(theta: float, scaling: dict[str, Any], head_dim: int) -> npt.NDArray[np.float64]:
    """float64 [head_dim / 2]: 0 for frequencies that stay as they are, 1 for interpolated ones.

    The bounds are places among the frequencies, those that turn ``beta_fast`` and ``beta_slow``
    times within the original context.
    """
    context = float(scaling["original_max_position_embeddings"])

    def place(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(float(scaling["beta_fast"])), place(float(scaling["beta_slow"]))
    if scaling.get("truncate", True):
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    span = high - low if high != low else 0.001  # as transformers has it
    ramp: npt.NDArray[np.float64] = np.clip((np.arange(head_dim // 2) - low) / span, 0.0, 1.0)
    return ramp
