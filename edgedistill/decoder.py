"""The family facts of a decoder, as data read from ``config.json``.

Everything that tells one decoder family from another stands here; exporters and stages read facts
and never look at ``model_type``.  A model that needs a fact that is not here is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError


@dataclass(frozen=True)
class _Family:
    """What a ``model_type`` implies beyond its config: biases and norms."""

    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False


FAMILIES: dict[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(attention_bias=True),
    "qwen3": _Family(qk_norm=True),
}
ACTIVATIONS: dict[str, Literal["silu"]] = {"silu": "silu", "swish": "silu"}
# Beyond any model; a damaged config must not make us list tensors without end.
MOST_LAYERS, LARGEST_SIZE = 4096, 1 << 31
LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of halves (``rotate_half``, the Hugging Face convention).

    Attributes:
        theta: base of the frequencies.
        scaling: None, or the config's parameters of a ``llama3`` or ``linear`` scaling.
    """

    theta: float
    scaling: dict[str, Any] | None = None

    def inverse_frequencies(self, head_dim: int) -> npt.NDArray[np.float32]:
        """float32 [head_dim / 2], scaling applied."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        return (plain / self.frequency_divisors(head_dim)).astype(np.float32)

    def frequency_divisors(self, head_dim: int) -> npt.NDArray[np.float32]:
        """float32 [head_dim / 2]: what each frequency is divided by (GGUF's ``rope_freqs``).

        Llama 3.1's rule: https://github.com/meta-llama/llama-models, ``apply_scaling``.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        if self.scaling is None:
            return np.ones(exponents.shape, dtype=np.float32)
        factor = float(self.scaling["factor"])
        if self.scaling["rope_type"] == "linear":
            return np.full(exponents.shape, factor, dtype=np.float32)
        wavelengths = 2 * math.pi * self.theta**exponents
        low, high = float(self.scaling["low_freq_factor"]), float(self.scaling["high_freq_factor"])
        turns = float(self.scaling["original_max_position_embeddings"]) / wavelengths
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1.0 / (smooth + (1.0 - smooth) / factor)).astype(np.float32)


