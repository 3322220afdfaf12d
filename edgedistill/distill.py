"""Train a student to predict what its teacher predicts: KL between logits over the full vocabulary.

Hinton et al., arXiv 1503.02531: both are softened by a temperature T, and the loss is multiplied by
T^2, so that its gradient keeps its size.  The teacher is streamed a block at a time; logits
of a few positions lie in memory at once, for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.decoder_forward import DecoderForward
from edgedistill.distill_state import DistillState
from edgedistill.errors import StageError
from edgedistill.healing_results import HealingPoint
from edgedistill.held_out import HEAD_POSITIONS, Head, mean_kl, run_blocks
from edgedistill.learner import Learner
from edgedistill.progress import Bar, progress_bar
from edgedistill.student import Student

GRADIENT_NORM = 1.0  # larger ones are clipped
WARMUP_SHARE = 0.05
NO_TARGET = -100
KNOWN_BYTES = 512 * 1024 * 1024  # of a teacher's hidden states that are kept for another pass


@dataclass(frozen=True)
class DistillSettings:
    """How long and how fast.

    Attributes:
        tokens: the budget; text is read again where it is shorter.
        batch_tokens: for one step of the optimizer, in whole sequences.
        learning_rate: at its peak; it warms up over 5% of the steps and falls as a cosine to 0.
        temperature: of both softmaxes in the loss.
        next_token_weight: of the plain next-token loss that is added.
        evaluations: how often the held-out KL is taken, evenly over the budget.
        patience: evaluations without a fall of it that end the training.
        seed: of the order in which sequences are read.
    """

    tokens: int
    batch_tokens: int = 2048
    learning_rate: float = 3e-4
    temperature: float = 1.0
    next_token_weight: float = 0.0
    evaluations: int = 10
    patience: int = 3
    seed: int = 0


def soft_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), summed over positions: [positions, vocab] twice -> scalar."""
    own = (logits / temperature).log_softmax(-1)
    expected = (teacher_logits / temperature).log_softmax(-1)
    return functional.kl_div(own, expected, log_target=True, reduction="sum") * temperature**2


