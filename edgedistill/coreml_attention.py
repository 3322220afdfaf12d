"""Attention of a Core ML program: masks, rotations, the cache, and the scores between them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edgedistill.coreml_norms import Norms
from edgedistill.coreml_ops import NamedOps, Var
from edgedistill.coreml_weights import Weights
from edgedistill.decoder import DecoderFacts
from edgedistill.rope import Rope

# Where a sliding layer does not look; finite, so that no device makes NaN of it.
MASKED = np.float16(-4e4)
FULL, SLIDING = "rope", "rope_sliding"


def rope_tables(
    rope: Rope, rotary_dim: int, places: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Cosine and sine of every angle: float16 [places, rotary_dim / 2] each, scaled if RoPE is.

    Taken in float64: a float16 angle would be off by whole turns after a few thousand tokens.
    """
    frequencies = rope.inverse_frequencies(rotary_dim).astype(np.float64)
    angles = np.arange(places, dtype=np.float64)[:, None] * frequencies
    cos, sin = (rope.attention_factor * turned for turned in (np.cos(angles), np.sin(angles)))
    return cos.astype(np.float16), sin.astype(np.float16)


class Places:
    """What depends on the places of the new tokens alone, once for all layers.

    Args:
        ops, weights, facts: of the program.
        ids: int32 [1, n].
        mask: float16 [1, 1, n, end].
        context_tokens: places that tables have.
    """

    def __init__(
        self,
        ops: NamedOps,
        weights: Weights,
        facts: DecoderFacts,
        ids: Var,
        mask: Var,
        context_tokens: int,
    ) -> None:
        self._ops = ops
        self._weights = weights
        self._facts = facts
        self._context_tokens = context_tokens
        self.start, self.end = self._span(ids, mask)
        self._rotations = {n: self._rotation(n, rope) for n, rope in self._ropes().items()}
        self._masks = {w: self._grouped(self._windowed(mask, w)) for w in self._windows()}

    def rotation(self, layer: int) -> tuple[Var, Var] | None:
        """Cosine and sine at the new places, [n, rotary_dim / 2] each; None: no rotation."""
        rope = self._facts.rope_of(layer)
        return None if rope is None else self._rotations[self._rope_name(rope)]

    def mask(self, layer: int) -> Var:
        """Of a layer: [1, 1, heads / kv_heads * n, end]."""
        return self._masks[self._facts.window_of(layer)]

    def _ropes(self) -> dict[str, Rope]:
        ropes = [self._facts.rope_of(layer) for layer in range(self._facts.layers)]
        return {self._rope_name(rope): rope for rope in ropes if rope is not None}

    def _rope_name(self, rope: Rope) -> str:
        return FULL if rope == self._facts.rope else SLIDING

    def _windows(self) -> list[int | None]:
        found = {self._facts.window_of(layer) for layer in range(self._facts.layers)}
        return sorted(found, key=lambda window: window or 0)  # the same order in every export

    def _span(self, ids: Var, mask: Var) -> tuple[Var, Var]:
        """First and last + 1 place of the new tokens: int32 [1] each, from shapes alone."""
        ops = self._ops
        end = ops("slice_by_index", x=ops("shape", x=mask), begin=[3], end=[4])
        n = ops("slice_by_index", x=ops("shape", x=ids), begin=[1], end=[2])
        return ops("sub", x=end, y=n), end

    def _rotation(self, name: str, rope: Rope) -> tuple[Var, Var]:
        ops, zero = self._ops, np.zeros(1, np.int32)
        begin = ops("concat", values=[self.start, zero], axis=0)
        end = ops("concat", values=[self.end, zero], axis=0)
        tables = rope_tables(rope, self._facts.rotary_dim, self._context_tokens)
        cos, sin = (
            ops(
                "slice_by_index",
                x=self._weights.table(f"{name}_{part}", table),
                begin=begin,
                end=end,
                begin_mask=[False, True],
                end_mask=[False, True],
            )
            for part, table in zip(("cos", "sin"), tables, strict=True)
        )
        return cos, sin

    def _windowed(self, mask: Var, window: int | None) -> Var:
        """The mask with all hidden that lies ``window`` or more places before a token.

        Places are slices of a table of 0, 1, 2, … whose bounds are shapes, as the rotations are;
        they are compared as int32, because float16 counts to 2048 only.
        """
        if window is None:
            return mask
        ops, table = self._ops, np.arange(self._context_tokens, dtype=np.int32)
        places = self._weights.table("places", table)
        queries = ops("slice_by_index", x=places, begin=self.start, end=self.end)
        keys = ops("slice_by_index", x=places, begin=[0], end=self.end, begin_mask=[True])
        before = ops(
            "sub",
            x=ops("expand_dims", x=queries, axes=[0, 1, 3]),
            y=ops("expand_dims", x=keys, axes=[0, 1, 2]),
        )
        near = ops("less", x=before, y=np.int32(window))
        return ops("select", cond=near, a=mask, b=MASKED)

    def _grouped(self, mask: Var) -> Var:
        """The mask for queries whose heads of one key head lie below each other."""
        repeats = self._facts.heads // self._facts.kv_heads
        return self._ops("tile", x=mask, reps=[1, 1, repeats, 1]) if repeats > 1 else mask