@dataclass(frozen=True)
class DecoderFacts:
    """All that an exporter needs to know to write the graph of a decoder.

    The block is: ``x += o(attention(norm(x)))``, ``x += down(act(gate(norm(x))) * up(norm(x)))``.
    """

    family: str
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    norm_eps: float
    rope: Rope
    activation: Literal["silu"]
    qk_norm: bool
    attention_bias: bool
    output_bias: bool
    tied_embeddings: bool

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    @property
    def embedding(self) -> str:
        """The name of the token embedding."""
        return "model.embed_tokens.weight"

    @property
    def head(self) -> str:
        """The name of the output matrix; the embedding's own where they are tied."""
        return self.embedding if self.tied_embeddings else "lm_head.weight"

    @property
    def final_norm(self) -> str:
        """The name of the norm before the head."""
        return "model.norm.weight"

    def linears(self, layer: int) -> dict[str, str]:
        """Short name -> tensor name of a block's seven matrices, in the order of their use."""
        block = f"model.layers.{layer}"
        short = {name: f"{block}.self_attn.{name}_proj.weight" for name in "qkvo"}
        return short | {n: f"{block}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}

    def short_name(self, name: str) -> str | None:
        """What :meth:`linears` calls a matrix of a block, whichever block; None for any other."""
        shorts = {name.split(".", 3)[3]: short for short, name in self.linears(0).items()}
        return shorts.get(name.split(".", 3)[-1])

    def norms(self, layer: int) -> dict[str, str]:
        """Short name (``attention``, ``ffn``, ``q``, ``k``) -> tensor name of a block's norms."""
        block = f"model.layers.{layer}"
        names = {
            "attention": f"{block}.input_layernorm.weight",
            "ffn": f"{block}.post_attention_layernorm.weight",
        }
        if self.qk_norm:
            names |= {n: f"{block}.self_attn.{n}_norm.weight" for n in "qk"}
        return names

    def biases(self, layer: int) -> dict[str, str]:
        """Short name -> tensor name of the biases that a block has."""
        short = ("qkv" if self.attention_bias else "") + ("o" if self.output_bias else "")
        return {n: f"model.layers.{layer}.self_attn.{n}_proj.bias" for n in short}

    def matrices(self) -> list[str]:
        """All matrices, in the order of their use: embedding, linears, head if it is its own."""
        inner = [name for layer in range(self.layers) for name in self.linears(layer).values()]
        return [self.embedding, *inner, *([] if self.tied_embeddings else [self.head])]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint with its shape, in the order of their use."""
        hidden, wide = self.hidden_size, self.heads * self.head_dim
        narrow = self.kv_heads * self.head_dim
        rows = {"q": wide, "k": narrow, "v": narrow, "o": hidden}
        rows |= {"gate": self.ffn_size, "up": self.ffn_size, "down": hidden}
        columns = dict.fromkeys(rows, hidden) | {"o": wide, "down": self.ffn_size}
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (self.vocab_size, hidden)}
        for layer in range(self.layers):
            for short, name in self.norms(layer).items():
                shapes[name] = (self.head_dim if short in "qk" else hidden,)
            shapes |= {n: (rows[s], columns[s]) for s, n in self.linears(layer).items()}
            shapes |= {n: (rows[s],) for s, n in self.biases(layer).items()}
        shapes[self.final_norm] = (hidden,)
        shapes[self.head] = (self.vocab_size, hidden)
        return shapes

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> DecoderFacts:
        """Read the facts of a Hugging Face config, of transformers 4 or 5.

        Raises:
            InputError: the family, or something in it, is not known here, or a key is missing.
        """
        kind = str(config.get("model_type"))
        if kind not in FAMILIES:
            raise InputError(
                f"model_type {kind!r} is not a family that edgedistill knows",
                where=where,
                hint=f"known families: {', '.join(FAMILIES)}",
            )
        try:
            return cls._read(kind, config, where)
        except KeyError as error:
            raise InputError(f"has no {error}", where=where) from error
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"has a value of the wrong kind ({error})", where=where) from error

    @classmethod
    def _read(cls, kind: str, config: dict[str, Any], where: str) -> DecoderFacts:
        family = FAMILIES[kind]
        _refuse_unknown(config, where)
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads)
        head_dim = _size(config, "head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"{heads} heads share {kv_heads} key heads of {head_dim}")
        bias = bool(config.get("attention_bias")) if kind in ("llama", "qwen3") else False
        return cls(
            family=kind,
            layers=_size(config, "num_hidden_layers", most=MOST_LAYERS),
            hidden_size=hidden,
            ffn_size=_size(config, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_size(config, "vocab_size"),
            max_context_tokens=_size(config, "max_position_embeddings"),
            norm_eps=_positive(config, "rms_norm_eps"),
            rope=_read_rope(config, where),
            activation=ACTIVATIONS[config.get("hidden_act", "silu")],
            qk_norm=family.qk_norm,
            attention_bias=family.attention_bias or bias,
            output_bias=family.output_bias or bias,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


def _size(
    config: dict[str, Any], key: str, default: int | None = None, *, most: int = LARGEST_SIZE
) -> int:
    """A number of something: a whole one from 1 to ``most``; None or 0 is the default's turn."""
    value = config[key] if default is None else config.get(key) or default
    if int(value) != value or not 1 <= value <= most:
        raise ValueError(f"{key} is {value!r}, not a whole number from 1 to {most}")
    return int(value)


def _positive(config: dict[str, Any], key: str) -> float:
    value = float(config[key])
    if not 0.0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}, not a number above 0")
    return value


def _refuse_unknown(config: dict[str, Any], where: str) -> None:
    problem = None
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        problem = f"hidden_act {config['hidden_act']!r}"
    elif config.get("sliding_window") and config.get("use_sliding_window", True):
        problem = f"sliding_window {config['sliding_window']}"
    elif config.get("mlp_bias"):
        problem = "mlp_bias"
    elif config.get("quantization_config"):
        problem = "quantization_config (the student is quantized already)"
    if problem:
        raise InputError(f"{problem} is not supported yet", where=where)


def _read_rope(config: dict[str, Any], where: str) -> Rope:
    # transformers 5 writes rope_parameters, transformers 4 rope_theta beside rope_scaling.
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    stated = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    theta = _positive({"rope_theta": stated}, "rope_theta")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3"):
        raise InputError(f"rope_type {kind!r} is not supported yet", where=where)
    keys = ("factor",) if kind == "linear" else LLAMA3_KEYS
    scaling = {key: _positive(parameters, key) for key in keys}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("high_freq_factor is not above low_freq_factor")
    return Rope(theta, parameters | {"rope_type": kind})