class Distillation:
    """One training run.

    Args:
        student: its trained tensors are changed in place.
        teacher: with the same vocabulary.
        settings: of the run.
        work: where checkpoints are kept, one for each evaluation; a run that finds one goes on from
            it, to the same bytes.  None keeps none.
    """

    def __init__(
        self,
        student: Learner,
        teacher: Student,
        settings: DistillSettings,
        work: Path | None = None,
    ) -> None:
        self._student = student
        self._teacher = DecoderForward(teacher)
        self._teacher_head = Head(teacher)
        self._settings = settings
        self._parameters = student.trained()
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [parameter], "share": pace.rate, "eps": pace.damping}
                for parameter, pace in zip(self._parameters, student.paces(), strict=True)
            ],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self._work = work
        # Last hidden states of the teacher on the text, where it is read more than once.
        self._known: Tensor | None = None

    def train(self, ids: Tensor, held_out: Tensor) -> DistillState:
        """Train, and leave the student with the weights of the least held-out KL.

        Args:
            ids: int64 [sequences, tokens] to train on.
            held_out: int64 [sequences, tokens] to measure on.

        Raises:
            StageError: the held-out KL is no lower than before, or not a number.
        """
        batch = max(1, self._settings.batch_tokens // ids.shape[1])
        steps = max(1, self._settings.tokens // (batch * ids.shape[1]))
        every = max(1, steps // self._settings.evaluations)
        with torch.no_grad():
            expected = self._teacher_hidden(held_out)
            known_bytes = 4 * ids.numel() * self._teacher.facts.hidden_size
            if steps * batch > len(ids) and known_bytes <= KNOWN_BYTES:
                self._known = self._teacher_hidden(ids)
        state = self._begin(held_out, expected)
        with progress_bar(steps, "distilling") as bar:
            bar.advance(state.step)
            while state.step < steps and state.stale < self._settings.patience:
                self._step(state, ids, batch, steps, bar)
                if state.step % every == 0 or state.step == steps:
                    self._evaluate(state, ids.shape[1] * batch, held_out, expected)
        return self._finish(state)

    def _begin(self, held_out: Tensor, expected: Tensor) -> DistillState:
        saved = DistillState.load(self._work, self._parameters, self._optimizer)
        if saved is not None:
            self._student.settle()
            return saved
        kl = self._held_out_kl(held_out, expected)
        if not math.isfinite(kl):
            raise StageError(f"the held-out KL is {kl} before any training")
        first = HealingPoint(step=0, tokens=0, learning_rate=0.0, loss=None, held_out_kl=kl)
        return DistillState([first])

    def _step(self, state: DistillState, ids: Tensor, batch: int, steps: int, bar: Bar) -> None:
        """One step of the optimizer on the next ``batch`` sequences."""
        rows = [
            _sequence(state.step * batch + i, len(ids), self._settings.seed) for i in range(batch)
        ]
        with torch.no_grad():
            expected = self._teacher_hidden(ids[rows]) if self._known is None else self._known[rows]
        positions = batch * ids.shape[1]
        losses = [
            self._backward(ids[row], expected[number], positions) for number, row in enumerate(rows)
        ]
        torch.nn.utils.clip_grad_norm_(self._parameters, GRADIENT_NORM)
        self._student.collect()
        rate = self._settings.learning_rate * _schedule(state.step, steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._student.settle()
        state.took(sum(losses), rate)
        bar.advance()

    def _backward(self, ids: Tensor, expected: Tensor, positions: int) -> float:
        """Add one sequence's share of the gradient; its share of the mean loss.

        The loss is taken a few positions at a time down to the last hidden states, whose gradient
        then goes through the blocks at once.
        """
        hidden = self._student.last_hidden(ids[None])
        leaf = hidden[0].detach().requires_grad_()
        targets = torch.cat([ids[1:], torch.tensor([NO_TARGET])])
        total = 0.0
        for start in range(0, len(ids), HEAD_POSITIONS):
            rows = slice(start, start + HEAD_POSITIONS)
            logits = self._student.head(leaf[rows])
            with torch.no_grad():
                teacher_logits = self._teacher_head.logits(expected[rows])
            loss = soft_loss(logits, teacher_logits, self._settings.temperature)
            if self._settings.next_token_weight:
                plain = functional.cross_entropy(
                    logits, targets[rows], ignore_index=NO_TARGET, reduction="sum"
                )
                loss = loss + self._settings.next_token_weight * plain
            loss = loss / positions
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        assert leaf.grad is not None  # every loss depends on it
        hidden.backward(leaf.grad[None])  # type: ignore[no-untyped-call]
        return total

    def _teacher_hidden(self, ids: Tensor) -> Tensor:
        return run_blocks(
            self._teacher, range(self._teacher.facts.layers), self._teacher.embed(ids)
        )

    def _evaluate(
        self, state: DistillState, batch_tokens: int, held_out: Tensor, expected: Tensor
    ) -> None:
        kl = self._held_out_kl(held_out, expected)
        if not math.isfinite(kl):
            raise StageError(
                f"the held-out KL is {kl} after {state.step} steps",
                hint="lower its learning_rate",
            )
        state.measured(kl, state.step * batch_tokens, self._parameters)
        state.save(self._work, self._parameters, self._optimizer)

    def _held_out_kl(self, held_out: Tensor, expected: Tensor) -> float:
        student = self._student
        with torch.no_grad():
            hidden = run_blocks(student, range(student.facts.layers), student.embed(held_out))
            return mean_kl(
                self._teacher_head.log_probs,
                expected,
                lambda states: student.head(states).log_softmax(-1),
                hidden,
            )

    def _finish(self, state: DistillState) -> DistillState:
        if state.best is None:
            raise StageError(
                f"training did not lower the held-out KL of {state.curve[0].held_out_kl:.4g}: "
                f"at best it was {min(p.held_out_kl for p in state.curve[1:]):.4g}",
                hint="lower its learning_rate, or give it more tokens",
            )
        with torch.no_grad():
            for parameter, best in zip(self._parameters, state.best, strict=True):
                parameter.copy_(best)
        self._student.settle()
        return state


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a line up, then a cosine down that ends above 0."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def _sequence(number: int, sequences: int, seed: int) -> int:
    """Which sequence is read as the ``number``-th; each pass has an order of its own."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number // sequences)
    order = torch.randperm(sequences, generator=generator)
    return int(order[number % sequences])
