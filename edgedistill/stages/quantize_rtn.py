"""Round to nearest on a grid: each group's scale is searched, each weight rounded once.

The baseline of every quantization paper; no calibration data.  The search over clipped ranges is
the one of "min-max with MSE clipping" (Banner et al. 2019, arXiv:1810.05723, section 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.progress import track
from edgedistill.quantized import Bits, Grid, QTensor, ZeroKind
from edgedistill.stage import Stage
from edgedistill.student import Student, StudentWriter

CLIP_RATIOS = tuple(float(r) for r in np.linspace(1.0, 0.7, 13))
ROW_BLOCK_WEIGHTS = 2_000_000
# A scale of 7 significant bits times a zero point of 4 bits fits float16's 11 bits, so that GGUF's
# Q4_1, which stores the product, holds the same zero points exactly.
SCALE_BITS_DROPPED = 4

FloatArray = npt.NDArray[np.float32]


class GridChoice(BaseModel):
    """A grid as a recipe states it; what is not given follows from the bits.

    Attributes:
        bits: 2, 4 or 8.
        group_size: weights that share a scale; default 32, and 64 for 2 bits.
        zero: ``integer`` (a zero point for each group; default for 4 bits) or ``fixed``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits
    group_size: Annotated[int, Field(ge=16, le=256, multiple_of=16)] | None = None
    zero: ZeroKind | None = None

    def grid(self) -> Grid:
        """The grid with its defaults filled in."""
        zero: ZeroKind = "integer" if self.bits == 4 else "fixed"
        return Grid(self.bits, self.group_size or (64 if self.bits == 2 else 32), self.zero or zero)


class QuantizeRtn(GridChoice, Stage):
    """Put every matrix on a grid by rounding to nearest.

    Attributes:
        embeddings: grid of the token embedding (and of the head where they are tied); default: the
            linears' own, but never below 8 bits, because rows of rare tokens have no redundancy.
        head: grid of an untied head; default: the embeddings'.
    """

    embeddings: GridChoice | None = None
    head: GridChoice | None = None

    def grid_of(self, name: str, facts: DecoderFacts) -> Grid:
        """The grid that the matrix ``name`` goes on."""
        embeddings = (self.embeddings or GridChoice(bits=8)).grid()
        if name == facts.embedding:
            return embeddings
        if name == facts.head:
            return self.head.grid() if self.head else embeddings
        return self.grid()

    def grids(self, facts: DecoderFacts) -> list[Grid]:
        """The distinct grids in use."""
        return list(dict.fromkeys(self.grid_of(name, facts) for name in facts.matrices()))

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A student that is quantized already; rows that groups do not divide."""
        if quantized:
            return ["the student is quantized already: one stage a rung decides the integers"]
        problems = []
        if self.head and facts.tied_embeddings:
            problems.append("head: this student's head is its embedding; state `embeddings` alone")
        shapes = facts.tensor_shapes()
        # Blocks are alike: the first stands for all.
        for name in dict.fromkeys([facts.embedding, *facts.linears(0).values(), facts.head]):
            grid, columns = self.grid_of(name, facts), shapes[name][1]
            if columns % grid.group_size:
                problems.append(
                    f"group_size {grid.group_size} does not divide the {columns} columns of {name}"
                )
        problems += [
            f"zero: integer goes with 4 bits, not with {grid.bits}"
            for grid in self.grids(facts)
            if grid.zero == "integer" and grid.bits != 4
        ]
        return problems

    def run(self, src: Path, dst: Path) -> None:
        """Quantize all matrices of ``src``; norms and biases are carried as they are."""
        student = Student(src)
        facts = student.facts
        matrices = set(facts.matrices())
        with StudentWriter(dst, student) as writer:
            for name in track(student.names(), label=f"rounding to {self.bits} bits"):
                values = student.read(name)
                if not np.isfinite(values).all():
                    raise InputError(f"{name} holds values that are not finite", where=str(src))
                if name in matrices:
                    writer.write(name, round_to_grid(values, self.grid_of(name, facts)))
                else:
                    writer.write(name, values)


def round_to_grid(weights: FloatArray, grid: Grid) -> QTensor:
    """Quantize a matrix by rounding, each group's scale chosen for the least squared error.

    Args:
        weights: float32 [rows, columns], columns a multiple of ``grid.group_size``.
        grid: any grid; integer zero points for 4 bits.

    Returns:
        codes, float16 scales and zero points.
    """
    rows, columns = weights.shape
    step = max(1, ROW_BLOCK_WEIGHTS // columns)
    parts = []
    for start in range(0, rows, step):
        groups = weights[start : start + step].reshape(-1, grid.group_size)
        with np.errstate(over="ignore", invalid="ignore"):  # told below, with the value
            fixed = grid.zero == "fixed"
            parts.append(_round_fixed(groups, grid) if fixed else _round_integer(groups))
    codes = np.concatenate([p[0] for p in parts]).reshape(rows, columns)
    scales = np.concatenate([p[1] for p in parts]).reshape(rows, -1)
    if not np.isfinite(scales).all():
        raise InputError(f"weights of up to {np.abs(weights).max():.3g} need scales over float16's")
    zeros = np.concatenate([p[2] for p in parts]).reshape(rows, -1)
    return QTensor(grid, codes, scales, zeros if grid.zero == "integer" else None)


_Rounded = tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.uint8]]


def _round_fixed(groups: FloatArray, grid: Grid) -> _Rounded:
    """[n, group_size] -> codes, scales [n], zeros [n]; the scale's sign is free."""
    zero = np.full(len(groups), grid.fixed_zero, dtype=np.uint8)
    if grid.bits == 8:
        # 1..255, as -127..127: symmetric, and fine enough that clipping never pays.
        scale = (np.abs(groups).max(axis=1) / np.float32(127)).astype(np.float16)
        codes = np.clip(_divide(groups, scale) + 128, 1, 255).astype(np.uint8)
        return codes, scale, zero
    # The wider side of the grid (-8 of -8..7, +2 of -1..2) takes the group's largest magnitude.
    below, above = -grid.fixed_zero, grid.max_code - grid.fixed_zero
    wider = below if -below > above else above
    peak = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    candidates = [
        ((peak * np.float32(r)) / np.float32(wider)).astype(np.float16) for r in CLIP_RATIOS
    ]
    return _best(groups, candidates, [zero] * len(candidates), grid.max_code)


