"""Grids for tests, apart from the quantize stages: plain rounding, and random codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.quantized import Grid, QTensor
from edgedistill.student import Student, StudentWriter


def random_tensor(grid: Grid, rows: int, columns: int, seed: int = 0) -> QTensor:
    """Every code in every place, scales of both signs, one of them zero.

    Scales have 7 significant bits, so that an integer zero times a scale is a float16.
    """
    rng = np.random.default_rng(seed)
    groups = columns // grid.group_size
    codes = rng.integers(0, grid.max_code + 1, (rows, columns), dtype=np.uint8)
    scales = seven_bits(rng.normal(0, 0.01, (rows, groups)).astype(np.float32))
    scales[0, 0] = 0
    zeros = rng.integers(0, grid.max_code + 1, (rows, groups), dtype=np.uint8)
    return QTensor(grid, codes, scales, zeros if grid.zero == "integer" else None)


def seven_bits(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Normal float16 values whose last four bits are zero."""
    bits = scales.astype(np.float16).view(np.uint16) & np.uint16(0xFFF0)
    return bits.view(np.float16)


def round_tensor(weights: npt.NDArray[np.float32], grid: Grid) -> QTensor:
    """The plainest rounding of a matrix onto a grid."""
    rows, columns = weights.shape
    groups = weights.reshape(rows, -1, grid.group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    if grid.zero == "integer":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = seven_bits((high - low) / grid.max_code * 1.01)
        zeros = np.clip(np.round(-low / scales), 0, grid.max_code)
    else:
        reach = grid.max_code - grid.fixed_zero
        scales = seven_bits(np.abs(groups).max(axis=2) / reach)
        zeros = np.full(scales.shape, grid.fixed_zero)
    codes = np.round(groups / scales[..., None].astype(np.float32)) + zeros[..., None]
    return QTensor(
        grid,
        np.clip(codes, 0, grid.max_code).astype(np.uint8).reshape(rows, columns),
        scales,
        zeros.astype(np.uint8) if grid.zero == "integer" else None,
    )


def round_student(src: Path, dst: Path, grid: Grid) -> Path:
    """A copy of a student with every matrix on ``grid``; returns ``dst``."""
    student = Student(src)
    matrices = set(student.facts.matrices())
    dst.mkdir(parents=True, exist_ok=True)
    with StudentWriter(dst, student) as writer:
        for name in student.names():
            values = student.read(name)
            writer.write(name, round_tensor(values, grid) if name in matrices else values)
    return dst


def random_grid_student(src: Path, dst: Path, grid: Grid) -> Path:
    """A copy of a student with random codes on ``grid`` in every matrix; returns ``dst``."""
    student = Student(src)
    dst.mkdir(parents=True, exist_ok=True)
    with StudentWriter(dst, student) as writer:
        for seed, name in enumerate(student.facts.tensor_shapes()):
            if name in student.facts.matrices():
                rows, columns = student.shape(name)
                writer.write(name, random_tensor(grid, rows, columns, seed))
            else:
                writer.write(name, student.read(name))
    return dst
