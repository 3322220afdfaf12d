"""Text to train on: token ids, how much each position counts, and what a teacher was recorded with.

Everything is stated at the position that predicts: at place t for the token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgedistill.calibration import Calibration, Piece, Top, calibration_pieces
from edgedistill.chat import Chat
from edgedistill.errors import InputError

MOST_MASS = 1.001  # of recorded probabilities, which were rounded


@dataclass(frozen=True)
class Recorded:
    """What a teacher found likeliest; what it left to all other tokens is one bucket.

    Attributes:
        ids: int64 [sequences, tokens, k].
        log_probs: float32 [sequences, tokens, k], nats; -inf where a place has fewer than k.
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class TrainingText:
    """Sequences of one length.

    Attributes:
        ids: int64 [sequences, tokens].
        weights: float32 [sequences, tokens]: of the loss at each position; their mean is 1.
        recorded: where no teacher is there to be asked.
        given: how many tokens of each were there before the student that learns wrote the others;
            None where it wrote none.
    """

    ids: Tensor
    weights: Tensor
    recorded: Recorded | None = None
    given: int | None = None

    def to(self, device: torch.device) -> TrainingText:
        """The same on a device; this one, if it is there."""
        if self.ids.device == device:
            return self
        recorded = self.recorded
        if recorded is not None:
            recorded = Recorded(recorded.ids.to(device), recorded.log_probs.to(device))
        return replace(
            self, ids=self.ids.to(device), weights=self.weights.to(device), recorded=recorded
        )

    @classmethod
    def plain(cls, ids: Tensor) -> TrainingText:
        """Text without answers, all of whose positions count alike."""
        return cls(ids, torch.ones(ids.shape))


@dataclass(frozen=True)
class TrainingSplit:
    """Two parts that share no sequence: one to train on, one to measure on."""

    fitting: TrainingText
    held_out: TrainingText


@dataclass(frozen=True)
class Emphasis:
    """What counts more than other text.

    Attributes:
        answer_weight: of a position that predicts a token of an answer; others have 1.
        tail_power: by which lines of rare slices are drawn earlier.
        recorded: answers alone count, and are learned from the record.
        reasoning: how reasoning is written before an answer; None leaves it out.
    """

    answer_weight: float = 1.0
    tail_power: float = 0.0
    recorded: bool = False
    reasoning: str | None = None


def training_split(
    student: Path,
    calibration: Calibration,
    chat: Chat,
    emphasis: Emphasis,
    *,
    held_out_tokens: int,
    behind_tokens: int = 0,
) -> TrainingSplit:
    """The calibration text of a student, some sequences of it held out.

    Args:
        student: a student directory.
        calibration: which text.
        chat: the fixed part of every conversation.
        emphasis: of some text over other.
        held_out_tokens: that are held out at most; never more than half of the text.
        behind_tokens: which an earlier stage was calibrated on: what is held out lies behind them,
            or as far behind as the text allows, and what is trained on behind that, if anything is
            left there.

    Raises:
        InputError: the file is unreadable or holds too little; it holds no answers where they are
            wanted; recorded probabilities sum to more than 1.
    """
    pieces = calibration_pieces(
        student,
        calibration,
        chat,
        tail_power=emphasis.tail_power,
        reasoning=emphasis.reasoning,
        hint="give the stage fewer `tokens` or more `passes`, or give more text",
    )
    where = str(calibration.file) if calibration.file else "the built-in texts"
    held_out = min(max(1, held_out_tokens // len(pieces[0].ids)), len(pieces) // 2)
    if held_out == 0:
        raise InputError(
            f"the text fills one sequence of {len(pieces[0].ids)} tokens, "
            "of which none can be held out",
            where=where,
            hint="give more text, or smaller calibration.sequence_tokens",
        )
    start = min(behind_tokens // len(pieces[0].ids), len(pieces) - held_out)
    stop = start + held_out
    fitting = pieces[stop:] or pieces[:start]
    return TrainingSplit(
        _text(fitting, emphasis, where), _text(pieces[start:stop], emphasis, where)
    )


def _text(pieces: Sequence[Piece], emphasis: Emphasis, where: str) -> TrainingText:
    ids = torch.tensor([piece.ids for piece in pieces])
    answers = torch.zeros(ids.shape, dtype=torch.bool)
    answers[:, :-1] = torch.tensor([piece.answers for piece in pieces])[:, 1:]
    if emphasis.recorded:
        weights = answers.float()
    else:
        weights = torch.where(answers, emphasis.answer_weight, 1.0)
    if (emphasis.recorded or emphasis.answer_weight != 1.0) and not answers.any():
        raise InputError(
            f"holds no answers in {len(ids)} sequences of {ids.shape[1]} tokens",
            where=where,
            hint="conversations that end with the assistant's message, or `prompt` and `answer`; "
            "more held_out_tokens, where they are few",
        )
    recorded = _recorded(pieces, ids, where) if emphasis.recorded else None
    return TrainingText(ids, weights * (ids.numel() / weights.sum()), recorded)


def _recorded(pieces: Sequence[Piece], ids: Tensor, where: str) -> Recorded:
    """What was recorded in the place of each next token; the token itself where nothing was."""
    sequences, tokens = ids.shape
    width = max((len(top[0]) for piece in pieces for top in piece.tops if top), default=1)
    named = np.zeros((sequences, tokens, width), dtype=np.int64)
    log_probs = np.full((sequences, tokens, width), -np.inf, dtype=np.float32)
    for sequence, piece in enumerate(pieces):
        for place in range(tokens - 1):
            top: Top = piece.tops[place + 1] or ((piece.ids[place + 1],), (0.0,))
            named[sequence, place] = top[0][0]  # of the places that stay empty
            named[sequence, place, : len(top[0])] = top[0]
            log_probs[sequence, place, : len(top[0])] = top[1]
    most = float(np.exp(log_probs).sum(-1).max())
    if most > MOST_MASS:
        raise InputError(f"top_log_probs of one place sum to a probability of {most}", where=where)
    return Recorded(torch.from_numpy(named), torch.from_numpy(log_probs))
