"""GPTQ over a whole student, a block at a time, in the memory of one block and the hidden states.

A block's matrices are quantized in the order of their use, each on the inputs that it will have:
those that come out of the quantized ones before it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.calibration import Ids
from edgedistill.decoder_forward import HALVES, BlockWeights, DecoderForward, Half
from edgedistill.errors import InputError
from edgedistill.gptq import ROUNDED_FROM_BITS, Gptq, GptqSettings, Inputs
from edgedistill.gptq_cost import HEAD_TOKENS, HELD_BYTES
from edgedistill.gptq_head import head_inputs, quantize_head
from edgedistill.gptq_polish import FloatArray
from edgedistill.progress import progress_bar
from edgedistill.quantized import Grid, QTensor
from edgedistill.stages.quantize_rtn import round_to_grid
from edgedistill.student import Student, StudentWriter

BATCH_TOKENS = 2048


def quantize_student(
    student: Student,
    dst: Path,
    ids: Sequence[Ids],
    grid_of: Callable[[str], Grid],
    settings: GptqSettings | None = None,
    *,
    label: str,
) -> None:
    """Write a quantized student: blocks and head by GPTQ, the rest by rounding to nearest.

    That is an embedding which is not the head, and a head on 8 bits.

    Args:
        student: not quantized.
        dst: an empty directory; hidden states that memory should not hold lie there meanwhile.
        ids: the calibration text, sequences of one length, int64 [tokens] each.
        grid_of: the grid of a matrix, by the name of its tensor.
        settings: the ingredients; default: the best.
        label: what the progress is called.

    Raises:
        InputError: a weight is not finite, or too large for its grid.
        StageError: the hidden states are not finite.
    """
    facts = student.facts
    matrices = facts.matrices()
    with (
        StudentWriter(dst, student) as writer,
        tempfile.TemporaryDirectory(prefix=".hidden-", dir=dst) as scratch,
        progress_bar(len(matrices), label) as bar,
    ):
        for name in sorted(set(student.names()) - set(matrices)):
            writer.write(name, read_finite(student, name))
        settings = settings or GptqSettings()
        for name in dict.fromkeys([facts.head, facts.embedding]):
            weights, grid = read_finite(student, name), grid_of(name)
            if name == facts.head and grid.bits < ROUNDED_FROM_BITS:
                inputs = head_inputs(student, torch.from_numpy(head_text(ids)))
                quantized = quantize_head(weights, grid, inputs, settings)
            else:
                quantized = round_to_grid(weights, grid)
            writer.write(name, quantized)
            bar.advance()
        walk = _Walk(student, np.stack(ids), quantized.dequantize(), Path(scratch), settings)
        for name, quantized in _quantize_blocks(student, walk, grid_of, settings):
            writer.write(name, quantized)
            bar.advance()


def _quantize_blocks(
    student: Student, walk: _Walk, grid_of: Callable[[str], Grid], settings: GptqSettings
) -> Iterator[tuple[str, QTensor]]:
    """Tensor name and what it became, in the order of their use."""
    for layer in range(student.facts.layers):
        names = student.facts.linears(layer)
        whole = walk.forward.read_block(layer)
        for short, name in names.items():
            _refuse_infinite(whole.linears[short].numpy(), name, student)
        rounded = replace(whole, linears=dict(whole.linears))
        # What the calibrated stream runs through.
        through = rounded if settings.sequential else whole
        for half in HALVES:
            for shorts, read in (
                (half.entry, walk.read_entry),
                ((half.exit,), walk.read_exit),
            ):
                inputs = read(half, through, whole)
                matrices = {s: whole.linears[s].numpy() for s in shorts}
                grids = {s: grid_of(names[s]) for s in shorts}
                for short, quantized in _quantize(matrices, grids, inputs, settings):
                    rounded.linears[short] = torch.from_numpy(quantized.dequantize())
                    yield names[short], quantized
            walk.leave(half, through, whole)


def _quantize(
    matrices: Mapping[str, FloatArray],
    grids: Mapping[str, Grid],
    inputs: Inputs,
    settings: GptqSettings,
) -> Iterator[tuple[str, QTensor]]:
    """Matrices that read the same inputs; the Hessian's factor is made once a group size."""
    factors: dict[int, Gptq] = {}
    for short, weights in matrices.items():
        size = grids[short].group_size
        if size not in factors:
            factors[size] = Gptq(inputs, size, settings)
        yield short, factors[size].quantize(weights, grids[short])


