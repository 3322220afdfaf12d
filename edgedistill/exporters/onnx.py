"""ONNX with KV cache, for ONNX Runtime and ``onnxruntime-genai``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.exporter import Exporter
from edgedistill.onnx_layout import (
    HEAD_MULTIPLE,
    KERNEL_BITS,
    ROPE_TABLES,
    ROTATED_MULTIPLE,
    SLIDING_ROPE_TABLES,
    stored_bytes,
)
from edgedistill.onnx_package import MODEL_FILE, not_installed, write_package
from edgedistill.quantized import Grid
from edgedistill.student import Student


class Onnx(Exporter):
    """A directory that ``onnxruntime-genai`` opens as it is.

    Matrices on a grid become ``MatMulNBits`` (and ``GatherBlockQuantized`` for the embedding) with
    their own codes and zero points, and scales widened to float32; all others are float32, which
    the CPU kernels want.  A tied matrix is stored once.
    """

    extra: ClassVar[str] = "onnx"
    runtime: ClassVar[str] = "onnx_runtime"

    def holds(self, grid: Grid) -> bool:
        """What ``MatMulNBits`` takes: 2, 4 and 8 bits in groups of 16, 32, 64, …, any zeros."""
        groups = grid.group_size >= 16 and grid.group_size.bit_count() == 1
        return groups and grid.bits in KERNEL_BITS

    def problems(self, facts: DecoderFacts) -> list[str]:
        """Heads that ``GroupQueryAttention`` does not take."""
        rotates = any(facts.rope_of(layer) is not None for layer in range(facts.layers))
        multiple = ROTATED_MULTIPLE if rotates else HEAD_MULTIPLE
        takes = "ONNX Runtime's attention takes multiples of"
        if facts.head_dim % multiple:
            return [f"heads of {facts.head_dim} dimensions: {takes} {multiple}"]
        if rotates and facts.rotary_dim % ROTATED_MULTIPLE:
            rotated = f"heads that rotate {facts.rotary_dim} dimensions"
            return [f"{rotated}: {takes} {ROTATED_MULTIPLE}"]
        return []

    def stored_bytes(self, shape: tuple[int, ...], grid: Grid | None) -> int:
        """Codes, float32 scales and zeros; float32 of all else."""
        return stored_bytes(shape, grid)

    def export(self, student: Student, dst: Path, *, context_tokens: int) -> None:
        """Write the graph, its weights, and the package files around them.

        Raises:
            InputError: a grid that the format cannot carry, or tensors that contradict the config.
            UnavailableError: the ``onnx`` package is not installed.
        """
        self.refuse_misfit(student)
        self.refuse_context(student, context_tokens)
        for name, grid in student.grids.items():
            if not self.holds(grid):
                raise InputError(
                    f"{name} is on {grid}, which MatMulNBits does not take",
                    where=str(student.path),
                    hint="quantize to 2, 4 or 8 bits, in groups of a power of two, 16 or more",
                )
        try:
            from edgedistill.onnx_decoder import write_decoder
            from edgedistill.onnx_graph import OnnxGraph
        except ModuleNotFoundError as error:
            raise not_installed(error) from error
        with OnnxGraph(dst) as graph:
            write_decoder(graph, student, context_tokens)
        write_package(student, dst, context_tokens)

    def weight_bytes(self, artifact: Path) -> int:
        """Bytes of all codes, scales, zeros and float weights; the rotary tables are none."""
        try:
            from edgedistill.onnx_graph import external_bytes, read_model
        except ModuleNotFoundError as error:
            raise not_installed(error) from error
        tables = (*ROPE_TABLES, *SLIDING_ROPE_TABLES)
        return external_bytes(read_model(artifact / MODEL_FILE), besides=tables)
