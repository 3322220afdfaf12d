"""Recover what quantization lost, on the grids: the student learns to predict what it did before.

By a recovery adapter that is folded into the matrices on 8 bits, or on the scales alone, as
mlx-lm's DWQ and the end-to-end phase of EfficientQAT (arXiv 2407.11062) do;
:mod:`edgedistill.grid_learner` has what is trained, and how the result stays exact in every format.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from edgedistill.decoder import DecoderFacts
from edgedistill.distilling_stage import DistillingStage
from edgedistill.errors import InputError
from edgedistill.quantized import FOLDED_FROM_BITS, Grid
from edgedistill.stage import Stage, StageCost

if TYPE_CHECKING:
    from edgedistill.distill import DistillSettings
    from edgedistill.grid_learner import GridLearner
    from edgedistill.student import Student
    from edgedistill.team import Team
    from edgedistill.training_text import TrainingSplit

# Of an adapter's factors, and of factors on vectors and scales that start at 1.
LEARNING_RATES = {"adapter": 1e-3, "scales": 2e-3}


class Recover(DistillingStage, Stage):
    """Distil the reference's logits into a quantized student, behind the stage that quantized it.

    What had the least held-out KL is written, on the same grids, and ``recovery.json`` with the
    curve.  Embedding and head stay as they are.  A run that is killed
    goes on from its last evaluation, to the same bytes.

    Attributes:
        trained: ``adapter`` trains a low-rank product beside each matrix of the blocks that is on
            8 bits, and folds it in; ``scales`` the scales of all.  Norms are trained with either.
        rank: of the adapter's products.
    """

    trained: Literal["adapter", "scales"] = "adapter"
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    batch_tokens: Annotated[int, Field(ge=16)] = 1024

    @property
    def wants_teacher(self) -> bool:
        """The reference."""
        return True

    @property
    def recovers(self) -> bool:
        """What plain 2-bit weights need."""
        return True

    def cost(self, facts: DecoderFacts) -> StageCost:
        """As of every training: weights and, but for an adapter, their gradients."""
        whole = self.trained == "scales"
        return self.training_cost(facts, copies=3 if whole else 2, teacher=True, whole=whole)

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A float student."""
        if quantized:
            return self.too_many_processes()
        return ["the student is not quantized: put recover behind the stage that quantizes it"]

    def problems_on(self, grids: Collection[Grid]) -> list[str]:
        """No matrix that an adapter could be folded into."""
        if self.trained != "adapter" or any(grid.bits >= FOLDED_FROM_BITS for grid in grids):
            return []
        return [
            f"an adapter is folded into matrices on {FOLDED_FROM_BITS} bits, and there are none: "
            "quantize with `linears: {v: {bits: 8}, o: {bits: 8}}`, or state `trained: scales`"
        ]

    def run(self, src: Path, dst: Path) -> None:
        """Refuse: there is no teacher.

        Raises:
            InputError: always.
        """
        self.run_beside(src, dst, teacher=None, work=None)

    def train(
        self, team: Team, *, src: Path, dst: Path, teacher: Path | None, work: Path | None
    ) -> None:
        """Train, and write the student on the grids that it came on."""
        from edgedistill.distill import Distillation
        from edgedistill.healing_results import Recovery
        from edgedistill.kept_vocabulary import teacher_for
        from edgedistill.student import Student, StudentWriter

        if teacher is None:
            raise InputError("recover has no teacher", hint="run it as a step of a recipe's rung")
        student = Student(src)
        reference = teacher_for(src, teacher)
        text, learner = self.split_text(src), self.learner(student, team)
        run = Distillation(learner, reference, self.settings(), work, team)
        state = run.train(text.fitting, text.held_out)
        if not team.leads:
            return
        with StudentWriter(dst, student) as writer:
            for name, value in learner.written():
                writer.write(name, value)
        Recovery(
            trained=self.trained,
            parameters_trained=sum(tensor.numel() for tensor in learner.trained()),
            sequences=len(text.fitting.ids),
            codes=learner.codes(),
            codes_changed=learner.changed_codes(),
            **self.outcome(state, text),
        ).write(dst)

    def split_text(self, student: Path) -> TrainingSplit:
        """What is trained and measured on.

        Text that the quantizing stage was calibrated on, the first ``calibration.tokens`` of it,
        says nothing of what it lost on others: all that is read here lies behind.
        """
        return self.training_text(student, behind_tokens=self.calibration.tokens)

    def learner(self, student: Student, team: Team | None = None) -> GridLearner:
        """What is trained of a quantized student, on the team's device."""
        from edgedistill.grid_learner import GridLearner
        from edgedistill.team import ALONE

        return GridLearner(student, self.trained, self.rank, (team or ALONE).device)

    def settings(self) -> DistillSettings:
        """Of the training."""
        from edgedistill.distill_loss import LossSettings

        rate = self.learning_rate or LEARNING_RATES[self.trained]
        return self.distill_settings(rate, LossSettings(self.temperature))
