"""A small decoder that runs from the facts, a block at a time, in float32 torch.

It holds one block's weights at once, so a model of any size streams through it: the base of
calibration and of healing.  It is itself held against ``transformers`` and judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.decoder import DecoderFacts
from edgedistill.student import Student

Watch = Callable[[str, Tensor], None]

CPU = torch.device("cpu")


class Half(NamedTuple):
    """Half a block: ``hidden += r * out(exit(inner(entry(norm(hidden)))))``, by names of facts.

    ``out`` is a norm that some families have; in the others it is nothing.  ``r`` is the residual
    multiplier, 1 in most.
    """

    norm: str
    entry: tuple[str, ...]
    exit: str
    out: str


ATTENTION = Half("attention", ("q", "k", "v"), "o", "attention_out")
FFN = Half("ffn", ("gate", "up"), "down", "ffn_out")
HALVES = (ATTENTION, FFN)


@dataclass(frozen=True)
class BlockWeights:
    """A block's tensors by the short names of facts; a copy may hold others in their place.

    ``layer`` is which block it is: layers may attend in different ways.
    """

    layer: int
    linears: dict[str, Tensor]
    norms: dict[str, Tensor]
    biases: dict[str, Tensor]


class Past:
    """Keys and values of the tokens that went through a block, for those that come behind.

    Attributes:
        tokens: how many went through.

    Args:
        facts: of the decoder.
        sequences: that go through side by side.
        most_tokens: of each.
        device: that the block is on.
    """

    def __init__(
        self,
        facts: DecoderFacts,
        sequences: int,
        most_tokens: int,
        device: torch.device = CPU,
    ) -> None:
        shape = (sequences, facts.kv_heads, most_tokens, facts.head_dim)
        self._keys, self._values = (torch.empty(shape, device=device) for _ in "kv")
        self.tokens = 0

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[sequences, kv heads, tokens, head_dim] each -> those of all tokens so far."""
        before, self.tokens = self.tokens, self.tokens + keys.shape[2]
        self._keys[:, :, before : self.tokens] = keys
        self._values[:, :, before : self.tokens] = values
        return self._keys[:, :, : self.tokens], self._values[:, :, : self.tokens]


