"""The graph of a decoder, from its facts, by the convention of ``onnxruntime-genai``.

Inputs are ``input_ids`` [batch, new], ``attention_mask`` [batch, past + new] and, for each layer,
``past_key_values.N.key`` and ``.value`` [batch, kv_heads, past, head_dim]; outputs are ``logits``
and ``present.N.key`` and ``.value``.  Where past and present are one buffer, the new tokens are
appended in place.  The operators of ``com.microsoft`` are specified in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

The head is a large part of a small model and a prompt needs it at one position only, so the graph
computes ``logits[:, first_logit:]``.  That input defaults to -1, the last position; 0 asks for all.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from edgedistill.errors import InputError
from edgedistill.onnx_graph import MICROSOFT, OnnxGraph
from edgedistill.onnx_layout import stores_zeros
from edgedistill.onnx_package import FIRST_LOGIT, SHIPPED_ACCURACY_LEVEL
from edgedistill.progress import track
from edgedistill.quantized import QTensor, pack_codes
from edgedistill.student import Student

ROPE_TABLES = ("rope.cos", "rope.sin")


def write_decoder(graph: OnnxGraph, student: Student, context_tokens: int) -> None:
    """Add a student's whole decoder to an empty graph.

    Weights are read, written and dropped one by one, in the order of their use.

    Raises:
        InputError: a tensor is missing, its shape is not what the config says, or the model was
            not made for ``context_tokens``.
    """
    facts = student.facts
    if context_tokens > facts.max_context_tokens:
        raise InputError(
            f"context_tokens {context_tokens} is more than the model's own "
            f"{facts.max_context_tokens}",
            where=str(student.path / "config.json"),
        )
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
        self._student = student
        self._facts = student.facts
        self._context_tokens = context_tokens

    def write(self) -> None:
        graph, facts = self._graph, self._facts
        hidden = self._embedding(graph.input("input_ids", np.int64, ["batch_size", "new_tokens"]))
        self._lengths()
        self._rope_tables()
        graph.optional_input(FIRST_LOGIT, np.array([-1], dtype=np.int64))
        # A stated length of 1 tells genai that a prompt yields its last position alone.
        graph.output("logits", np.float32, ["batch_size", 1, facts.vocab_size])
        normed = self._norm(facts.norms(0)["attention"], hidden)
        for layer in track(range(facts.layers), label="writing ONNX"):
            hidden, normed = self._block(layer, hidden, normed)
        self._linear(facts.head, normed, "logits")

    def _block(self, layer: int, hidden: str, normed: str) -> tuple[str, str]:
        """(residual stream, its norm for the next block) after one block."""
        facts = self._facts
        norms, linears, biases = facts.norms(layer), facts.linears(layer), facts.biases(layer)
        last = layer == facts.layers - 1
        attended = self._attention(layer, normed)
        if last:  # from here on, only the positions whose logits are asked for
            hidden, attended = (self._from_first_logit(x) for x in (hidden, attended))
        attended = self._linear(linears["o"], attended, bias=biases.get("o"))
        hidden, normed = self._add_and_norm(norms["ffn"], hidden, attended)
        gated = self._silu(self._linear(linears["gate"], normed))
        product = self._graph.node(
            "Mul", [gated, self._linear(linears["up"], normed)], [f"layer.{layer}.product"]
        )
        next_norm = facts.final_norm if last else facts.norms(layer + 1)["attention"]
        return self._add_and_norm(next_norm, hidden, self._linear(linears["down"], product))

    def _attention(self, layer: int, normed: str) -> str:
        graph, facts = self._graph, self._facts
        norms, linears, biases = facts.norms(layer), facts.linears(layer), facts.biases(layer)
        q, k, v = (self._linear(linears[n], normed, bias=biases.get(n)) for n in "qkv")
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
        return graph.node(
            "GroupQueryAttention",
            [q, k, v, *pasts, "last_key", "key_count", *ROPE_TABLES],
            [f"layer.{layer}.attended", *presents],
            domain=MICROSOFT,
            num_heads=facts.heads,
            kv_num_heads=facts.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )

    def _embedding(self, ids: str) -> str:
        name, graph = self._facts.embedding, self._graph
        if name not in self._student.grids:
            return graph.node("Gather", [self._float(name), ids], ["embedded"], axis=0)
        tensor = self._student.read_quantized(name)
        codes = graph.weight(f"{name}.codes", pack_codes(tensor.codes, tensor.grid.bits))
        return graph.node(
            "GatherBlockQuantized",
            [codes, ids, *self._scales_and_zeros(name, tensor)],
            ["embedded"],
            domain=MICROSOFT,
            bits=tensor.grid.bits,
            block_size=tensor.grid.group_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _linear(self, name: str, x: str, output: str | None = None, bias: str | None = None) -> str:
        """``x @ W.T + bias``, the matrix as [rows, columns] like in the checkpoint."""
        graph = self._graph
        output = output or name.removesuffix(".weight")
        if name in self._student.grids:
            return self._quantized_linear(name, x, output, bias)
        weight = name if name in graph else self._float(name)
        product = output if bias is None else f"{output}.product"
        graph.node("FusedMatMul", [x, weight], [product], domain=MICROSOFT, transB=1)
        return graph.node("Add", [product, self._float(bias)], [output]) if bias else output

    def _quantized_linear(self, name: str, x: str, output: str, bias: str | None) -> str:
        graph, grid = self._graph, self._student.grids[name]
        rows, columns = self._student.shape(name)
        blocks = [rows, columns // grid.group_size, grid.group_size * grid.bits // 8]
        if f"{name}.codes" in graph:  # tied: the embedding stored them
            codes = graph.view(f"{name}.blocks", f"{name}.codes", blocks)
            rest = [n for n in (f"{name}.scales", f"{name}.zeros") if n in graph]
        else:
            tensor = self._student.read_quantized(name)
            packed = pack_codes(tensor.codes, grid.bits).reshape(blocks)
            codes = graph.weight(f"{name}.codes", packed)
            rest = self._scales_and_zeros(name, tensor)
        inputs = [x, codes, *rest]
        if bias is not None:
            inputs += [""] * (5 - len(inputs)) + [self._float(bias)]
        return graph.node(
            "MatMulNBits",
            inputs,
            [output],
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=grid.bits,
            block_size=grid.group_size,
            accuracy_level=SHIPPED_ACCURACY_LEVEL,
        )

    def _scales_and_zeros(self, name: str, tensor: QTensor) -> list[str]:
        """Scales float32 [rows, groups]; zeros packed by row, left out where ORT assumes them."""
        parts = [self._graph.weight(f"{name}.scales", tensor.scales.astype(np.float32))]
        if stores_zeros(tensor.grid):
            zeros = pack_codes(tensor.zero_points(), tensor.grid.bits)
            parts.append(self._graph.weight(f"{name}.zeros", zeros))
        return parts

    def _float(self, name: str) -> str:
        return self._graph.weight(name, self._student.read(name))

    def _norm(self, name: str, x: str) -> str:
        return self._graph.node(
            "SimplifiedLayerNormalization",
            [x, self._float(name)],
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
            [stream, branch, self._float(name)],
            [output, "", "", total],
            domain=MICROSOFT,
            epsilon=self._facts.norm_eps,
        )
        return total, normed

    def _silu(self, x: str) -> str:
        gate = self._graph.node("Sigmoid", [x], [f"{x}.sigmoid"])
        return self._graph.node("Mul", [x, gate], [f"{x}.silu"])

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

    def _rope_tables(self) -> None:
        """Cosines and sines, float32 [context_tokens, head_dim / 2]."""
        positions = np.arange(self._context_tokens, dtype=np.float32)
        angles = np.outer(positions, self._facts.rope.inverse_frequencies(self._facts.head_dim))
        for name, table in zip(ROPE_TABLES, (np.cos(angles), np.sin(angles)), strict=True):
            self._graph.weight(name, table)
