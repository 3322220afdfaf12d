"""Which FFN channels and KV groups go, block by block, and what makes up for them.

Behind what goes there is a matrix that writes to the stream (``down``, ``o``).  Its columns are
eliminated under what it reads in the student that is narrow up to there, and the ones that stay are
fitted to bring the stream back to where the whole student has it: the errors of earlier blocks are
made up for as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.column_elimination import eliminate
from edgedistill.decoder import DecoderFacts
from edgedistill.decoder_forward import ATTENTION, FFN, BlockWeights, DecoderForward, Half
from edgedistill.held_out import BATCH_TOKENS
from edgedistill.progress import track
from edgedistill.pruned_student import BlockWidth, Places
from edgedistill.pruning_results import KeptImportance
from edgedistill.student import Student

# Towards the matrix as it was, as a share of the mean of the Hessian's diagonal.  The best of .01,
# .05 and .2 on held-out text (SmolLM2-135M, 1,376 of 1,536 FFN channels, 8,192 tokens).
DAMPING = 0.2


class WidthChoice:
    """Chooses when it is iterated, once: a :class:`BlockWidth` for each block, in order.

    Args:
        student: a student directory.
        ids: int64 [sequences, tokens], to choose and to fit on.
        hidden: channels of the stream that stay.
        after: the sizes that stay.
    """

    def __init__(self, student: Path, ids: Tensor, hidden: Places, after: DecoderFacts) -> None:
        self._decoder = DecoderForward(Student(student))
        self._after = after
        facts = self._decoder.facts
        self._silent = torch.ones(facts.hidden_size, dtype=torch.bool)
        self._silent[torch.from_numpy(hidden)] = False
        self._ids = ids
        self._whole: list[Tensor] = []
        self._narrow: list[Tensor] = []
        self._shares: dict[str, list[float]] = {ATTENTION.exit: [], FFN.exit: []}

    def __iter__(self) -> Iterator[BlockWidth]:
        with torch.inference_mode():
            count = max(1, BATCH_TOKENS // self._ids.shape[1])
            self._whole = list(torch.split(self._decoder.embed(self._ids), count))
            self._narrow = [hidden.masked_fill(self._silent, 0.0) for hidden in self._whole]
        for layer in track(range(self._decoder.facts.layers), label="choosing channels"):
            yield self._choose(layer)

    def kept_shares(self) -> list[KeptImportance]:
        """Of each kind of which some go, the share of what they carried that the kept ones did.

        A channel carries mean |activation| times the norm of its column (Wanda, arXiv 2306.11695,
        summed over the column as FLAP, arXiv 2312.11983, does for whole channels), a KV group the
        sum of its channels'.
        """
        what = {FFN.exit: "FFN channels", ATTENTION.exit: "KV groups"}
        return [
            KeptImportance(what=what[short], mean=float(np.mean(found)), least=min(found))
            for short, found in self._shares.items()
            if min(found) < 1.0
        ]

    @torch.inference_mode()
    def _choose(self, layer: int) -> BlockWidth:
        facts, whole = self._decoder.facts, self._decoder.read_block(layer)
        exits = (ATTENTION.exit, FFN.exit)
        biases = dict(whole.biases)
        for short in biases.keys() & exits:
            biases[short] = biases[short].masked_fill(self._silent, 0.0)
        narrow = dataclasses.replace(whole, linears=dict(whole.linears), biases=biases)
        width = facts.heads // facts.kv_heads * facts.head_dim
        groups = self._half(ATTENTION, whole, narrow, width, self._after.kv_heads)
        channels = self._half(FFN, whole, narrow, 1, self._after.ffn_size)
        fitted = {short: narrow.linears[short].numpy() for short in exits}
        return BlockWidth(ffn=channels, kv_groups=groups, exits=fitted)

    def _half(
        self, half: Half, whole: BlockWeights, narrow: BlockWeights, width: int, keep: int
    ) -> Places:
        """Bring both streams through a half of a block, whose exit is put into ``narrow``."""
        matrix = whole.linears[half.exit].masked_fill(self._silent[:, None], 0.0)
        rows, columns = matrix.shape
        hessian = torch.zeros(columns, columns, dtype=torch.float64)
        moment = torch.zeros(rows, columns, dtype=torch.float64)
        carried = torch.zeros(columns, dtype=torch.float64)
        reads = []
        for number, stream in enumerate(self._whole):
            inner = self._inner(half, whole, stream)
            carried += inner.abs().sum(dim=(0, 1), dtype=torch.float64)
            self._whole[number] = stream + self._decoder.leave(half, whole, inner)
            read = self._inner(half, narrow, self._narrow[number])
            x = read.flatten(0, 1)
            y = self._wanted(half, whole, inner, number).flatten(0, 1)
            hessian += x.T @ x
            moment += y.T @ x
            reads.append(read)
        moment[self._silent] = 0.0
        found = eliminate(hessian, moment, matrix, width=width, keep=keep, damping=DAMPING)
        narrow.linears[half.exit] = found.matrix
        for number, read in enumerate(reads):
            self._narrow[number] += self._decoder.leave(half, narrow, read)
        carried *= whole.linears[half.exit].double().norm(dim=0)
        self._shares[half.exit].append(_kept_share(carried.view(-1, width).sum(dim=1), found.kept))
        return found.kept

    def _wanted(self, half: Half, whole: BlockWeights, inner: Tensor, number: int) -> Tensor:
        """What the matrix is to answer, its bias left out: [sequences, tokens, hidden]."""
        if half.out in whole.norms:
            # The stream behind a norm cannot be fitted by least squares; what the norm reads can.
            return functional.linear(inner, whole.linears[half.exit])
        lacking = self._whole[number] - self._narrow[number]
        lacking = lacking / self._decoder.facts.residual_multiplier
        return lacking - whole.biases[half.exit] if half.exit in whole.biases else lacking

    def _inner(self, half: Half, weights: BlockWeights, stream: Tensor) -> Tensor:
        return self._decoder.inner(half, weights, self._decoder.enter(half, weights, stream))


def _kept_share(carried: Tensor, kept: Places) -> float:
    """The share of float64 [groups] that stays; exactly one where nothing that carries went."""
    gone = torch.from_numpy(np.setdiff1d(np.arange(len(carried)), kept))
    lost = float(carried[gone].sum())
    return 1.0 - lost / float(carried.sum()) if lost else 1.0