class DecoderForward:
    """Runs a student's blocks on hidden states [batch, tokens, hidden], from position 0.

    Args:
        student: whose weights are read when they are needed.
        device: that they are brought to, and that all that is given has to be on.
    """

    def __init__(self, student: Student, device: torch.device = CPU) -> None:
        self.student = student
        self.facts = student.facts
        self.device = device
        self._rotations = [self._rotation(layer) for layer in range(self.facts.layers)]

    def logits(self, ids: Tensor) -> Tensor:
        """int64 [batch, tokens] -> float32 [batch, tokens, vocab]."""
        hidden = self.embed(ids)
        for layer in range(self.facts.layers):
            hidden = self.block(layer, hidden)
        return self.head(hidden)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [batch, tokens] -> [batch, tokens, hidden]."""
        return self.scale_embedded(functional.embedding(ids, self._tensor(self.facts.embedding)))

    def scale_embedded(self, rows: Tensor) -> Tensor:
        """Rows of an embedding, as the first block reads them: [..., hidden]."""
        scale = self.facts.embedding_scale
        return rows if scale == 1.0 else rows * scale

    def read_block(self, layer: int) -> BlockWeights:
        """The weights of a block, float32."""
        return BlockWeights(
            layer,
            {s: self._tensor(n) for s, n in self.facts.linears(layer).items()},
            {s: self._tensor(n) for s, n in self.facts.norms(layer).items()},
            {s: self._tensor(n) for s, n in self.facts.biases(layer).items()},
        )

    def block(self, layer: int, hidden: Tensor, watch: Watch | None = None) -> Tensor:
        """One block: attention, then the feed-forward network, each on a normalized stream.

        Args:
            layer: which.
            hidden: [batch, tokens, hidden].
            watch: shown what enters the matrices, by the short name of the first that reads it:
                ``q`` (for q, k, v), ``o``, ``gate`` (for gate, up) and ``down``.
        """
        return self.through(self.read_block(layer), hidden, watch)

    def through(
        self,
        weights: BlockWeights,
        hidden: Tensor,
        watch: Watch | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """As :meth:`block`, with weights at hand.

        Args:
            weights: of the block.
            hidden: [batch, tokens, hidden], behind what ``past`` has.
            watch: as there.
            past: what went through before, to which these tokens are added; None where they start
                at position 0 and nothing follows.
        """
        for half in HALVES:
            x = self.enter(half, weights, hidden)
            inner = self.inner(half, weights, x, past)
            if watch:
                watch(half.entry[0], x)
                watch(half.exit, inner)
            hidden = hidden + self.leave(half, weights, inner)
        return hidden

    def enter(self, half: Half, weights: BlockWeights, hidden: Tensor) -> Tensor:
        """What the half's first matrices read: the normalized stream."""
        return self._norm(hidden, weights.norms[half.norm])

    def inner(
        self, half: Half, weights: BlockWeights, x: Tensor, past: Past | None = None
    ) -> Tensor:
        """What the half's last matrix reads: [..., hidden] -> [..., heads * head_dim] or ffn."""
        if half == ATTENTION:
            return self._attention(weights, x, past)
        gate = self._linear(weights, "gate", x)
        if self.facts.activation == "silu":
            gated = functional.silu(gate)
        else:
            gated = functional.gelu(gate, approximate="tanh")
        return gated * self._linear(weights, "up", x)

    def leave(self, half: Half, weights: BlockWeights, inner: Tensor) -> Tensor:
        """What the half adds to the stream."""
        out = self._linear(weights, half.exit, inner)
        if half.out in weights.norms:
            out = self._norm(out, weights.norms[half.out])
        multiplier = self.facts.residual_multiplier
        return out if multiplier == 1.0 else out * multiplier

    def head(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> logits [..., vocab]."""
        norm, matrix = self._tensor(self.facts.final_norm), self._tensor(self.facts.head)
        return head_logits(hidden, norm, matrix, self.facts)

    def _attention(self, weights: BlockWeights, x: Tensor, past: Past | None) -> Tensor:
        """Causal grouped-query attention: [batch, tokens, hidden] -> [..., heads * head_dim]."""
        batch, tokens, _ = x.shape
        q, k, v = (
            self._linear(weights, s, x)
            .view(batch, tokens, -1, self.facts.head_dim)
            .transpose(1, 2)  # [batch, heads, tokens, head_dim]
            for s in "qkv"
        )
        if self.facts.qk_norm:
            q, k = self._norm(q, weights.norms["q"]), self._norm(k, weights.norms["k"])
        before = 0 if past is None else past.tokens
        rotation = self._rotations[weights.layer]
        if rotation is not None:
            q, k = _rotate(q, before, rotation), _rotate(k, before, rotation)
        if past is not None:
            k, v = past.add(k, v)
        mask = _mask(tokens, before, self.facts.window_of(weights.layer), x.device)
        attended = attend(q, k, v, mask, self.facts)
        return attended.transpose(1, 2).reshape(batch, tokens, -1)

    def _rotation(self, layer: int) -> _Rotation | None:
        """By which the heads of a layer are rotated; None where they are not."""
        rope = self.facts.rope_of(layer)
        if rope is None:
            return None
        inverse = torch.from_numpy(rope.inverse_frequencies(self.facts.rotary_dim))
        return _Rotation(inverse.to(self.device), rope.attention_factor)

    def _linear(self, weights: BlockWeights, short: str, x: Tensor) -> Tensor:
        """What a matrix of the block makes of its inputs: [..., columns] -> [..., rows]."""
        return functional.linear(x, weights.linears[short], weights.biases.get(short))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.facts)

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.student.read(name)).to(self.device)


class HeldForward(DecoderForward):
    """The same with all weights in memory, for a device to which reading them is dear."""

    def __init__(self, student: Student, device: torch.device = CPU) -> None:
        super().__init__(student, device)
        self._held: dict[str, Tensor] = {}

    def _tensor(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = super()._tensor(name)
        return self._held[name]


def rms_norm(x: Tensor, weight: Tensor, facts: DecoderFacts) -> Tensor:
    """A norm of the decoder on [..., size], with its weight [size] as the checkpoint has it."""
    if facts.norm_offset:
        weight = weight + facts.norm_offset
    return functional.rms_norm(x, weight.shape, weight, facts.norm_eps)


def head_logits(hidden: Tensor, norm: Tensor, matrix: Tensor, facts: DecoderFacts) -> Tensor:
    """What the head makes of hidden states: [..., hidden] -> logits [..., vocab].

    Args:
        hidden: what leaves the last block.
        norm: the weight of the last norm [hidden], as the checkpoint has it.
        matrix: [vocab, hidden].
        facts: of the decoder.
    """
    logits = functional.linear(rms_norm(hidden, norm, facts), matrix)
    if facts.logits_divisor != 1.0:
        logits = logits / facts.logits_divisor
    return logits if facts.logits_softcap is None else _capped(logits, facts.logits_softcap)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, facts: DecoderFacts
) -> Tensor:
    """Grouped-query attention: [batch, heads, tokens, head_dim], whose heads share key heads.

    Args:
        queries: rotated already, as keys are.
        keys: [batch, kv heads, all tokens, head_dim].
        values: likewise.
        mask: bool [tokens, all tokens], true where a token sees another; None: causal.
        facts: of the decoder.
    """
    scale = facts.attention_scale
    if facts.attention_softcap is None:
        return functional.scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    if mask is None:
        mask = torch.ones(2 * queries.shape[2:3], dtype=torch.bool, device=keys.device).tril()
    shared = facts.heads // facts.kv_heads
    keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
    scores = queries @ keys.transpose(2, 3) * (scale or facts.head_dim**-0.5)
    scores = _capped(scores, facts.attention_softcap).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ values


def _capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


class _Rotation(NamedTuple):
    """Frequencies [rotary_dim / 2], and what cosines and sines are multiplied by."""

    frequencies: Tensor
    factor: float


def _rotate(x: Tensor, before: int, rotation: _Rotation) -> Tensor:
    """Rotary embedding of halves on [batch, heads, tokens, head_dim], from a position on.

    Dimensions behind the rotated ones stay as they are.
    """
    tokens, inverse = x.shape[2], rotation.frequencies
    positions = torch.arange(before, before + tokens, dtype=torch.float32, device=x.device)
    angles = torch.outer(positions, inverse)
    # [tokens, rotary_dim]
    cos, sin = (part.repeat(1, 2) * rotation.factor for part in (angles.cos(), angles.sin()))
    x, rest = x[..., : 2 * len(inverse)], x[..., 2 * len(inverse) :]
    low, high = x.chunk(2, dim=-1)
    rotated = x * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def _mask(tokens: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [tokens, before + tokens]: each token sees itself and those before it, in its window.

    None where torch's own causal mask, which counts from position 0, says the same.
    """
    longer = window is not None and before + tokens > window
    if not before and not longer:
        return None
    mask = torch.ones(tokens, before + tokens, dtype=torch.bool, device=device).tril(before)
    return mask.triu(before - window + 1) if window is not None and longer else mask
