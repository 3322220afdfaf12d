"""The graph of a decoder, from its facts, by the convention of ``onnxruntime-genai``.

Inputs are ``input_ids`` [batch, new], ``attention_mask`` [batch, past + new] and, for each layer,
``past_key_values.N.key`` and ``.value`` [batch, kv_heads, past, head_dim]; outputs are ``logits``
and ``present.N.key`` and ``.value``.  Where past and present are one buffer, the new tokens are
appended in place.  The operators of ``com.microsoft`` are specified in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

The head is a large part of a small model and a prompt needs it at one position only, so the graph
computes ``logits[:, first_logit:]``.  That input defaults to -1, the last position; 0 asks for all.

``GroupQueryAttention`` counts ``local_window_size`` like ``transformers``: the token itself is one
of the window's.  The caches of such layers span the whole context all the same.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgedistill.errors import InputError
from edgedistill.families import Activation
from edgedistill.onnx_graph import MICROSOFT, OnnxGraph
from edgedistill.onnx_layout import ROPE_TABLES, SLIDING_ROPE_TABLES
from edgedistill.onnx_package import FIRST_LOGIT
from edgedistill.onnx_weights import OnnxWeights
from edgedistill.progress import track
from edgedistill.rope import Rope
from edgedistill.student import Student


def write_decoder(graph: OnnxGraph, student: Student, context_tokens: int) -> None:
    """Add a student's whole decoder to an empty graph.

    Weights are read, written and dropped one by one, in the order of their use.

    Raises:
        InputError: a tensor is missing, or its shape is not what the config says.
    """
    facts = student.facts
    for name, shape in facts.tensor_shapes().items():
        if student.shape(name) != shape:
            raise InputError(
                f"{name} has the shape {student.shape(name)}, its config asks for {shape}",
                where=str(student.path),
            )
    _Decoder(graph, student, context_tokens).write()


class _Decoder:
    """Holds what the parts of one graph share; every method returns the name of its result."""

    def __init__(self, graph: OnnxGraph, student: Student, context_tokens: int) -> None:
        self._graph = graph
        self._weights = OnnxWeights(graph, student)
        self._facts = student.facts
        self._context_tokens = context_tokens

    def write(self) -> None:
        graph, facts = self._graph, self._facts
        ids = graph.input("input_ids", np.int64, ["batch_size", "new_tokens"])
        hidden = self._weights.rows(facts.embedding, ids, "embedded")
        hidden = self._times(hidden, facts.embedding_scale)
        self._lengths()
        graph.optional_input(FIRST_LOGIT, np.array([-1], dtype=np.int64))
        # A stated length of 1 tells genai that a prompt yields its last position alone.
        graph.output("logits", np.float32, ["batch_size", 1, facts.vocab_size])
        normed = self._norm(facts.norms(0)["attention"], hidden)
        for layer in track(range(facts.layers), label="writing ONNX"):
            hidden, normed = self._block(layer, hidden, normed)
        self._logits(normed)

    def _block(self, layer: int, hidden: str, normed: str) -> tuple[str, str]:
        """(residual stream, its norm for the next block) after one block."""
        facts, linear = self._facts, self._weights.linear
        norms, linears, biases = facts.norms(layer), facts.linears(layer), facts.biases(layer)
        last = layer == facts.layers - 1
        attended = self._attention(layer, normed)
        if last:  # from here on, only the positions whose logits are asked for
            hidden, attended = (self._from_first_logit(x) for x in (hidden, attended))
        attended = linear(linears["o"], attended, bias=biases.get("o"))
        attended = self._leave(norms.get("attention_out"), attended)
        hidden, normed = self._add_and_norm(norms["ffn"], hidden, attended)
        gated = self._activation(facts.activation, linear(linears["gate"], normed))
        product = self._graph.node(
            "Mul", [gated, linear(linears["up"], normed)], [f"layer.{layer}.product"]
        )
        fed = self._leave(norms.get("ffn_out"), linear(linears["down"], product))
        next_norm = facts.final_norm if last else facts.norms(layer + 1)["attention"]
        return self._add_and_norm(next_norm, hidden, fed)

    def _leave(self, norm: str | None, branch: str) -> str:
        """What a half block adds to the stream: normalized and scaled where the family does so."""
        normed = branch if norm is None else self._norm(norm, branch)
        return self._times(normed, self._facts.residual_multiplier)

    def _attention(self, layer: int, normed: str) -> str:
        graph, facts = self._graph, self._facts
        norms, linears, biases = facts.norms(layer), facts.linears(layer), facts.biases(layer)
        q, k, v = (self._weights.linear(linears[n], normed, bias=biases.get(n)) for n in "qkv")
        if facts.qk_norm:
            q = self._norm_heads(norms["q"], q, facts.heads)
            k = self._norm_heads(norms["k"], k, facts.kv_heads)
        pasts, presents = [], []
        for part in ("key", "value"):
            past, present = (
                ["batch_size", facts.kv_heads, tokens, facts.head_dim]
                for tokens in ("past_tokens", "present_tokens")
            )
            pasts.append(graph.input(f"past_key_values.{layer}.{part}", np.float32, past))
            presents.append(f"present.{layer}.{part}")
            graph.output(presents[-1], np.float32, present)
        rope = facts.rope_of(layer)
        tables = () if rope is None else self._rope_tables(rope)
        return graph.node(
            "GroupQueryAttention",
            [q, k, v, *pasts, "last_key", "key_count", *tables],
            [f"layer.{layer}.attended", *presents],
            domain=MICROSOFT,
            num_heads=facts.heads,
            kv_num_heads=facts.kv_heads,
            do_rotary=int(rope is not None),
            rotary_interleaved=0,
            **self._scores(layer),
        )

    def _scores(self, layer: int) -> dict[str, int | float]:
        """How attention scores differ from the operator's default, as its attributes."""
        facts = self._facts
        found = {
            "scale": facts.attention_scale,
            "softcap": facts.attention_softcap,
            "local_window_size": facts.window_of(layer),
        }
        return {name: value for name, value in found.items() if value is not None}

    def _logits(self, normed: str) -> None:
        """The head, and what its logits go through: the last result is named ``logits``."""
        facts = self._facts
        steps: list[tuple[str, float | None]] = []
        if facts.logits_divisor != 1.0:
            steps.append(("Div", facts.logits_divisor))
        if facts.logits_softcap is not None:
            cap = facts.logits_softcap
            steps += [("Div", cap), ("Tanh", None), ("Mul", cap)]
        outputs = [f"logits.{i}" for i in range(len(steps))] + ["logits"]
        x = self._weights.linear(facts.head, normed, outputs[0])
        for (kind, number), output in zip(steps, outputs[1:], strict=True):
            operands = [x] if number is None else [x, self._number(number)]
            x = self._graph.node(kind, operands, [output])

    def _norm(self, name: str, x: str) -> str:
        return self._graph.node(
            "SimplifiedLayerNormalization",
            [x, self._weights.norm(name)],
            [name.removesuffix(".weight")],
            axis=-1,
            epsilon=self._facts.norm_eps,
        )

    def _norm_heads(self, name: str, x: str, heads: int) -> str:
        """Normalize each head by itself: [batch, new, heads * head_dim] there and back."""
        graph, head_dim = self._graph, self._facts.head_dim
        output = name.removesuffix(".weight")
        # A 0 keeps the dimension as it is.
        apart, joined = (self._integers([0, 0, *s]) for s in ((heads, head_dim), (-1,)))
        x = graph.node("Reshape", [x, apart], [f"{output}.heads"])
        return graph.node("Reshape", [self._norm(name, x), joined], [f"{output}.joined"])

    def _add_and_norm(self, name: str, stream: str, branch: str) -> tuple[str, str]:
        """(stream + branch, its norm)."""
        output = name.removesuffix(".weight")
        total = f"{output}.stream"
        normed = self._graph.node(
            "SkipSimplifiedLayerNormalization",
            [stream, branch, self._weights.norm(name)],
            [output, "", "", total],
            domain=MICROSOFT,
            epsilon=self._facts.norm_eps,
        )
        return total, normed

    def _activation(self, kind: Activation, x: str) -> str:
        graph = self._graph
        if kind == "gelu_tanh":
            return graph.node("Gelu", [x], [f"{x}.gelu"], approximate="tanh")
        gate = graph.node("Sigmoid", [x], [f"{x}.sigmoid"])
        return graph.node("Mul", [x, gate], [f"{x}.silu"])

    def _times(self, x: str, factor: float) -> str:
        if factor == 1.0:
            return x
        return self._graph.node("Mul", [x, self._number(factor)], [f"{x}.scaled"])

    def _from_first_logit(self, x: str) -> str:
        end, axis = self._integers([np.iinfo(np.int64).max]), self._integers([1])
        return self._graph.node("Slice", [x, FIRST_LOGIT, end, axis], [f"{x}.kept"])

    def _lengths(self) -> None:
        """Index of the last key, int32 [batch], and number of keys, int32 [1], from the mask."""
        graph, one = self._graph, self._integers([1])
        mask = graph.input("attention_mask", np.int64, ["batch_size", "total_tokens"])
        keys = graph.node("ReduceSum", [mask, one], ["mask.keys"], keepdims=0)
        last = graph.node("Sub", [keys, one], ["mask.last_key"])
        graph.node("Cast", [last], ["last_key"], to=TensorProto.INT32)
        shape = graph.node("Shape", [mask], ["mask.shape"])
        width = graph.node("Gather", [shape, one], ["mask.width"], axis=0)
        graph.node("Cast", [width], ["key_count"], to=TensorProto.INT32)

    def _integers(self, values: list[int]) -> str:
        """A constant int64 vector, which all who need the same one share."""
        name = f"integers.{'_'.join(map(str, values))}"
        graph = self._graph
        return name if name in graph else graph.constant(name, np.array(values, dtype=np.int64))

    def _number(self, value: float) -> str:
        """A constant float32 scalar, likewise."""
        name, graph = f"number.{value!r}", self._graph
        return name if name in graph else graph.constant(name, np.array(value, dtype=np.float32))

    def _rope_tables(self, rope: Rope) -> tuple[str, str]:
        """Cosines and sines, float32 [context_tokens, rotary_dim / 2], their factor in them."""
        names = ROPE_TABLES if rope == self._facts.rope else SLIDING_ROPE_TABLES
        if names[0] not in self._graph:
            tokens = self._context_tokens
            frequencies = rope.inverse_frequencies(self._facts.rotary_dim, tokens)
            positions = np.arange(tokens, dtype=np.float32)
            angles = np.outer(positions, frequencies)
            factor = np.float32(rope.attention_factor)
            for name, table in zip(names, (np.cos(angles), np.sin(angles)), strict=True):
                self._graph.weight(name, table * factor)
        return names