class _Walk:
    """All sequences on their way through the blocks, a half at a time.

    Two streams at most: the calibrated one, which sees what was quantized, and, where the error
    between them is to be undone, that of the student as it was.

    Args:
        student: not quantized.
        ids: int64 [sequences, tokens].
        embedding: float32 [vocab, hidden], as it comes out of its own quantization.
        scratch: an empty directory.
        settings: the ingredients.
    """

    def __init__(
        self,
        student: Student,
        ids: Ids,
        embedding: FloatArray,
        scratch: Path,
        settings: GptqSettings,
    ) -> None:
        self.forward = DecoderForward(student)
        self._facts = student.facts
        self._batches = token_batches(*ids.shape)
        if not settings.sequential:
            embedding = student.read(self._facts.embedding)
        self._stream = _Stream(self.forward, ids, embedding, scratch / "calibrated")
        self._as_it_was: _Stream | None = None
        if settings.sequential and settings.compensation > 0:
            whole = student.read(self._facts.embedding)
            self._as_it_was = _Stream(self.forward, ids, whole, scratch / "unquantized")

    def read_entry(self, half: Half, through: BlockWeights, whole: BlockWeights) -> Inputs:
        """The moments of what the half's first matrices read."""
        moments = _Moments(self._facts.hidden_size)
        for batch in self._batches:
            x = self._stream.enter(half, through, batch)
            ahead = self._as_it_was.enter(half, whole, batch) if self._as_it_was else None
            moments.add(x, ahead)
        return moments.inputs()

    def read_exit(self, half: Half, through: BlockWeights, whole: BlockWeights) -> Inputs:
        """The moments of what the half's last matrix reads, which both streams keep.

        It is a single matrix, so what its outputs lack is counted rather than what its inputs do:
        with what the stream lacks already, unless a norm is in between, which would hand on
        another share of it at every token.
        """
        added_as_it_is = half.out not in whole.norms
        rows, columns = whole.linears[half.exit].shape
        moments = _Moments(columns, rows)
        for batch in self._batches:
            x = self._stream.inner(half, through, batch)
            lacking = None
            if self._as_it_was is not None:
                ahead = self._as_it_was.inner(half, whole, batch)
                lacking = functional.linear(ahead - x, whole.linears[half.exit])
                if added_as_it_is:
                    behind = self._as_it_was.hidden(batch) - self._stream.hidden(batch)
                    lacking += behind / self._facts.residual_multiplier
            moments.add(x, lacking=lacking)
        return moments.inputs()

    def leave(self, half: Half, through: BlockWeights, whole: BlockWeights) -> None:
        """Add what the half computed to the streams."""
        for batch in self._batches:
            self._stream.leave(half, through, batch)
            if self._as_it_was is not None:
                self._as_it_was.leave(half, whole, batch)


class _Stream:
    """Hidden states [sequences, tokens, hidden], and what the half at work computed inside."""

    def __init__(
        self, forward: DecoderForward, ids: Ids, embedding: FloatArray, scratch: Path
    ) -> None:
        facts = forward.facts
        self._forward = forward
        wide = max(facts.heads * facts.head_dim, facts.ffn_size)
        self._hidden = mapped_array((*ids.shape, facts.hidden_size), scratch.with_suffix(".hidden"))
        self._inner = mapped_array((*ids.shape, wide), scratch.with_suffix(".inner"))
        for sequence, tokens in enumerate(ids):
            rows = torch.from_numpy(embedding[tokens])
            self._hidden[sequence] = forward.scale_embedded(rows).numpy()

    def hidden(self, batch: slice) -> Tensor:
        return torch.from_numpy(self._hidden[batch])

    def enter(self, half: Half, weights: BlockWeights, batch: slice) -> Tensor:
        return self._forward.enter(half, weights, self.hidden(batch))

    def inner(self, half: Half, weights: BlockWeights, batch: slice) -> Tensor:
        inner = self._forward.inner(half, weights, self.enter(half, weights, batch))
        self._inner[batch, :, : inner.shape[-1]] = inner.numpy()
        return inner

    def leave(self, half: Half, weights: BlockWeights, batch: slice) -> None:
        columns = weights.linears[half.exit].shape[1]
        inner = torch.from_numpy(np.ascontiguousarray(self._inner[batch, :, :columns]))
        self._hidden[batch] += self._forward.leave(half, weights, inner).numpy()


class _Moments:
    """Sums of outer products over tokens; ``rows`` of the matrix that reads, where needed."""

    def __init__(self, columns: int, rows: int = 0) -> None:
        self._rows = rows
        self._count = 0
        self._hessian = torch.zeros(columns, columns)
        self._drift: Tensor | None = None
        self._residual: Tensor | None = None

    def add(self, x: Tensor, ahead: Tensor | None = None, lacking: Tensor | None = None) -> None:
        """Count tokens: what they read, what they would read without quantization, what lacks."""
        x = x.flatten(0, -2)
        self._count += len(x)
        self._hessian.addmm_(x.T, x)
        if ahead is not None:
            if self._drift is None:
                self._drift = torch.zeros_like(self._hessian)
            self._drift.addmm_((ahead.flatten(0, -2) - x).T, x)
        if lacking is not None:
            if self._residual is None:
                self._residual = torch.zeros(self._rows, x.shape[1])
            self._residual.addmm_(lacking.flatten(0, -2).T, x)

    def inputs(self) -> Inputs:
        """The means."""
        drift, residual = (
            None if part is None else (part / self._count).numpy()
            for part in (self._drift, self._residual)
        )
        return Inputs((self._hessian / self._count).numpy(), drift, residual)


def token_batches(sequences: int, tokens: int, most: int = BATCH_TOKENS) -> list[slice]:
    """Which sequences go through a block at once: ``most`` tokens, but always a whole sequence."""
    step = max(1, most // tokens)
    return [slice(start, start + step) for start in range(0, sequences, step)]


def head_text(ids: Sequence[Ids]) -> Ids:
    """The first sequences, on which the head is calibrated: int64 [sequences, tokens]."""
    return np.stack(ids[: max(1, HEAD_TOKENS // len(ids[0]))])


def read_finite(student: Student, name: str) -> FloatArray:
    """A tensor as float32.

    Raises:
        InputError: a value is not finite.
    """
    values = student.read(name)
    _refuse_infinite(values, name, student)
    return values


def _refuse_infinite(values: FloatArray, name: str, student: Student) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds values that are not finite", where=str(student.path))


def mapped_array(shape: tuple[int, ...], file: Path) -> npt.NDArray[np.float32]:
    """Zeros in memory, or in a mapped file where they are many."""
    if 4 * np.prod(shape) <= HELD_BYTES:
        return np.zeros(shape, dtype=np.float32)
    return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
