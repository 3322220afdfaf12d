"""Train a student to predict what its teacher predicts: the loop, its schedule and its checkpoints.

What the loss is, :mod:`edgedistill.distill_loss` says.  Logits of a few positions lie in memory at
once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from edgedistill.continuation import continued
from edgedistill.distill_loss import LossSettings, Target, teaching
from edgedistill.distill_state import DistillState
from edgedistill.errors import StageError
from edgedistill.healing_results import HealingPoint
from edgedistill.held_out import HEAD_POSITIONS, run_blocks
from edgedistill.learner import Learner
from edgedistill.on_policy import is_drawn
from edgedistill.progress import Bar, progress_bar
from edgedistill.student import Student
from edgedistill.team import ALONE, Team
from edgedistill.training_text import TrainingText

GRADIENT_NORM = 1.0  # larger ones are clipped
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class DistillSettings:
    """How long and how fast.

    Attributes:
        tokens: the budget; text is read again where it is shorter.
        batch_tokens: for one step of the optimizer, in whole sequences.
        learning_rate: at its peak; it warms up over 5% of the steps and falls as a cosine to 0.
        loss: how it is put together.
        evaluations: how often the held-out KL is taken, evenly over the budget.
        patience: evaluations without a fall of it that end the training.
        seed: of the order in which sequences are read, and of what the student writes.
        on_policy: share of the sequences that the student continues itself; it needs a teacher.
    """

    tokens: int
    batch_tokens: int = 2048
    learning_rate: float = 3e-4
    loss: LossSettings = field(default_factory=LossSettings)
    evaluations: int = 10
    patience: int = 3
    seed: int = 0
    on_policy: float = 0.0


class Distillation:
    """One training run.

    Args:
        student: its trained tensors are changed in place.
        teacher: with the same vocabulary; None learns what is recorded in the text.
        settings: of the run.
        work: where checkpoints are kept, one for each evaluation; a run that finds one goes on from
            it, to the same bytes.  None keeps none.
        team: that this process trains in; the student is on its device.
    """

    def __init__(
        self,
        student: Learner,
        teacher: Student | None,
        settings: DistillSettings,
        work: Path | None = None,
        team: Team = ALONE,
    ) -> None:
        self._student = student
        self._team = team
        self._teaching = teaching(teacher, settings.loss, team.device)
        self._settings = settings
        self._parameters = student.trained()
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self._work = work

    def train(self, text: TrainingText, held_out: TrainingText) -> DistillState:
        """Train, and leave the student with the weights of the least held-out KL.

        Args:
            text: to train on.
            held_out: to measure on.

        Raises:
            StageError: the held-out KL is no lower than before, or not a number.
        """
        text, held_out = text.to(self._team.device), held_out.to(self._team.device)
        length = text.ids.shape[1]
        batch = max(1, self._settings.batch_tokens // length)
        steps = max(1, self._settings.tokens // (batch * length))
        every = max(1, steps // self._settings.evaluations)
        if steps * batch > len(text.ids) and self._settings.on_policy < 1.0:
            self._teaching.remember(text)
        expected = self._teaching.targets(held_out, self._team.share(range(len(held_out.ids))))
        state = self._begin(held_out, expected)
        with progress_bar(steps, "distilling") as bar:
            bar.advance(state.step)
            while state.step < steps and state.stale < self._settings.patience:
                self._step(state, text, batch, steps, bar)
                if state.step % every == 0 or state.step == steps:
                    self._evaluate(state, length * batch, held_out, expected)
        return self._finish(state)

    def _begin(self, held_out: TrainingText, expected: list[Target]) -> DistillState:
        saved = DistillState.load(self._work, self._parameters, self._optimizer)
        if saved is not None:
            self._student.settle()
            return saved
        kl = self._held_out_kl(held_out, expected)
        if not math.isfinite(kl):
            raise StageError(f"the held-out KL is {kl} before any training")
        first = HealingPoint(step=0, tokens=0, learning_rate=0.0, loss=None, held_out_kl=kl)
        return DistillState([first])

    def _step(
        self, state: DistillState, text: TrainingText, batch: int, steps: int, bar: Bar
    ) -> None:
        """One step of the optimizer on the next ``batch`` sequences."""
        positions = batch * text.ids.shape[1]
        first = state.step * batch
        numbers = self._team.share(range(first, first + batch))
        losses = [
            self._backward(ids, target, positions) for ids, target in self._lessons(text, numbers)
        ]
        self._team.add_up(_gradient(leaf) for leaf in self._student.leaves())
        torch.nn.utils.clip_grad_norm_(self._parameters, GRADIENT_NORM)
        self._student.collect()
        rate = self._settings.learning_rate * _schedule(state.step, steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._student.settle()
        state.took(self._team.total(sum(losses)), rate)
        bar.advance()

    def _lessons(self, text: TrainingText, numbers: Sequence[int]) -> list[tuple[Tensor, Target]]:
        """The ids of some sequences in the order of reading, and what is to be predicted there.

        Some may go on as the student writes them: these no teacher was asked about before.
        """
        settings = self._settings
        rows = {number: _sequence(number, len(text.ids), settings.seed) for number in numbers}
        own = [number for number in numbers if is_drawn(number, settings.on_policy)]
        given = [number for number in numbers if number not in own]
        lessons: dict[int, tuple[Tensor, Target]] = {}
        if given:
            targets = self._teaching.targets(text, [rows[number] for number in given])
            ids = text.ids[[rows[number] for number in given]]
            lessons |= zip(given, zip(ids, targets, strict=True), strict=True)
        if own:
            written = continued(
                self._student, text, [rows[number] for number in own], own, settings.seed
            )
            targets = self._teaching.targets(written, range(len(own)))
            lessons |= zip(own, zip(written.ids, targets, strict=True), strict=True)
        return [lessons[number] for number in numbers]

    def _backward(self, ids: Tensor, target: Target, positions: int) -> float:
        """Add one sequence's share of the gradient; its share of the mean loss.

        The loss is taken a few positions at a time down to the last hidden states, whose gradient
        then goes through the blocks at once.
        """
        hidden = self._student.last_hidden(ids[None])
        leaf = hidden[0].detach().requires_grad_()
        total = 0.0
        for rows in _parts(len(ids)):
            loss = target.loss(rows, self._student.head(leaf[rows]), leaf[rows]) / positions
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        assert leaf.grad is not None  # every loss depends on it
        hidden.backward(leaf.grad[None])  # type: ignore[no-untyped-call]
        return total

    def _evaluate(
        self,
        state: DistillState,
        batch_tokens: int,
        held_out: TrainingText,
        expected: list[Target],
    ) -> None:
        kl = self._held_out_kl(held_out, expected)
        if not math.isfinite(kl):
            raise StageError(
                f"the held-out KL is {kl} after {state.step} steps",
                hint="lower its learning_rate",
            )
        state.measured(kl, state.step * batch_tokens, self._parameters)
        if self._team.leads:
            state.save(self._work, self._parameters, self._optimizer)

    @torch.no_grad()
    def _held_out_kl(self, held_out: TrainingText, expected: list[Target]) -> float:
        """The weighted mean over its positions."""
        student = self._student
        ids = held_out.ids[list(self._team.share(range(len(held_out.ids))))]
        hidden = run_blocks(student, range(student.facts.layers), student.embed(ids))
        total = 0.0
        for states, target in zip(hidden, expected, strict=True):
            for rows in _parts(len(states)):
                total += float(target.divergence(rows, student.head(states[rows])))
        return self._team.total(total) / float(held_out.weights.sum())

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


def _gradient(leaf: Tensor) -> Tensor:
    """Of a leaf; zeros where this process had no part in it."""
    if leaf.grad is None:
        leaf.grad = torch.zeros_like(leaf)
    return leaf.grad


def _parts(positions: int) -> Iterator[slice]:
    """Of a sequence, as many positions as may have their logits in memory."""
    for start in range(0, positions, HEAD_POSITIONS):
        yield slice(start, start + HEAD_POSITIONS)


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
