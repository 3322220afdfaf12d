"""The tensors of a student as initializers of a graph, and the nodes that read its matrices."""

from __future__ import annotations

import numpy as np

from edgedistill.onnx_graph import MICROSOFT, OnnxGraph
from edgedistill.onnx_layout import stores_zeros
from edgedistill.onnx_package import SHIPPED_ACCURACY_LEVEL
from edgedistill.quantized import QTensor, pack_codes
from edgedistill.student import Student


class OnnxWeights:
    """Reads, writes and drops one tensor at a time; every method returns the name of its result.

    Args:
        graph: that the weights and nodes go into.
        student: whose they are.
    """

    def __init__(self, graph: OnnxGraph, student: Student) -> None:
        self._graph = graph
        self._student = student

    def rows(self, name: str, ids: str, output: str) -> str:
        """The rows of a matrix that int64 ``ids`` [batch, new] name."""
        graph = self._graph
        if name not in self._student.grids:
            return graph.node("Gather", [self.floats(name), ids], [output], axis=0)
        tensor = self._student.read_quantized(name)
        codes = graph.weight(f"{name}.codes", pack_codes(tensor.codes, tensor.grid.bits))
        return graph.node(
            "GatherBlockQuantized",
            [codes, ids, *self._scales_and_zeros(name, tensor)],
            [output],
            domain=MICROSOFT,
            bits=tensor.grid.bits,
            block_size=tensor.grid.group_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def linear(self, name: str, x: str, output: str | None = None, bias: str | None = None) -> str:
        """``x @ W.T + bias``, the matrix as [rows, columns] like in the checkpoint."""
        graph = self._graph
        output = output or name.removesuffix(".weight")
        if name in self._student.grids:
            return self._quantized_linear(name, x, output, bias)
        weight = name if name in graph else self.floats(name)
        product = output if bias is None else f"{output}.product"
        graph.node("FusedMatMul", [x, weight], [product], domain=MICROSOFT, transB=1)
        return graph.node("Add", [product, self.floats(bias)], [output]) if bias else output

    def floats(self, name: str) -> str:
        """A tensor as float32."""
        return self._graph.weight(name, self._student.read(name))

    def norm(self, name: str) -> str:
        """What a norm multiplies by, float32: the operators know no ``1 + w``."""
        offset = np.float32(self._student.facts.norm_offset)
        return self._graph.weight(name, self._student.read(name) + offset)

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
            inputs += [""] * (5 - len(inputs)) + [self.floats(bias)]
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
