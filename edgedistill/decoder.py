"""The facts of a decoder, as data: all that tells one from another.

Exporters and stages read facts and never look at ``model_type``.  A model that needs a fact that is
not here is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from edgedistill.families import Activation
from edgedistill.rope import Rope


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
        from edgedistill.decoder_config import read_config  # which makes facts

        return read_config(config, where)
