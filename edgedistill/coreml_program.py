"""The graph of a decoder as a Core ML program (iOS 18), built op by op from its facts.

Calling convention, the one of Apple's stateful language models
(https://machinelearning.apple.com/research/core-ml-on-device-llama):

- ``input_ids`` int32 [1, n]: the new tokens, any n from 1 to ``context_tokens``.
- ``causal_mask`` float16 [1, 1, n, end]: 0 where a token may look, a large negative number
  elsewhere.  Its last dimension also says where the cache ends after the call: the tokens take
  the places end - n .. end - 1.  A smaller ``end`` than before takes tokens back.
- ``logit_positions`` int32 [m]: which of the n tokens get logits, from 0; ``[n - 1]`` for the
  last alone, so a prompt pays for one row of the head.
- states ``key_cache`` and ``value_cache`` float16 [layers, 1, kv_heads, places, head_dim].
- ``logits`` float16 [1, m, vocab].

All shapes follow from the shapes of the inputs, never from values in them: slices of a state whose
bounds are data have crashed on devices, those whose bounds are shapes run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.coreml_weights import Weights
from edgedistill.decoder import DecoderFacts
from edgedistill.progress import track
from edgedistill.quiet_coremltools import import_coremltools
from edgedistill.student import Student

Var = Any  # a value of the graph: coremltools' Var, which has no types
PLACES_MULTIPLE = 32  # the Neural Engine refuses other state sizes (apple/coremltools #2631)


def build_program(student: Student, context_tokens: int) -> tuple[Any, list[Any]]:
    """The program of a student and the description of its inputs, as ``coremltools.convert`` wants.

    Args:
        student: float or quantized; its weights are read one by one, and held as they are stored.
        context_tokens: most tokens that the cache holds.

    Returns:
        (``mil.Program``, ``[coremltools.TensorType, ...]``).

    Raises:
        InputError: a weight does not fit into float16.
    """
    ct = import_coremltools()
    mil = import_coremltools("coremltools.converters.mil.mil")
    mb, types, facts = mil.Builder, mil.types, student.facts
    n, end, m = (mil.get_new_symbol() for _ in range(3))
    places = -(-context_tokens // PLACES_MULTIPLE) * PLACES_MULTIPLE
    cache_shape = (facts.layers, 1, facts.kv_heads, places, facts.head_dim)
    specs = [
        mb.TensorSpec((1, n), dtype=types.int32),
        mb.TensorSpec((1, 1, n, end), dtype=types.fp16),
        mb.TensorSpec((m,), dtype=types.int32),
        mb.StateTensorSpec(cache_shape, dtype=types.fp16),
        mb.StateTensorSpec(cache_shape, dtype=types.fp16),
    ]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(
        input_ids: Var, causal_mask: Var, logit_positions: Var, key_cache: Var, value_cache: Var
    ) -> Var:
        graph = _DecoderGraph(mb, student, facts, {"key": key_cache, "value": value_cache})
        return graph.build(input_ids, causal_mask, logit_positions, context_tokens)

    some = ct.RangeDim(1, context_tokens, default=1)
    inputs = [
        ct.TensorType(name="input_ids", shape=(1, some), dtype=np.int32),
        ct.TensorType(name="causal_mask", shape=(1, 1, some, some), dtype=np.float16),
        ct.TensorType(name="logit_positions", shape=(some,), dtype=np.int32),
    ]
    return program, inputs


def rope_tables(
    facts: DecoderFacts, places: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Cosine and sine of every angle: float16 [places, head_dim / 2] each.

    Taken in float64: a float16 angle would be off by whole turns after a few thousand tokens.
    """
    frequencies = facts.rope.inverse_frequencies(facts.head_dim).astype(np.float64)
    angles = np.arange(places, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)


