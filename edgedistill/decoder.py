"""The family facts of a decoder, as data read from ``config.json``.

Everything that tells one decoder family from another stands here; exporters and stages read facts
and never look at ``model_type``.  A model that needs a fact that is not here is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgedistill.errors import InputError
from edgedistill.layer_kinds import (
    LayerRule,
    above_max_window_layers,
    all_but_every_second,
    all_layers,
    by_no_rope,
    by_sliding_window_pattern,
    unrotated_ones,
)
from edgedistill.rope import Rope, positive, read_layered_ropes, read_rope
from edgedistill.unknown_family import missing_facts

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class _Family:
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


_GEMMA = _Family(
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
FAMILIES: dict[str, _Family] = {
    "llama": _Family(optional_bias=True),
    "mistral": _Family(windows=all_layers, defaults={"sliding_window": 4096}),
    "qwen2": _Family(
        attention_bias=True,
        windows=above_max_window_layers,
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": _Family(
        optional_bias=True,
        qk_norm=True,
        windows=above_max_window_layers,
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "smollm3": _Family(
        optional_bias=True,
        windows=unrotated_ones,
        unrotated=by_no_rope,
        defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    ),
    "granite": _Family(
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
    "phi3": _Family(
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
# Beyond any model; a damaged config must not make us list tensors without end.
MOST_LAYERS, LARGEST_SIZE = 4096, 1 << 31


@dataclass(frozen=True)
class DecoderFacts:
    """All that an exporter needs to know to write the graph of a decoder.

    The block is: ``x += o(attention(norm(x)))``, ``x += down(act(gate(norm(x))) * up(norm(x)))``.

    Attributes:
        rope: of the layers that attend to all tokens.
        norm_offset: added to every norm's weight before it multiplies (Gemma's ``1 + w``).
        post_norms: whether what a half block adds to the stream goes through a norm of its own.
        scaled_embedding: whether embeddings are multiplied by the root of the hidden size.
        attention_scale: of the products of queries and keys; None: ``head_dim ** -0.5``.
        sliding_layers: of each layer whether it attends to a window; empty: none does.
        window_tokens: that such a layer attends to, the token itself among them.
        sliding_rope: of such layers; None: they have that of the others.
        unrotated_layers: of each layer whether its queries and keys are not rotated; empty: all
            are.
        rotated_dims: of a head, the first ones, that are rotated; None: all.
        attention_softcap: scores become ``cap * tanh(score / cap)`` before the softmax; None: not.
        logits_softcap: logits likewise.
        embedding_multiplier, residual_multiplier: of embeddings, and of what a half block adds to
            the stream.
        logits_divisor: what logits are divided by.
        fused_modules: of a block, those that a checkpoint stores one on top of the other: the
            module's name there -> what is in its rows, in their order, by short names.
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
    activation: Activation
    qk_norm: bool
    attention_bias: bool
    output_bias: bool
    tied_embeddings: bool
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embedding: bool = False
    attention_scale: float | None = None
    sliding_layers: tuple[bool, ...] = ()
    window_tokens: int | None = None
    sliding_rope: Rope | None = None
    unrotated_layers: tuple[bool, ...] = ()
    rotated_dims: int | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    fused_modules: dict[str, tuple[str, ...]] = field(default_factory=dict)

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

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        if self.scaled_embedding:
            return math.sqrt(self.hidden_size)
        return self.embedding_multiplier

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return self.rotated_dims or self.head_dim

    @property
    def steady_tokens(self) -> int:
        """The longest text whose beginning is computed as by itself; LongRoPE turns it anew."""
        return min(self.max_context_tokens, self.rope.short_text_tokens or self.max_context_tokens)

    def slides(self, layer: int) -> bool:
        """Whether a layer attends to a window."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer attends to; None for all."""
        return self.window_tokens if self.slides(layer) else None

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer; None where it has none."""
        if self.unrotated_layers and self.unrotated_layers[layer]:
            return None
        return self.sliding_rope if self.sliding_rope and self.slides(layer) else self.rope

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
        """Short name -> tensor name of a block's norms.

        ``attention`` and ``ffn`` are before a half, ``attention_out`` and ``ffn_out`` behind it,
        where the family has those; ``q`` and ``k`` are inside.
        """
        block = f"model.layers.{layer}"
        names = {"attention": f"{block}.input_layernorm.weight"}
        if self.post_norms:
            names |= {
                "attention_out": f"{block}.post_attention_layernorm.weight",
                "ffn": f"{block}.pre_feedforward_layernorm.weight",
                "ffn_out": f"{block}.post_feedforward_layernorm.weight",
            }
        else:
            names["ffn"] = f"{block}.post_attention_layernorm.weight"
        if self.qk_norm:
            names |= {n: f"{block}.self_attn.{n}_norm.weight" for n in "qk"}
        return names

    def all_norms(self) -> list[str]:
        """The norms of all blocks, and the last."""
        inner = [name for layer in range(self.layers) for name in self.norms(layer).values()]
        return [*inner, self.final_norm]

    def biases(self, layer: int) -> dict[str, str]:
        """Short name -> tensor name of the biases that a block has."""
        short = ("qkv" if self.attention_bias else "") + ("o" if self.output_bias else "")
        return {n: f"model.layers.{layer}.self_attn.{n}_proj.bias" for n in short}

    def fused_tensors(self) -> dict[str, dict[str, int]]:
        """Each tensor that a checkpoint stores fused -> its parts' names and rows, in their order.

        Everywhere else the parts are tensors of their own, as in the other families.
        """
        shapes, found = self.tensor_shapes(), dict[str, dict[str, int]]()
        for layer in range(self.layers):
            for module, shorts in self.fused_modules.items():
                for kind, names in ("weight", self.linears(layer)), ("bias", self.biases(layer)):
                    if set(shorts) <= set(names):
                        parts = {names[short]: shapes[names[short]][0] for short in shorts}
                        found[f"model.layers.{layer}.{module}.{kind}"] = parts
        return found

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
                shapes[name] = (self.head_dim if short in ("q", "k") else hidden,)
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
            missing = missing_facts(config)
            lacks = f": it has {', '.join(missing)}" if missing else ""
            raise InputError(
                f"model_type {kind!r} is not a family that edgedistill knows{lacks}",
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
        config = family.defaults | config
        activation = _activation(family, config, where)
        _refuse_unknown(family, config, where)
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads)
        head_dim = _size(config, "head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"{heads} heads share {kv_heads} key heads of {head_dim}")
        bias = family.optional_bias and bool(config.get("attention_bias"))
        layers = _size(config, "num_hidden_layers", most=MOST_LAYERS)
        facts = cls(
            family=kind,
            layers=layers,
            hidden_size=hidden,
            ffn_size=_size(config, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_size(config, "vocab_size"),
            max_context_tokens=_size(config, "max_position_embeddings"),
            norm_eps=positive(config, "rms_norm_eps"),
            activation=activation,
            qk_norm=family.qk_norm,
            attention_bias=family.attention_bias or bias,
            output_bias=family.output_bias or bias,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_offset=family.norm_offset,
            post_norms=family.post_norms,
            scaled_embedding=family.scaled_embedding,
            fused_modules=family.fused,
            **_attention(family, config, layers, where),
            **_rotated(family, config, head_dim),
            **_numbers(family, config),
        )
        _check_scaling(family, facts, where)
        return facts


def _attention(family: _Family, config: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    """How the layers attend: to all or to a window, rotated by which base, or not at all."""
    found: dict[str, Any] = {}
    if family.two_ropes:
        found["rope"], sliding = read_layered_ropes(config, where)
    else:
        found["rope"], sliding = read_rope(config, where), None
    slides = family.windows(config, layers) if family.windows else []
    if any(slides):
        window = _size({"sliding_window": config.get("sliding_window") or 0}, "sliding_window")
        # One of all layers that the context does not outgrow is none.
        outgrown = window < _size(config, "max_position_embeddings")
        if outgrown or sliding is not None or not all(slides):
            found |= {"sliding_layers": tuple(slides), "sliding_rope": sliding}
            found["window_tokens"] = window
    bare = family.unrotated(config, layers) if family.unrotated else []
    if any(bare):
        found["unrotated_layers"] = tuple(bare)
    return found


def _numbers(family: _Family, config: dict[str, Any]) -> dict[str, Any]:
    """Scales and soft caps."""
    stated = {n: key for n, key in family.numbers.items() if config.get(key) is not None}
    found = {name: positive(config, key) for name, key in stated.items()}
    if family.scalar_key:
        found["attention_scale"] = positive(config, family.scalar_key) ** -0.5
    return found


def _rotated(family: _Family, config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """How many dimensions of a head are rotated, where those are not all."""
    if not family.partly_rotated:
        return {}
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = positive({"partial_rotary_factor": 1.0} | config | stated, "partial_rotary_factor")
    rotated = int(head_dim * share)
    if not 2 <= rotated <= head_dim or rotated % 2:
        raise ValueError(f"partial_rotary_factor {share} rotates {rotated} of {head_dim}")
    return {} if rotated == head_dim else {"rotated_dims": rotated}


def _check_scaling(family: _Family, facts: DecoderFacts, where: str) -> None:
    """The scaling is one of the family's, with a factor for every frequency."""
    scaling = facts.rope.scaling
    if scaling is None:
        return
    if family.rope_types and scaling["rope_type"] not in family.rope_types:
        raise InputError(
            f"rope_type {scaling['rope_type']!r} of {facts.family} is not supported", where=where
        )
    for key in ("short_factor", "long_factor"):
        if len(scaling.get(key, ())) not in (0, facts.rotary_dim // 2):
            count = len(scaling[key])
            raise ValueError(f"{key} has {count} numbers for {facts.rotary_dim} rotated dimensions")


def _activation(family: _Family, config: dict[str, Any], where: str) -> Activation:
    name = config.get(family.activation_key) or family.activation
    # A family computes what it was trained with, whatever else we could.
    if ACTIVATIONS.get(name) != ACTIVATIONS[family.activation]:
        raise InputError(f"{family.activation_key} {name!r} is not supported yet", where=where)
    return ACTIVATIONS[name]


def _size(
    config: dict[str, Any], key: str, default: int | None = None, *, most: int = LARGEST_SIZE
) -> int:
    """A number of something: a whole one from 1 to ``most``; None or 0 is the default's turn."""
    value = config[key] if default is None else config.get(key) or default
    if int(value) != value or not 1 <= value <= most:
        raise ValueError(f"{key} is {value!r}, not a whole number from 1 to {most}")
    return int(value)


def _refuse_unknown(family: _Family, config: dict[str, Any], where: str) -> None:
    window = config.get("sliding_window")
    problem = None
    if window and config.get("use_sliding_window", True) and not family.windows:
        problem = f"sliding_window {window}"
    elif family.norm_offset and config.get("attention_bias"):
        problem = "attention_bias"
    elif config.get("mlp_bias"):
        problem = "mlp_bias"
    elif config.get("use_bidirectional_attention"):
        problem = "use_bidirectional_attention"
    elif config.get("quantization_config"):
        problem = "quantization_config (the student is quantized already)"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) and key not in family.numbers.values():
            problem = f"{key} {config[key]}"
    if problem:
        raise InputError(f"{problem} is not supported yet", where=where)
