"""A student's weights as constants of a Core ML program: float16, or the codes of a grid.

The program is given their shapes; their bytes are read when the weight file comes to them.

Ops: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
(iOS 18, ``constexpr_blockwise_shift_scale`` and ``constexpr_lut_to_dense``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.coreml_ops import NamedOps, Var
from edgedistill.errors import InputError
from edgedistill.quantized import pack_codes, unpack_codes
from edgedistill.quiet_coremltools import import_coremltools
from edgedistill.student import Student

# The bytes of a constant in order, whenever they are asked for.
Parts = Callable[[], Iterable[npt.NDArray[Any]]]

FLOAT16_MAX = 65504.0
PART_ELEMENTS = 1 << 22  # of float32, 16 MB
# MIL has integers of the first widths for `data`, indices into a table of the others; of 5 bits it
# has neither.
INTEGER_BITS = (4, 8)
TABLE_BITS = (2, 3)


class Weights:
    """Makes constants of a student's tensors, each once: a tied matrix is stored once.


    Args:
        mb: ``coremltools.converters.mil.mil.Builder``, inside a program.
        student: where the tensors are.
        blobs: gets the bytes of each constant; its value in the program is a placeholder.
    """

    def __init__(self, mb: Any, student: Student, blobs: dict[str, Parts]) -> None:
        self._mb = mb
        self._student = student
        self._made: dict[str, Var] = {}
        self._blobs = blobs

    def matrix(self, name: str) -> Var:
        """A matrix [rows, columns], on its grid or in float16."""
        if name not in self._made:
            quantized = name in self._student.grids
            self._made[name] = self._quantized(name) if quantized else self._float16(name)
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
            self._made[name] = self._constant(name, values.dtype, values.shape, lambda: [values])
        return self._made[name]

    def _constant(self, name: str, dtype: Any, shape: tuple[int, ...], parts: Parts) -> Var:
        """A constant of one zero, which takes no memory, that stands for the parts."""
        self._blobs[name] = parts
        return self._mb.const(val=np.broadcast_to(np.zeros(1, dtype), shape), name=name)

    def _float16(self, name: str, offset: float = 0.0, factor: float = 1.0) -> Var:
        return self._constant(
            _op_name(name),
            np.float16,
            self._student.shape(name),
            lambda: self._float16_parts(name, offset, factor),
        )

    def _float16_parts(
        self, name: str, offset: float, factor: float
    ) -> Iterator[npt.NDArray[np.float16]]:
        """A tensor in float16, some rows at a time.

        Raises:
            InputError: a value does not fit.
        """
        rows, *columns = self._student.shape(name)
        step = max(1, PART_ELEMENTS // max(1, math.prod(columns)))
        for start in range(0, rows, step):
            values = self._student.read_rows(name, start, start + step)
            if offset or factor != 1.0:
                values = (values + np.float32(offset)) * np.float32(factor)
            largest = float(np.abs(values).max(initial=0.0))
            if not largest <= FLOAT16_MAX:  # also true of NaN
                raise InputError(
                    f"{name} holds {largest:g}, which float16 cannot",
                    where=str(self._student.path),
                    hint="Core ML computes in float16; rescale the tensor or export another format",
                )
            yield values.astype(np.float16)

    def _quantized(self, name: str) -> Var:
        """Codes, scales and zeros as they are: ``(data - offset) * scale`` by blocks.

        Where the zero is fixed the stored data are code - zero, signed, and need no offset.
        Codes of ``TABLE_BITS`` go through a table of all that they can mean.
        """
        grid, op_name, student = self._student.grids[name], _op_name(name), self._student
        types = import_coremltools("coremltools.converters.mil.mil").types
        rows, columns = student.shape(name)
        groups = (rows, columns // grid.group_size)
        fixed, through_table = grid.zero == "fixed", grid.bits in TABLE_BITS
        signed = fixed and not through_table
        stored = types.string_to_nptype(f"{'int' if signed else 'uint'}{grid.bits}")
        data = self._constant(
            f"{op_name}_codes", stored, (rows, columns), lambda: [self._codes(name, signed)]
        )
        inputs = {}
        if through_table:
            values: npt.NDArray[Any] = np.arange(grid.max_code + 1, dtype=np.uint8)
            if fixed:
                values = values.astype(np.int8) - np.int8(grid.fixed_zero)
            data = self._mb.constexpr_lut_to_dense(
                indices=data, lut=values.reshape(1, 1, -1, 1), name=f"{op_name}_values"
            )
        if not fixed:
            zero_bits = 8 if through_table else grid.bits
            inputs["offset"] = self._constant(
                f"{op_name}_zeros",
                types.string_to_nptype(f"uint{zero_bits}"),
                groups,
                lambda: [pack_codes(student.read_part(name, ".zeros").reshape(-1), zero_bits)],
            )
        scale = self._constant(
            f"{op_name}_scales", np.float16, groups, lambda: [student.read_part(name, ".scales")]
        )
        return self._mb.constexpr_blockwise_shift_scale(
            data=data, scale=scale, name=op_name, **inputs
        )

    def _codes(self, name: str, signed: bool) -> npt.NDArray[np.uint8]:
        """Packed codes as the format packs them: like the student, but rows may end in a byte.

        code - zero in two's complement is the code with its highest bit turned over.
        """
        grid, packed = self._student.grids[name], self._student.read_part(name, ".codes")
        columns = self._student.shape(name)[1]
        if columns * grid.bits % 8:
            codes = unpack_codes(packed, grid.bits, columns)
            packed = pack_codes(codes.reshape(-1), grid.bits)
        if not signed:
            return packed
        highest = 1 << (grid.bits - 1)
        return packed ^ np.uint8(highest if grid.bits == 8 else highest | highest << grid.bits)


def _op_name(name: str) -> str:
    """MIL names are identifiers."""
    return name.replace(".", "_")