class _DecoderGraph:
    """Emits the ops of one decoder; every op has a name that depends on the decoder alone."""

    def __init__(
        self, mb: Any, student: Student, facts: DecoderFacts, states: dict[str, Var]
    ) -> None:
        self._mb = mb
        self._facts = facts
        self._states = states
        self._weights = Weights(mb, student)
        self._scope = "embed"
        self._counts: dict[str, int] = {}

    def build(self, ids: Var, mask: Var, logit_positions: Var, context_tokens: int) -> Var:
        """All ops from token ids to logits [1, m, vocab]."""
        facts = self._facts
        x = self._op("gather", x=self._weights.matrix(facts.embedding), indices=ids, axis=0)
        self._start, self._end = self._span(ids, mask)
        self._cos, self._sin = self._rotations(context_tokens)
        self._caches = {n: self._op("read_state", input=s) for n, s in self._states.items()}
        self._mask = self._grouped_mask(mask)
        for layer in track(range(facts.layers), label="writing Core ML"):
            self._scope = f"layer_{layer}"
            norms = facts.norms(layer)
            x = self._op("add", x=x, y=self._attention(layer, self._norm(x, norms["attention"])))
            x = self._op("add", x=x, y=self._ffn(layer, self._norm(x, norms["ffn"])))
        self._scope = "head"
        x = self._op("gather", x=x, indices=logit_positions, axis=1)
        x = self._norm(x, facts.final_norm)
        weight = self._weights.matrix(facts.head)
        return self._mb.linear(
            x=x, weight=weight, bias=self._weights.zeros(facts.vocab_size), name="logits"
        )

    def _op(self, kind: str, **inputs: Any) -> Any:
        stem = f"{self._scope}_{kind}"
        self._counts[stem] = count = self._counts.get(stem, 0) + 1
        return getattr(self._mb, kind)(name=f"{stem}_{count}", **inputs)

    def _span(self, ids: Var, mask: Var) -> tuple[Var, Var]:
        """First and last + 1 place of the new tokens: int32 [1] each, from shapes alone."""
        end = self._op("slice_by_index", x=self._op("shape", x=mask), begin=[3], end=[4])
        n = self._op("slice_by_index", x=self._op("shape", x=ids), begin=[1], end=[2])
        return self._op("sub", x=end, y=n), end

    def _rotations(self, context_tokens: int) -> tuple[Var, Var]:
        """Cosine and sine at the new places: [n, head_dim / 2] each."""
        begin = self._op("concat", values=[self._start, np.zeros(1, np.int32)], axis=0)
        end = self._op("concat", values=[self._end, np.zeros(1, np.int32)], axis=0)
        cos, sin = (
            self._op(
                "slice_by_index",
                x=self._weights.table(f"rope_{name}", table),
                begin=begin,
                end=end,
                begin_mask=[False, True],
                end_mask=[False, True],
            )
            for name, table in zip(
                ("cos", "sin"), rope_tables(self._facts, context_tokens), strict=True
            )
        )
        return cos, sin

    def _grouped_mask(self, mask: Var) -> Var:
        """The mask for queries whose heads of one key head lie below each other."""
        repeats = self._facts.heads // self._facts.kv_heads
        return self._op("tile", x=mask, reps=[1, 1, repeats, 1]) if repeats > 1 else mask

    def _norm(self, x: Var, name: str) -> Var:
        """RMSNorm over the last axis, safe in float16: ``x / sqrt(mean(x^2) + eps) * weight``.

        The squares are taken of x / p with p = max(max|x|, sqrt(eps)), so that none leaves [0, 1];
        eps becomes (sqrt(eps) / p)^2, in [0, 1] too, and the root is divided by p at last.
        x itself is never scaled: small values beside a large one keep their precision.
        """
        root_eps = np.float16(math.sqrt(self._facts.norm_eps))
        largest = self._op("reduce_max", x=self._op("abs", x=x), axes=[-1], keep_dims=True)
        peak = self._op("maximum", x=largest, y=root_eps)
        small = self._op("real_div", x=x, y=peak)
        squares = self._op("mul", x=small, y=small)
        mean = self._op("reduce_mean", x=squares, axes=[-1], keep_dims=True)
        ratio = self._op("real_div", x=root_eps, y=peak)
        total = self._op("add", x=mean, y=self._op("mul", x=ratio, y=ratio))
        inverse = self._op("real_div", x=self._op("rsqrt", x=total), y=peak)
        normed = self._op("mul", x=x, y=inverse)
        return self._op("mul", x=normed, y=self._weights.vector(name))

    def _linear(self, x: Var, name: str, bias: str | None, rows: int) -> Var:
        stored = self._weights.vector(bias) if bias else self._weights.zeros(rows)
        return self._op("linear", x=x, weight=self._weights.matrix(name), bias=stored)

    def _attention(self, layer: int, x: Var) -> Var:
        """x [1, n, hidden] -> [1, n, hidden], its keys and values written to the cache."""
        facts = self._facts
        linears, biases, norms = facts.linears(layer), facts.biases(layer), facts.norms(layer)
        wide, narrow = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
        q = self._linear(x, linears["q"], biases.get("q"), wide)
        k = self._linear(x, linears["k"], biases.get("k"), narrow)
        v = self._linear(x, linears["v"], biases.get("v"), narrow)
        q = self._rotated(q, facts.heads, norms.get("q"))
        keys = self._through_cache("key", layer, self._rotated(k, facts.kv_heads, norms.get("k")))
        values = self._through_cache("value", layer, self._split_heads(v))
        # [1, heads, n, d] -> [1, kv_heads, heads / kv_heads * n, d]: keys need no repeating
        q = self._op("reshape", x=q, shape=[1, facts.kv_heads, -1, facts.head_dim])
        out = self._op(
            "scaled_dot_product_attention", query=q, key=keys, value=values, attn_mask=self._mask
        )
        out = self._op("reshape", x=out, shape=[1, facts.heads, -1, facts.head_dim])
        out = self._op("transpose", x=out, perm=[0, 2, 1, 3])
        out = self._op("reshape", x=out, shape=[1, -1, wide])
        return self._linear(out, linears["o"], biases.get("o"), facts.hidden_size)

    def _rotated(self, x: Var, heads: int, norm: str | None) -> Var:
        """[1, n, heads * d] -> [1, heads, n, d], normed if the family does, then rotated."""
        x = self._op("reshape", x=x, shape=[1, -1, heads, self._facts.head_dim])
        if norm:
            x = self._norm(x, norm)
        x = self._op("transpose", x=x, perm=[0, 2, 1, 3])
        low, high = self._op("split", x=x, num_splits=2, axis=-1)
        cos, sin = self._cos, self._sin
        turned = [
            self._op("sub", x=self._op("mul", x=low, y=cos), y=self._op("mul", x=high, y=sin)),
            self._op("add", x=self._op("mul", x=high, y=cos), y=self._op("mul", x=low, y=sin)),
        ]
        return self._op("concat", values=turned, axis=-1)

    def _split_heads(self, v: Var) -> Var:
        """[1, n, kv_heads * d] -> [1, kv_heads, n, d] by split and concat.

        A reshape and transpose right before a state is written fails at run time on devices
        (apple/coremltools #2278); keys have their rotation in between, values have nothing.
        """
        v = self._op("expand_dims", x=v, axes=[1])
        if self._facts.kv_heads == 1:
            return v
        heads = self._op("split", x=v, num_splits=self._facts.kv_heads, axis=-1)
        return self._op("concat", values=heads, axis=1)

    def _through_cache(self, name: str, layer: int, new: Var) -> Var:
        """Write [1, kv_heads, n, d] at the new places; all places so far: [1, kv_heads, end, d]."""
        begin = [np.array([layer, 0, 0], np.int32), self._start, np.zeros(1, np.int32)]
        end = [np.array([layer + 1, 0, 0], np.int32), self._end, np.zeros(1, np.int32)]
        stop = self._op("concat", values=end, axis=0)
        only_layer = [True, False, False, False, False]
        cache = self._op(
            "slice_update",
            x=self._caches[name],
            update=new,
            begin=self._op("concat", values=begin, axis=0),
            end=stop,
            begin_mask=[False, True, True, False, True],
            end_mask=[False, True, True, False, True],
            squeeze_mask=only_layer,
        )
        self._caches[name] = self._op("coreml_update_state", state=self._states[name], value=cache)
        return self._op(
            "slice_by_index",
            x=self._caches[name],
            begin=[layer, 0, 0, 0, 0],
            end=stop,
            begin_mask=[False, True, True, True, True],
            end_mask=[False, True, True, False, True],
            squeeze_mask=only_layer,
        )

    def _ffn(self, layer: int, x: Var) -> Var:
        """x [1, n, hidden] -> ``down(silu(gate(x)) * up(x))``."""
        facts, linears = self._facts, self._facts.linears(layer)
        gate = self._op("silu", x=self._linear(x, linears["gate"], None, facts.ffn_size))
        up = self._linear(x, linears["up"], None, facts.ffn_size)
        wide = self._op("mul", x=gate, y=up)
        return self._linear(wide, linears["down"], None, facts.hidden_size)
