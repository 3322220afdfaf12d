"""What a student is to predict, and how far it is from it: by a live teacher, or by a record.

A live teacher gives logits over the full vocabulary (Hinton et al., arXiv 1503.02531).  A record
has the teacher's own words (Kim & Rush 2016, arXiv 1606.07947), or the likeliest tokens in the
place of each with their probabilities; all other tokens are then one bucket.  The teacher's words
alone are the case of one token with all of the probability.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.decoder_forward import CPU, DecoderForward, HeldForward
from edgedistill.held_out import Head, run_blocks
from edgedistill.student import Student
from edgedistill.training_text import TrainingText

KNOWN_BYTES = 512 * 1024 * 1024  # of a teacher's hidden states that are kept for another pass


@dataclass(frozen=True)
class LossSettings:
    """How the loss is put together.

    Attributes:
        temperature: of both softmaxes.
        next_token_weight: of the plain next-token loss that is added, where the next token is not
            the student's own.
        hidden_weight: of 1 - cosine between the last hidden states, which is added.
    """

    temperature: float = 1.0
    next_token_weight: float = 0.0
    hidden_weight: float = 0.0


class Target(ABC):
    """What is to be predicted along one sequence."""

    @abstractmethod
    def loss(self, rows: slice, logits: Tensor, hidden: Tensor) -> Tensor:
        """The weighted loss, summed over some positions.

        Args:
            rows: the positions.
            logits: of the student, [positions, vocab].
            hidden: what left its last block, [positions, hidden].
        """

    @abstractmethod
    def divergence(self, rows: slice, logits: Tensor) -> Tensor:
        """Weighted KL(teacher || student) at temperature 1 in nats, summed over some positions."""


class Teaching(ABC):
    """Where targets come from."""

    @abstractmethod
    def remember(self, text: TrainingText) -> None:
        """Be told that a text will be read more than once."""

    @abstractmethod
    def targets(self, text: TrainingText, rows: Sequence[int]) -> list[Target]:
        """Of some sequences, in that order."""


def teaching(
    teacher: Student | None, settings: LossSettings, device: torch.device = CPU
) -> Teaching:
    """By a live teacher on a device; None for what is recorded in the text."""
    return _Record() if teacher is None else _LiveTeacher(teacher, settings, device)


def soft_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of each position: [positions, vocab] twice -> [positions]."""
    own = (logits / temperature).log_softmax(-1)
    expected = (teacher_logits / temperature).log_softmax(-1)
    kl = functional.kl_div(own, expected, log_target=True, reduction="none").sum(-1)
    return kl * temperature**2


def bucket_loss(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL between distributions over k tokens and one bucket for all others: -> [positions].

    Args:
        logits: [positions, vocab].
        ids: int64 [positions, k], k < vocab; repeated where ``log_probs`` is -inf.
        log_probs: [positions, k] of the teacher.
    """
    total = logits.logsumexp(-1)
    named = logits.gather(-1, ids) - total[:, None]
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total
    shares = log_probs.exp()
    gaps = torch.where(shares > 0, log_probs - named, 0.0)
    left = (1.0 - shares.sum(-1)).clamp(min=0.0)
    # x log x is 0 at 0.
    loss: Tensor = (shares * gaps).sum(-1) + torch.special.xlogy(left, left) - left * others
    return loss


class _LiveTeacher(Teaching):
    """Streams its blocks, a GPU holds them; logits of a few positions lie in memory at once."""

    def __init__(self, teacher: Student, settings: LossSettings, device: torch.device) -> None:
        forward = DecoderForward if device == CPU else HeldForward
        self._decoder = forward(teacher, device)
        self._head = Head(teacher, device=device)
        self._settings = settings
        self._known: tuple[TrainingText, Tensor] | None = None  # a text, and its hidden states

    def remember(self, text: TrainingText) -> None:
        """Ask the teacher about all of it now, where the answers find room."""
        if 4 * text.ids.numel() * self._decoder.facts.hidden_size <= KNOWN_BYTES:
            self._known = text, self._hidden(text.ids)

    def targets(self, text: TrainingText, rows: Sequence[int]) -> list[Target]:
        """One pass of the teacher over all of them, where it was not asked before."""
        if self._known is not None and self._known[0] is text:
            hidden = self._known[1][list(rows)]
        else:
            hidden = self._hidden(text.ids[list(rows)])
        return [
            _TeacherTarget(self._head, states, text, row, self._settings)
            for states, row in zip(hidden, rows, strict=True)
        ]

    @torch.no_grad()
    def _hidden(self, ids: Tensor) -> Tensor:
        """What leaves its last block: [sequences, tokens, hidden]."""
        layers = range(self._decoder.facts.layers)
        return run_blocks(self._decoder, layers, self._decoder.embed(ids))


class _TeacherTarget(Target):
    def __init__(
        self, head: Head, hidden: Tensor, text: TrainingText, row: int, settings: LossSettings
    ) -> None:
        self._head = head
        self._hidden = hidden
        self._weights = text.weights[row]
        ids = text.ids[row]
        self._next = torch.cat([ids[1:], ids[:1]])  # the last position has none
        given = len(ids) if text.given is None else text.given
        self._has_next = torch.arange(len(ids), device=ids.device) < given - 1
        self._settings = settings

    def loss(self, rows: slice, logits: Tensor, hidden: Tensor) -> Tensor:
        settings = self._settings
        with torch.no_grad():
            expected = self._head.logits(self._hidden[rows])
        loss = soft_loss(logits, expected, settings.temperature)
        if settings.next_token_weight:
            plain = functional.cross_entropy(logits, self._next[rows], reduction="none")
            loss = loss + settings.next_token_weight * plain * self._has_next[rows]
        if settings.hidden_weight:
            apart = 1.0 - functional.cosine_similarity(hidden, self._hidden[rows], dim=-1)
            loss = loss + settings.hidden_weight * apart
        return (loss * self._weights[rows]).sum()

    def divergence(self, rows: slice, logits: Tensor) -> Tensor:
        expected = self._head.logits(self._hidden[rows])
        return (soft_loss(logits, expected, 1.0) * self._weights[rows]).sum()


class _Record(Teaching):
    def remember(self, text: TrainingText) -> None:
        """The text has it."""

    def targets(self, text: TrainingText, rows: Sequence[int]) -> list[Target]:
        return [_RecordTarget(text, row) for row in rows]


class _RecordTarget(Target):
    def __init__(self, text: TrainingText, row: int) -> None:
        assert text.recorded is not None
        self._ids = text.recorded.ids[row]
        self._log_probs = text.recorded.log_probs[row]
        self._weights = text.weights[row]

    def loss(self, rows: slice, logits: Tensor, hidden: Tensor) -> Tensor:
        return self.divergence(rows, logits)

    def divergence(self, rows: slice, logits: Tensor) -> Tensor:
        kl = bucket_loss(logits, self._ids[rows], self._log_probs[rows])
        return (kl * self._weights[rows]).sum()