def _round_integer(groups: FloatArray) -> _Rounded:
    """[n, group_size] -> codes, scales [n], zeros [n] on a 4-bit grid with zero points."""
    low = np.minimum(groups.min(axis=1), 0)
    high = np.maximum(groups.max(axis=1), 0)
    scales, zeros = [], []
    for ratio in CLIP_RATIOS:
        scale = _shorten(((high - low) * np.float32(ratio / 15)).astype(np.float16))
        exact_zero = _divide(-low[:, None] * np.float32(ratio), scale)[:, 0]
        scales.append(scale)
        zeros.append(np.clip(exact_zero, 0, 15).astype(np.uint8))
    return _best(groups, scales, zeros, 15)


def _best(
    groups: FloatArray,
    scales: list[npt.NDArray[np.float16]],
    zeros: list[npt.NDArray[np.uint8]],
    max_code: int,
) -> _Rounded:
    """The candidate with the least squared error, for each group; ties go to the earliest."""
    best_error = np.full(len(groups), np.inf, dtype=np.float32)
    best_codes = np.zeros(groups.shape, dtype=np.uint8)
    best_scale, best_zero = scales[0].copy(), zeros[0].copy()
    for scale, zero in zip(scales, zeros, strict=True):
        offset = zero[:, None].astype(np.float32)
        codes = np.clip(_divide(groups, scale) + offset, 0, max_code)
        error = np.square((codes - offset) * scale[:, None].astype(np.float32) - groups).sum(axis=1)
        better = error < best_error
        best_error[better] = error[better]
        best_codes[better] = codes[better].astype(np.uint8)
        best_scale[better], best_zero[better] = scale[better], zero[better]
    return best_codes, best_scale, best_zero


def _divide(groups: FloatArray, scale: npt.NDArray[np.float16]) -> FloatArray:
    """round(groups / scale), half to even; 0 where the scale is 0."""
    divisor = scale.astype(np.float32)[:, None]
    safe = np.where(divisor == 0, np.float32(1), divisor)
    quotient = np.where(divisor == 0, np.float32(0), groups / safe)
    return np.rint(quotient).astype(np.float32)


def _shorten(scale: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Round positive float16 values to 7 significant bits, half away from zero."""
    half = np.uint16(1 << (SCALE_BITS_DROPPED - 1))
    mask = np.uint16(0xFFFF << SCALE_BITS_DROPPED & 0xFFFF)
    return ((scale.view(np.uint16) + half) & mask).view(np.float16)
