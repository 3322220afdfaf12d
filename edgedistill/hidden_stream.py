"""The hidden states of a text on their way through the blocks, in mapped files of two generations.

A block reads the one that it was given and writes the other.  So what it started from is whole
until it is done, at no cost beyond the disk: a run that is killed inside goes on from there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.calibration import Ids
from edgedistill.decoder_forward import BlockWeights, DecoderForward, Half
from edgedistill.gptq_cost import HELD_BYTES
from edgedistill.gptq_polish import FloatArray


class HiddenStream:
    """Hidden states [sequences, tokens, hidden], and what the half at work computed inside.

    Args:
        forward: of the student.
        shape: sequences, and tokens of each.
        name: of its files, float32 of that shape and the hidden size, without a header.
        directory: where they lie; what is there already is kept.
        scratch: a directory for what need not outlive the run.
    """

    def __init__(
        self,
        forward: DecoderForward,
        shape: tuple[int, int],
        name: str,
        directory: Path,
        scratch: Path,
    ) -> None:
        facts = forward.facts
        self._forward = forward
        self._files = [directory / f"{name}-{generation}.hidden" for generation in range(2)]
        self._generations = [mapped_file((*shape, facts.hidden_size), f) for f in self._files]
        wide = max(facts.heads * facts.head_dim, facts.ffn_size)
        self._inner = mapped_array((*shape, wide), scratch / f"{name}.inner")
        self.start(0)

    def start(self, block: int) -> None:
        """Read what the blocks before this one left."""
        self._read = self._generations[block % 2]
        self._written = self._generations[(block + 1) % 2]

    def file(self, block: int) -> Path:
        """The file that holds what enters a block."""
        return self._files[block % 2]

    def embed(self, ids: Ids, embedding: FloatArray) -> None:
        """Write what enters the first block: rows of the matrix, for int64 [sequences, tokens]."""
        for sequence, tokens in enumerate(ids):
            rows = torch.from_numpy(embedding[tokens])
            self._generations[0][sequence] = self._forward.scale_embedded(rows).numpy()

    def hidden(self, batch: slice) -> Tensor:
        """Of some sequences, before the half at work."""
        return torch.from_numpy(self._read[batch])

    def enter(self, half: Half, weights: BlockWeights, batch: slice) -> Tensor:
        """What the half's first matrices read."""
        return self._forward.enter(half, weights, self.hidden(batch))

    def inner(self, half: Half, weights: BlockWeights, batch: slice) -> Tensor:
        """What the half's last matrix reads; it is kept for :meth:`leave`."""
        inner = self._forward.inner(half, weights, self.enter(half, weights, batch))
        self._inner[batch, :, : inner.shape[-1]] = inner.numpy()
        return inner

    def leave(self, half: Half, weights: BlockWeights, batch: slice) -> None:
        """Add what the half computed."""
        columns = weights.linears[half.exit].shape[1]
        inner = torch.from_numpy(np.ascontiguousarray(self._inner[batch, :, :columns]))
        added = self._forward.leave(half, weights, inner).numpy()
        np.add(self._read[batch], added, out=self._written[batch])

    def end_half(self) -> None:
        """All sequences have left it: the next half reads what it wrote, and adds to it there."""
        self._read = self._written


def mapped_file(shape: tuple[int, ...], file: Path) -> npt.NDArray[np.float32]:
    """A float32 array in a file, with what is in it already; new room is zeros.

    The room is taken at once, so that a full disk is an error here and no crash later.
    """
    size_bytes = 4 * int(np.prod(shape))
    with file.open("ab") as opened:
        if sys.platform == "linux":
            os.posix_fallocate(opened.fileno(), 0, size_bytes)
        opened.truncate(size_bytes)
    return np.memmap(file, dtype=np.float32, mode="r+", shape=shape)


def mapped_array(shape: tuple[int, ...], file: Path) -> npt.NDArray[np.float32]:
    """Zeros in memory, or in a mapped file where they are many."""
    if 4 * np.prod(shape) <= HELD_BYTES:
        return np.zeros(shape, dtype=np.float32)
    file.unlink(missing_ok=True)
    return mapped_file(shape, file)
