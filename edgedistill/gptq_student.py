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
import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.calibration import Ids
from edgedistill.decoder_forward import HALVES, BlockWeights, DecoderForward, Half
from edgedistill.errors import InputError
from edgedistill.gptq import ROUNDED_FROM_BITS, Gptq, GptqSettings, Inputs
from edgedistill.gptq_cost import HEAD_TOKENS
from edgedistill.gptq_head import head_inputs, quantize_head
from edgedistill.gptq_polish import FloatArray
from edgedistill.gptq_state import GptqState, Packed
from edgedistill.hidden_stream import HiddenStream
from edgedistill.progress import Bar, progress_bar
from edgedistill.quantized import Grid, QTensor
from edgedistill.stages.quantize_rtn import round_to_grid
from edgedistill.student import Student, StudentWriter, packed_arrays

BATCH_TOKENS = 2048


def quantize_student(
    student: Student,
    dst: Path,
    ids: Sequence[Ids],
    grid_of: Callable[[str], Grid],
    settings: GptqSettings | None = None,
    *,
    label: str,
    work: Path | None = None,
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
        work: a directory that outlives a killed run, which then goes on behind its last block.

    Raises:
        InputError: a weight is not finite, or too large for its grid.
        StageError: the hidden states are not finite.
    """
    facts, settings = student.facts, settings or GptqSettings()
    matrices = facts.matrices()
    with (
        StudentWriter(dst, student) as writer,
        tempfile.TemporaryDirectory(prefix=".hidden-", dir=dst) as scratch,
        progress_bar(len(matrices), label) as bar,
    ):
        for name in sorted(set(student.names()) - set(matrices)):
            writer.write(name, read_finite(student, name))
        state = GptqState(work or Path(scratch))
        _quantize_parts(student, state, np.stack(ids), Path(scratch), grid_of, settings, bar)
        for name, arrays in state.tensors():
            writer.write_packed(name, grid_of(name), arrays)


def _quantize_parts(
    student: Student,
    state: GptqState,
    ids: Ids,
    scratch: Path,
    grid_of: Callable[[str], Grid],
    settings: GptqSettings,
    bar: Bar,
) -> None:
    """Finish what the state lacks: embedding and head, then a block at a time."""
    facts = student.facts
    walk = _Walk(student, ids.shape, state.directory, scratch, settings)
    if not state.finished:
        outer, embedding = _quantize_outer(student, ids, grid_of, settings)
        walk.embed(ids, embedding)
        state.finish(outer, walk.files(0))
    outside = len({facts.embedding, facts.head})
    bar.advance(outside + (state.finished - 1) * len(facts.linears(0)))
    for layer in range(state.finished - 1, facts.layers):
        walk.start(layer)
        block = {}
        for name, quantized in _quantize_block(student, layer, walk, grid_of, settings):
            block[name] = packed_arrays(name, quantized)
            bar.advance()
        state.finish(block, walk.files(layer + 1))


def _quantize_outer(
    student: Student, ids: Ids, grid_of: Callable[[str], Grid], settings: GptqSettings
) -> tuple[dict[str, Packed], FloatArray]:
    """Head and embedding by their names, and what the rows of the embedding have become."""
    facts, found = student.facts, {}
    for name in dict.fromkeys([facts.head, facts.embedding]):
        weights, grid = read_finite(student, name), grid_of(name)
        if name == facts.head and grid.bits < ROUNDED_FROM_BITS:
            inputs = head_inputs(student, torch.from_numpy(head_text(ids)))
            quantized = quantize_head(weights, grid, inputs, settings)
        else:
            quantized = round_to_grid(weights, grid)
        found[name] = packed_arrays(name, quantized)
    return found, quantized.dequantize()


def _quantize_block(
    student: Student,
    layer: int,
    walk: _Walk,
    grid_of: Callable[[str], Grid],
    settings: GptqSettings,
) -> Iterator[tuple[str, QTensor]]:
    """Tensor name and what it became, in the order of their use."""
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
        shape: sequences, and tokens of each.
        directory: where the hidden states lie.
        scratch: an empty directory for what need not outlive the run.
        settings: the ingredients.
    """

    def __init__(
        self,
        student: Student,
        shape: tuple[int, ...],
        directory: Path,
        scratch: Path,
        settings: GptqSettings,
    ) -> None:
        self.forward = DecoderForward(student)
        self._student, self._facts = student, student.facts
        self._sequential = settings.sequential
        sequences, tokens = shape
        self._batches = token_batches(sequences, tokens)

        def stream(name: str) -> HiddenStream:
            return HiddenStream(self.forward, (sequences, tokens), name, directory, scratch)

        self._stream = stream("calibrated")
        self._as_it_was: HiddenStream | None = None
        if settings.sequential and settings.compensation > 0:
            self._as_it_was = stream("unquantized")

    def embed(self, ids: Ids, embedding: FloatArray) -> None:
        """Let the text in: int64 [sequences, tokens].

        Args:
            ids: the text.
            embedding: float32 [vocab, hidden], as it comes out of its own quantization.
        """
        whole = self._student.read(self._facts.embedding)
        self._stream.embed(ids, embedding if self._sequential else whole)
        if self._as_it_was is not None:
            self._as_it_was.embed(ids, whole)

    def start(self, block: int) -> None:
        """Go on with a block."""
        for stream in self._streams():
            stream.start(block)

    def files(self, block: int) -> list[Path]:
        """Where what enters a block lies."""
        return [stream.file(block) for stream in self._streams()]

    def _streams(self) -> list[HiddenStream]:
        return [stream for stream in (self._stream, self._as_it_was) if stream is not None]

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
        for stream in self._streams():
            stream.end_half()


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
            None if part is None else part.div_(self._count).numpy()
            for part in (self._drift, self._residual)
        )
        return Inputs(self._hessian.div_(self._count).numpy(), drift, residual)


def token_batches(sequences: int, tokens: int, most: int = BATCH_TOKENS) -> list[slice]:
    """Which sequences go through a block at once: ``most`` tokens, but always a whole sequence."""
    step = max(1, most // tokens)
    return [slice(start, start + step) for start in range(0, sequences, step)]


def head_text(ids: Ids) -> Ids:
    """The first sequences, on which the head is calibrated: int64 [sequences, tokens]."""
    return ids[: max(1, HEAD_TOKENS // ids.shape[1])]


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
