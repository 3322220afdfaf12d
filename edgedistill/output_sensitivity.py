"""How much the student's predictions mind an error in what a matrix puts out.

To second order the KL of the logits is half the squared error under the Fisher information, whose
expectation is that of squared gradients of the log-probability of tokens that the student itself
draws (Amari 1998; Kunstner et al. 2019, arXiv 1905.12558, on why they have to be drawn).  Of the
information of a matrix's outputs its diagonal is kept, a share for each row and one for each
token: rows are rounded apart from each other, so their errors are not correlated, and a token that
attention ignores (the first of a text has the largest activations of all) must not count in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgedistill.decoder_forward import BlockWeights, DecoderForward
from edgedistill.gptq_student import token_batches
from edgedistill.held_out import HEAD_POSITIONS, Head
from edgedistill.hidden_stream import mapped_array
from edgedistill.student import Student

# One text at a time goes backward: its activations inside a block are held.
BACKWARD_TOKENS = 1024


@dataclass(frozen=True)
class OutputWeight:
    """The weight of a squared error of a matrix's output, ``rows[r] * tokens[t]``.

    An error that all tokens share is weighed by itself: attention averages the others out, not it.

    Attributes:
        rows: float32 [rows], mean squared gradient of an output.
        tokens: float32 [sequences, tokens], of mean 1.
        shared: float32 [rows], mean squared gradient of what is added to all tokens of a sequence,
            over the number of its tokens.
    """

    rows: Tensor
    tokens: Tensor
    shared: Tensor

    def loss(self, off: Tensor) -> float:
        """Half the mean over tokens: nats a token, of errors [sequences, tokens, rows]."""
        mean = (off * self.tokens[..., None]).mean((0, 1))
        by_token = (off - mean).square() @ self.rows
        return 0.5 * float((by_token * self.tokens).mean() + mean.square() @ self.shared)


def output_weights(
    student: Student, ids: Tensor, scratch: Path, seed: int = 0
) -> dict[str, OutputWeight]:
    """Of every matrix of the blocks, by the name of its tensor.

    One pass forward, which keeps what enters each block, and one backward, a block at a time.

    Args:
        student: a float student.
        ids: int64 [sequences, tokens].
        scratch: an empty directory for what memory should not hold.
        seed: of the tokens that are drawn.
    """
    forward, facts = _Probed(student), student.facts
    shape = (facts.layers, *ids.shape, facts.hidden_size)
    entered = mapped_array(shape, scratch / "entered.hidden")
    batches = token_batches(len(ids), ids.shape[1], BACKWARD_TOKENS)
    hidden = forward.embed(ids)
    for layer in range(facts.layers):
        entered[layer][:] = hidden.numpy()
        with torch.no_grad():
            hidden = torch.cat([forward.block(layer, hidden[batch]) for batch in batches])
    gradient = _head_gradient(student, hidden, seed)
    found: dict[str, OutputWeight] = {}
    for layer in reversed(range(facts.layers)):
        names = facts.linears(layer)
        squares = {s: _Squares(*ids.shape) for s in names}
        forward.hold(layer)
        for batch in batches:
            leaf = torch.from_numpy(np.array(entered[layer][batch])).requires_grad_()
            with forward.watched(squares, batch):
                out = forward.block(layer, leaf)
            out.backward(gradient[batch])  # type: ignore[no-untyped-call]
            assert leaf.grad is not None  # the stream goes through
            gradient[batch] = leaf.grad
        found |= {name: squares[short].weight() for short, name in names.items()}
    return found


def _head_gradient(student: Student, hidden: Tensor, seed: int) -> Tensor:
    """Of the summed log-probability of drawn tokens, with respect to the last hidden states."""
    head, generator = Head(student), torch.Generator().manual_seed(seed)
    parts = []
    for part in torch.split(hidden.flatten(0, 1), HEAD_POSITIONS):
        leaf = part.detach().requires_grad_()
        log_probs = head.log_probs(leaf)
        drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        log_probs.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        parts.append(leaf.grad)
    return torch.cat(parts).view_as(hidden)


class _Squares:
    """Squared gradients of a matrix's outputs, summed by row and by token."""

    def __init__(self, sequences: int, tokens: int) -> None:
        self._tokens = torch.zeros(sequences, tokens)
        self._rows: Tensor | None = None
        self._shared: Tensor | None = None

    def add(self, batch: slice, gradient: Tensor) -> None:
        """Count the gradient [sequences of the batch, tokens, rows]."""
        squared = gradient.square()
        self._tokens[batch] = squared.sum(-1)
        rows = squared.sum((0, 1))
        shared = gradient.sum(1).square().sum(0)
        self._rows = rows if self._rows is None else self._rows + rows
        self._shared = shared if self._shared is None else self._shared + shared

    def weight(self) -> OutputWeight:
        """The means; nothing counts where nothing has a gradient."""
        # Every matrix is watched.
        assert self._rows is not None
        assert self._shared is not None
        mean = self._tokens.mean()
        tokens = self._tokens / mean if mean > 0 else torch.zeros_like(self._tokens)
        count = self._tokens.numel()
        return OutputWeight(self._rows / count, tokens, self._shared / count)


class _Probed(DecoderForward):
    """Runs a block while the gradients of its matrices' outputs are watched."""

    def __init__(self, student: Student) -> None:
        super().__init__(student)
        self._held: tuple[int, BlockWeights] | None = None
        self._squares: dict[str, _Squares] = {}
        self._batch = slice(0)

    def hold(self, layer: int) -> None:
        """Read a block's weights once for all batches."""
        self._held = (layer, super().read_block(layer))

    def read_block(self, layer: int) -> BlockWeights:
        if self._held is not None and self._held[0] == layer:
            return self._held[1]
        return super().read_block(layer)

    @contextmanager
    def watched(self, squares: dict[str, _Squares], batch: slice) -> Iterator[None]:
        """Add the squared gradients of what runs inside, by short name, in its backward pass."""
        self._squares, self._batch = squares, batch
        yield
        self._squares = {}

    def _linear(self, weights: BlockWeights, short: str, x: Tensor) -> Tensor:
        out = super()._linear(weights, short, x)
        if short in self._squares:
            squares, batch = self._squares[short], self._batch
            out.register_hook(lambda gradient: squares.add(batch, gradient))  # type: ignore[no-untyped-call]
        return out
