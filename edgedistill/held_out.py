"""What students predict on text that nothing was fitted to: hidden states, and the KL between two.

Logits of a long text are never held: two students are compared by their last hidden states, a few
positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.decoder_forward import CPU, DecoderForward, head_logits
from edgedistill.errors import InputError
from edgedistill.student import Student

LogProbs = Callable[[Tensor], Tensor]

BATCH_TOKENS = 2048  # that run through a block at once
HEAD_POSITIONS = 256  # whose logits lie in memory at once


@dataclass(frozen=True)
class SplitText:
    """Calibration text in two parts that share no sequence.

    Attributes:
        fitting: int64 [sequences, tokens], to look at and to fit to.
        held_out: int64 [sequences, tokens], to measure on.
    """

    fitting: Tensor
    held_out: Tensor


def split_text(
    student: Path, calibration: Calibration, chat: Chat, *, held_out_tokens: int
) -> SplitText:
    """The calibration text of a student, the first sequences of it held out.

    Args:
        student: a student directory.
        calibration: which text.
        chat: the fixed part of every conversation.
        held_out_tokens: that are held out at most; never more than half of the text.

    Raises:
        InputError: as :func:`calibration_ids`, or the text is a single sequence.
    """
    sequences = calibration_ids(student, calibration, chat)
    held_out = min(max(1, held_out_tokens // len(sequences[0])), len(sequences) // 2)
    if held_out == 0:
        raise InputError(
            f"the calibration text fills one sequence of {len(sequences[0])} tokens, "
            "of which none can be held out",
            where=str(calibration.file) if calibration.file else "the built-in texts",
            hint="give more text in calibration.file, or smaller calibration.sequence_tokens",
        )
    return SplitText(_stack(sequences[held_out:]), _stack(sequences[:held_out]))


def other_text(
    student: Path, file: Path, calibration: Calibration, chat: Chat, *, tokens: int
) -> Tensor:
    """Text of another domain to measure on: int64 [sequences, tokens].

    Raises:
        InputError: as :func:`calibration_ids`.
    """
    other = calibration.model_copy(update={"file": file, "tokens": tokens})
    return _stack(calibration_ids(student, other, chat))


def _stack(sequences: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(sequences))


def run_blocks(decoder: DecoderForward, layers: Iterable[int], hidden: Tensor) -> Tensor:
    """Run some blocks, in order: [sequences, tokens, hidden] -> the same shape."""
    for layer in layers:
        hidden = run_block(decoder, layer, hidden)
    return hidden


def run_block(decoder: DecoderForward, layer: int, hidden: Tensor) -> Tensor:
    """Run one block, some sequences at a time: [sequences, tokens, hidden] -> the same shape."""
    count = max(1, BATCH_TOKENS // hidden.shape[1])
    return torch.cat([decoder.block(layer, part) for part in torch.split(hidden, count)])


class Head:
    """A student's final norm and output matrix, held in memory.

    Args:
        student: whose they are.
        matrix: float32 [vocab, hidden], in the place of its own.
        device: where they are held.
    """

    def __init__(
        self,
        student: Student,
        matrix: npt.NDArray[np.float32] | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._facts = facts = student.facts
        self._norm = torch.from_numpy(student.read(facts.final_norm)).to(device)
        if matrix is None:
            matrix = student.read(facts.head)
        self._matrix = torch.from_numpy(matrix).to(device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[positions, hidden] -> float32 [positions, vocab]."""
        return head_logits(hidden, self._norm, self._matrix, self._facts)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """[positions, hidden] -> float32 [positions, vocab]."""
        return self.logits(hidden).log_softmax(-1)


def mean_kl(
    reference: LogProbs, reference_hidden: Tensor, other: LogProbs, other_hidden: Tensor
) -> float:
    """Mean KL(reference || other) in nats over all positions, from what leaves the last blocks.

    Args:
        reference: from hidden states [positions, hidden] to log-probabilities [positions, vocab].
        reference_hidden: [sequences, tokens, hidden].
        other: likewise; its hidden states may be of another width.
        other_hidden: [sequences, tokens, hidden].
    """
    total, positions = 0.0, reference_hidden.shape[0] * reference_hidden.shape[1]
    both = (reference_hidden, other_hidden)
    parts = (torch.split(states.flatten(0, 1), HEAD_POSITIONS) for states in both)
    for expected, found in zip(*parts, strict=True):
        kl = functional.kl_div(other(found), reference(expected), log_target=True, reduction="sum")
        total += float(kl)
    return total / positions
