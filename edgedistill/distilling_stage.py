"""What every stage that distils has: a budget, a text, and when to measure and to stop."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from edgedistill.calibration import Calibration
from edgedistill.chat import Chat
from edgedistill.decoder import DecoderFacts
from edgedistill.stage import Stage, StageCost
from edgedistill.student import Student

if TYPE_CHECKING:
    from edgedistill.distill import DistillSettings
    from edgedistill.distill_loss import LossSettings
    from edgedistill.distill_state import DistillState
    from edgedistill.team import Team
    from edgedistill.training_text import Emphasis, TrainingSplit


class DistillingStage(Stage):
    """Trains the student that arrives; what is written are the weights of the least held-out KL.

    A run that is killed goes on from its last evaluation, to the same bytes.

    Attributes:
        tokens: the budget; text that is read again counts again.
        passes: how often the text is read: of a file so many tokens are taken that the budget
            is spent by then.
        temperature: of both softmaxes in the loss.
        learning_rate: at its peak; the default depends on what is trained.
        batch_tokens: for a step of the optimizer, in whole sequences.
        held_out_tokens: of the text, never trained on, that the KL is measured on.
        evaluations: how often that is done, evenly over the budget.
        patience: evaluations without a fall of the held-out KL that end the training.
        calibration: the text, and how it is cut into sequences; from the recipe where it is not
            stated.
        chat: likewise.
        device: what trains: the CPU, or the GPUs that torch finds.
        processes: that share each step's sequences, with a GPU each where ``device`` says so.  Each
            holds all weights.
    """

    tokens: Annotated[int, Field(ge=64)] = 65536
    passes: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    batch_tokens: Annotated[int, Field(ge=16)] = 2048
    held_out_tokens: Annotated[int, Field(ge=32)] = 4096
    evaluations: Annotated[int, Field(ge=1, le=1000)] = 10
    patience: Annotated[int, Field(ge=1)] = 3
    calibration: Calibration = Calibration()
    chat: Chat = Chat()
    device: Literal["cpu", "gpu"] = "cpu"
    processes: Annotated[int, Field(ge=1, le=1024)] = 1

    @property
    def keeps_work(self) -> bool:
        """A checkpoint for each evaluation."""
        return True

    def run_beside(self, src: Path, dst: Path, *, teacher: Path | None, work: Path | None) -> None:
        """Train, alone or in a team of processes, and write the student.

        Raises:
            InputError: there is no teacher; or text, teacher and student do not go together.
            StageError: the held-out KL did not fall.
            UnavailableError: there are fewer GPUs than processes.
        """
        from edgedistill.team_launch import run_in_team

        student = Student(src)
        self.refuse_misfit(student)
        train = partial(self.train, src=src, dst=dst, teacher=teacher, work=work)
        run_in_team(train, self.device, self.processes)

    @abstractmethod
    def train(
        self, team: Team, *, src: Path, dst: Path, teacher: Path | None, work: Path | None
    ) -> None:
        """The work of one process of the team; the first alone writes."""

    def too_many_processes(self) -> list[str]:
        """A step has to have a sequence for each."""
        batch = max(1, self.batch_tokens // self.calibration.sequence_tokens)
        if self.processes <= batch:
            return []
        return [
            f"processes: {self.processes} cannot share the {batch} sequences of a step: "
            f"batch_tokens has to be at least {self.processes * self.calibration.sequence_tokens}"
        ]

    def training_cost(
        self,
        facts: DecoderFacts,
        *,
        copies: int,
        teacher: bool,
        whole: bool,
        writing: StageCost | None = None,
    ) -> StageCost:
        """A live teacher's pass, the student there and back.

        Args:
            facts: of the student that arrives.
            copies: of all its weights in float32 that are held at once.
            teacher: whether there is one to ask.
            whole: whether whole matrices are given gradients, not only what flows through them.
            writing: before each step, of text to train on.
        """
        writing = writing or StageCost(0.0, 0)
        passes = 1.0 + teacher + (2.0 if whole else 1.0)
        measured = self.held_out_tokens * (self.evaluations + 2)
        head = 4 * facts.vocab_size * facts.hidden_size
        # Of each block what the backward pass needs: about 12 states and 4 of the FFN's width.
        kept = 4 * facts.layers * (12 * facts.hidden_size + 4 * facts.ffn_size)
        activations = kept * self.calibration.sequence_tokens
        # A text is written before there are activations.
        held = max(activations, writing.held_bytes)
        return StageCost(
            passes * self.tokens + measured + writing.forward_tokens,
            4 * copies * facts.parameters + held + 2 * head,
        )

    def training_text(
        self,
        student: Path,
        emphasis: Emphasis | None = None,
        file: Path | None = None,
        behind_tokens: int = 0,
    ) -> TrainingSplit:
        """What is trained and measured on.

        Args:
            student: whose tokenizer and chat template write it.
            emphasis: of some text over other.
            file: in the place of ``calibration.file``.
            behind_tokens: of the text, which an earlier stage was calibrated on.

        Raises:
            InputError: as :func:`edgedistill.training_text.training_split`.
        """
        from edgedistill.training_text import Emphasis, training_split

        length = self.calibration.sequence_tokens
        # Whole sequences, of both parts.
        read = -(-self.tokens // (self.passes * length)) * length
        update = {
            "tokens": behind_tokens + self.held_out_tokens + read,
            "file": file or self.calibration.file,
            # What is stated instead of the calibration text is all of it.
            "own_text": None if file else self.calibration.own_text,
        }
        return training_split(
            student,
            self.calibration.model_copy(update=update),
            self.chat,
            emphasis or Emphasis(),
            held_out_tokens=self.held_out_tokens,
            behind_tokens=behind_tokens,
        )

    def distill_settings(
        self, learning_rate: float, loss: LossSettings, on_policy: float = 0.0
    ) -> DistillSettings:
        """Of the training, at a peak learning rate."""
        from edgedistill.distill import DistillSettings

        return DistillSettings(
            tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            learning_rate=learning_rate,
            loss=loss,
            evaluations=self.evaluations,
            patience=self.patience,
            seed=self.calibration.seed,
            on_policy=on_policy,
        )

    def outcome(self, state: DistillState, text: TrainingSplit) -> dict[str, Any]:
        """What came of the training, as fields of :class:`edgedistill.healing_results.Training`."""
        return {
            "held_out_tokens": text.held_out.ids.numel(),
            "kl_before": state.curve[0].held_out_kl,
            "kl_after": state.best_kl,
            "kept_step": state.best_step,
            "stopped_early": state.stale >= self.patience,
            "curve": state.curve,
        }
