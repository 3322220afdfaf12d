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

Some layers of some families attend to a window of tokens.  The caller does not see that: the one
mask says what is causal, and the program hides what lies before a window by comparing places,
which it slices out of a table by the same shapes (:mod:`edgedistill.coreml_attention`).

All shapes follow from the shapes of the inputs, never from values in them: slices of a state whose
bounds are data have crashed on devices, those whose bounds are shapes run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.coreml_attention import Attention, Places
from edgedistill.coreml_norms import Norms
from edgedistill.coreml_ops import NamedOps, Var
from edgedistill.coreml_weights import Parts, Weights
from edgedistill.decoder import DecoderFacts
from edgedistill.quiet_coremltools import import_coremltools
from edgedistill.student import Student

PLACES_MULTIPLE = 32  # the Neural Engine refuses other state sizes (apple/coremltools #2631)


@dataclass(frozen=True)
class Built:
    """A program without its weights.

    Attributes:
        program: ``mil.Program``; its large constants are placeholders of the right shapes.
        inputs: ``[coremltools.TensorType, ...]``.
        blobs: constant -> the bytes that belong there, read when they are asked for.
    """

    program: Any
    inputs: list[Any]
    blobs: dict[str, Parts]


def build_program(student: Student, context_tokens: int) -> Built:
    """The program of a student; of its weights the shapes alone are read.

    Args:
        student: float or quantized.
        context_tokens: most tokens that the cache holds.
    """
    ct = import_coremltools()
    mil = import_coremltools("coremltools.converters.mil.mil")
    mb, types, facts = mil.Builder, mil.types, student.facts
    # It counts the constants that it names, and goes on from one program to the next.
    import_coremltools("coremltools.converters.mil.converter")._reset_conversion_state()
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

    blobs: dict[str, Parts] = {}

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(
        input_ids: Var, causal_mask: Var, logit_positions: Var, key_cache: Var, value_cache: Var
    ) -> Var:
        weights = Weights(mb, student, blobs)
        graph = _DecoderGraph(mb, weights, facts, {"key": key_cache, "value": value_cache})
        return graph.build(input_ids, causal_mask, logit_positions, context_tokens)

    some = ct.RangeDim(1, context_tokens, default=1)
    inputs = [
        ct.TensorType(name="input_ids", shape=(1, some), dtype=np.int32),
        ct.TensorType(name="causal_mask", shape=(1, 1, some, some), dtype=np.float16),
        ct.TensorType(name="logit_positions", shape=(some,), dtype=np.int32),
    ]
    return Built(program, inputs, blobs)


class _DecoderGraph:
    """Emits the ops of one decoder."""

    def __init__(
        self, mb: Any, weights: Weights, facts: DecoderFacts, states: dict[str, Var]
    ) -> None:
        self._facts = facts
        self._states = states
        self._ops = NamedOps(mb)
        self._weights = weights
        self._norms = Norms(self._ops, self._weights, facts)

    def build(self, ids: Var, mask: Var, logit_positions: Var, context_tokens: int) -> Var:
        """All ops from token ids to logits [1, m, vocab]."""
        facts, ops, weights, norms = self._facts, self._ops, self._weights, self._norms
        x = ops("gather", x=weights.matrix(facts.embedding), indices=ids, axis=0)
        x = norms.embedded(x)
        places = Places(ops, weights, facts, ids, mask, context_tokens)
        attention = Attention(ops, weights, norms, facts, places, self._states)
        for layer in range(facts.layers):
            ops.scope = f"layer_{layer}"
            names, linears, biases = facts.norms(layer), facts.linears(layer), facts.biases(layer)
            inner = attention.emit(layer, norms.of_stream(x, names["attention"]))
            out = weights.linear(ops, inner, linears["o"], biases.get("o"))
            x = norms.added(x, out, names.get("attention_out"))
            inner = self._ffn(linears, norms.of_stream(x, names["ffn"]))
            out = weights.linear(ops, inner, linears["down"])
            x = norms.added(x, out, names.get("ffn_out"))
        ops.scope = "head"
        return self._logits(ops("gather", x=x, indices=logit_positions, axis=1))

    def _ffn(self, linears: dict[str, str], x: Var) -> Var:
        """x [1, n, hidden] -> ``act(gate(x)) * up(x)``: [1, n, ffn]."""
        gate = self._weights.linear(self._ops, x, linears["gate"])
        if self._facts.activation == "silu":
            gate = self._ops("silu", x=gate)
        else:
            gate = self._ops("gelu", x=gate, mode="TANH_APPROXIMATION")
        return self._ops("mul", x=gate, y=self._weights.linear(self._ops, x, linears["up"]))

    def _logits(self, x: Var) -> Var:
        """The stream at the wanted places -> logits [1, m, vocab], divided and capped."""
        facts, ops = self._facts, self._ops
        x = self._norms.of_stream(x, facts.final_norm)
        cap = facts.logits_softcap
        divisor = facts.logits_divisor * (cap or 1.0)
        inputs = {
            "x": x,
            "weight": self._weights.matrix(facts.head),
            "bias": self._weights.zeros(facts.vocab_size),
        }
        if divisor == 1.0 and cap is None:
            return ops.named("logits", "linear", **inputs)
        logits = ops("linear", **inputs)
        if cap is None:
            return ops.named("logits", "real_div", x=logits, y=np.float16(divisor))
        if divisor != 1.0:
            logits = ops("real_div", x=logits, y=np.float16(divisor))
        return ops.named("logits", "mul", x=ops("tanh", x=logits), y=np.float16(cap))