class Attention:
    """Emits the attention of one layer after the other, each once, in order.

    Args:
        ops, weights, norms, facts: of the program.
        places: of the new tokens.
        states: ``key`` and ``value`` -> the state.
    """

    def __init__(
        self,
        ops: NamedOps,
        weights: Weights,
        norms: Norms,
        facts: DecoderFacts,
        places: Places,
        states: dict[str, Var],
    ) -> None:
        self._ops = ops
        self._weights = weights
        self._norms = norms
        self._facts = facts
        self._places = places
        self._states = states
        self._caches = {name: ops("read_state", input=state) for name, state in states.items()}
        scale = facts.attention_scale or facts.head_dim**-0.5
        # The op of iOS 18 divides by the root of head_dim itself and takes no other scale; what is
        # left is put into the queries.
        own = facts.head_dim**-0.5 if facts.attention_softcap is None else 1.0
        self._query_factor = 1.0 if math.isclose(scale, own) else scale / own

    def emit(self, layer: int, x: Var) -> Var:
        """x [1, n, hidden] -> [1, n, heads * head_dim], its keys and values now in the cache."""
        facts, ops = self._facts, self._ops
        linears, biases, norms = facts.linears(layer), facts.biases(layer), facts.norms(layer)
        q, k, v = (self._weights.linear(ops, x, linears[s], biases.get(s)) for s in "qkv")
        q = self._rotated(layer, self._queries(q, norms.get("q")))
        keys = self._through_cache("key", layer, self._keys(layer, k, norms.get("k")))
        values = self._through_cache("value", layer, self._split_heads(v))
        # [1, heads, n, d] -> [1, kv_heads, heads / kv_heads * n, d]: keys need no repeating
        q = ops("reshape", x=q, shape=[1, facts.kv_heads, -1, facts.head_dim])
        out = self._attended(q, keys, values, self._places.mask(layer))
        out = ops("reshape", x=out, shape=[1, facts.heads, -1, facts.head_dim])
        out = ops("transpose", x=out, perm=[0, 2, 1, 3])
        return ops("reshape", x=out, shape=[1, -1, facts.heads * facts.head_dim])

    def _attended(self, q: Var, keys: Var, values: Var, mask: Var) -> Var:
        """softmax(scores + mask) values; written out where scores are capped.

        ``cap * tanh(score / cap)``: float16 holds a score up to 65504, tanh is 1 long before.
        """
        ops, cap = self._ops, self._facts.attention_softcap
        if cap is None:
            return ops(
                "scaled_dot_product_attention", query=q, key=keys, value=values, attn_mask=mask
            )
        scores = ops("matmul", x=q, y=keys, transpose_y=True)
        scores = ops("tanh", x=ops("real_div", x=scores, y=np.float16(cap)))
        scores = ops("add", x=ops("mul", x=scores, y=np.float16(cap)), y=mask)
        return ops("matmul", x=ops("softmax", x=scores, axis=-1), y=values)

    def _queries(self, q: Var, norm: str | None) -> Var:
        """[1, n, heads * d] -> [1, heads, n, d], normed if the family does, and scaled."""
        q = self._ops("reshape", x=q, shape=[1, -1, self._facts.heads, self._facts.head_dim])
        if norm:
            q = self._norms.of_head(q, norm, self._query_factor)
        elif self._query_factor != 1.0:
            q = self._ops("mul", x=q, y=np.float16(self._query_factor))
        return self._ops("transpose", x=q, perm=[0, 2, 1, 3])

    def _keys(self, layer: int, k: Var, norm: str | None) -> Var:
        """[1, n, kv_heads * d] -> [1, kv_heads, n, d], normed if the family does, and rotated.

        Those that are not rotated go to the cache as values do.
        """
        if self._places.rotation(layer) is None:
            k = self._split_heads(k)
            return self._norms.of_head(k, norm) if norm else k
        k = self._ops("reshape", x=k, shape=[1, -1, self._facts.kv_heads, self._facts.head_dim])
        if norm:
            k = self._norms.of_head(k, norm)
        return self._rotated(layer, self._ops("transpose", x=k, perm=[0, 2, 1, 3]))

    def _rotated(self, layer: int, x: Var) -> Var:
        """[1, heads, n, d], the first dimensions of each head rotated, all in most families."""
        rotation = self._places.rotation(layer)
        if rotation is None:
            return x
        ops, (cos, sin), half = self._ops, rotation, self._facts.rotary_dim // 2
        rest = self._facts.head_dim - 2 * half
        if rest:
            low, high, *fixed = ops("split", x=x, split_sizes=[half, half, rest], axis=-1)
        else:
            low, high, *fixed = ops("split", x=x, num_splits=2, axis=-1)
        turned = [
            ops("sub", x=ops("mul", x=low, y=cos), y=ops("mul", x=high, y=sin)),
            ops("add", x=ops("mul", x=high, y=cos), y=ops("mul", x=low, y=sin)),
        ]
        return ops("concat", values=[*turned, *fixed], axis=-1)

    def _split_heads(self, v: Var) -> Var:
        """[1, n, kv_heads * d] -> [1, kv_heads, n, d] by split and concat.

        A reshape and transpose right before a state is written fails at run time on devices
        (apple/coremltools #2278); rotated keys have ops in between, values have nothing.
        """
        v = self._ops("expand_dims", x=v, axes=[1])
        if self._facts.kv_heads == 1:
            return v
        heads = self._ops("split", x=v, num_splits=self._facts.kv_heads, axis=-1)
        return self._ops("concat", values=heads, axis=1)

    def _through_cache(self, name: str, layer: int, new: Var) -> Var:
        """Write [1, kv_heads, n, d] at the new places; all places so far: [1, kv_heads, end, d]."""
        ops, zero = self._ops, np.zeros(1, np.int32)
        begin = [np.array([layer, 0, 0], np.int32), self._places.start, zero]
        end = [np.array([layer + 1, 0, 0], np.int32), self._places.end, zero]
        stop = ops("concat", values=end, axis=0)
        only_layer = [True, False, False, False, False]
        cache = ops(
            "slice_update",
            x=self._caches[name],
            update=new,
            begin=ops("concat", values=begin, axis=0),
            end=stop,
            begin_mask=[False, True, True, False, True],
            end_mask=[False, True, True, False, True],
            squeeze_mask=only_layer,
        )
        self._caches[name] = ops("coreml_update_state", state=self._states[name], value=cache)
        return ops(
            "slice_by_index",
            x=self._caches[name],
            begin=[layer, 0, 0, 0, 0],
            end=stop,
            begin_mask=[False, True, True, True, True],
            end_mask=[False, True, True, False, True],
            squeeze_mask=only_layer,
        )
