"""A student's weights as constants of a Core ML program: float16, or the codes of a grid.

Ops: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
(iOS 18, ``constexpr_blockwise_shift_scale`` and ``constexpr_lut_to_dense``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.coreml_ops import NamedOps, Var
from edgedistill.errors import InputError
from edgedistill.quantized import QTensor
from edgedistill.quiet_coremltools import import_coremltools
from edgedistill.student import Student

FLOAT16_MAX = 65504.0
# MIL has integers of the first widths for `data`, indices into a table of the others; of 5 bits it
# has neither.
INTEGER_BITS = (4, 8)
TABLE_BITS = (2, 3)


class Weights:
    """Reads tensors of a student into constants, each once: a tied matrix is stored once.

    Args:
        mb: ``coremltools.converters.mil.mil.Builder``, inside a program.
        student: where the tensors are.
    """

    def __init__(self, mb: Any, student: Student) -> None:
        self._mb = mb
        self._student = student
        self._made: dict[str, Var] = {}

    def matrix(self, name: str) -> Var:
        """A matrix [rows, columns], on its grid or in float16."""
        if name not in self._made:
            if name in self._student.grids:
                self._made[name] = self._quantized(name, self._student.read_quantized(name))
            else:
                self._made[name] = self._float16(name)
        return self._made[name]

    def linear(self, ops: NamedOps, x: Var, name: str, bias: str | None = None) -> Var:
        """x [..., columns] times the matrix ``name`` [rows, columns], plus the bias."""
        rows = self._student.shape(name)[0]
        stored = self.vector(bias) if bias else self.zeros(rows)
        return ops("linear", x=x, weight=self.matrix(name), bias=stored)

    def vector(self, name: str, *, offset: float = 0.0, factor: float = 1.0) -> Var:
        """A norm's or a bias's weights [n] in float16: ``(offset + w) * factor``, taken in float32.

        A tensor has one offset and one factor, whoever asks for it.
        """
        if name not in self._made:
            self._made[name] = self._float16(name, offset, factor)
        return self._made[name]

    def zeros(self, size: int) -> Var:
        """The bias [size] of a linear that has none; the format stores one all the same."""
        return self.table(f"no_bias_{size}", np.zeros(size, np.float16))

    def table(self, name: str, values: npt.NDArray[Any]) -> Var:
        """A constant that is no tensor of the student."""
        if name not in self._made:
            self._made[name] = self._mb.const(val=values, name=name)
        return self._made[name]

    def _float16(self, name: str, offset: float = 0.0, factor: float = 1.0) -> Var:
        values = self._student.read(name)
        if offset or factor != 1.0:
            values = (values + np.float32(offset)) * np.float32(factor)
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= FLOAT16_MAX:  # also true of NaN
            raise InputError(
                f"{name} holds {largest:g}, which float16 cannot",
                where=str(self._student.path),
                hint="Core ML computes in float16; rescale the tensor or export another format",
            )
        return self._mb.const(val=values.astype(np.float16), name=_op_name(name))

    def _quantized(self, name: str, tensor: QTensor) -> Var:
        """Codes, scales and zeros as they are: ``(data - offset) * scale`` by blocks.

        Where the zero is fixed the stored data are code - zero, signed, and need no offset.
        Codes of ``TABLE_BITS`` go through a table of all that they can mean.
        """
        grid, op_name = tensor.grid, _op_name(name)
        types = import_coremltools("coremltools.converters.mil.mil").types
        offset: npt.NDArray[Any] | None = None
        if grid.bits in TABLE_BITS:
            values: npt.NDArray[Any] = np.arange(grid.max_code + 1, dtype=np.uint8)
            if tensor.zeros is None:
                values = values.astype(np.int8) - np.int8(grid.fixed_zero)
            else:
                offset = tensor.zeros
            data: Any = self._mb.constexpr_lut_to_dense(
                indices=tensor.codes.astype(types.string_to_nptype(f"uint{grid.bits}")),
                lut=values.reshape(1, 1, -1, 1),
                name=f"{op_name}_values",
            )
        elif tensor.zeros is None:
            signed = (tensor.codes.astype(np.int16) - grid.fixed_zero).astype(np.int8)
            data = signed.astype(types.np_int4_dtype) if grid.bits == 4 else signed
        else:
            stored = types.np_uint4_dtype if grid.bits == 4 else np.uint8
            data, offset = tensor.codes.astype(stored), tensor.zeros.astype(stored)
        inputs = {} if offset is None else {"offset": offset}
        return self._mb.constexpr_blockwise_shift_scale(
            data=data, scale=tensor.scales, name=op_name, **inputs
        )


def _op_name(name: str) -> str:
    """MIL names are identifiers."""
    return name.replace(".", "_")
