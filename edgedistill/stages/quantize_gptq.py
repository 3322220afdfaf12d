"""Rounding that knows what the student computes with: GPTQ on calibration text.

The same grids as ``quantize_rtn``, so whatever carries the one carries the other;
docs/compression.md has the method and its figures.
"""

from __future__ import annotations

from pathlib import Path

from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.decoder import DecoderFacts
from edgedistill.gptq_cost import gptq_cost
from edgedistill.grid_choice import MatrixGrids
from edgedistill.quantized import Grid
from edgedistill.stage import Stage, StageCost
from edgedistill.student import Student


class QuantizeGptq(MatrixGrids, Stage):
    """Put every matrix on a grid; those of the blocks by GPTQ, embedding and head by rounding.

    Attributes:
        calibration: the text that it runs the student on; default: the recipe's.
        chat: the fixed part of the conversations that the text is put into; default: the recipe's.
    """

    calibration: Calibration = Calibration()
    chat: Chat = Chat()

    @property
    def keeps_work(self) -> bool:
        """The finished blocks, and the hidden states that enter the next."""
        return True

    def run(self, src: Path, dst: Path) -> None:
        """Quantize all matrices of ``src``; norms and biases are carried as they are."""
        self.run_beside(src, dst, teacher=None, work=None)

    def run_beside(self, src: Path, dst: Path, *, teacher: Path | None, work: Path | None) -> None:
        """As :meth:`run`, from where a killed run was."""
        from edgedistill.gptq_student import quantize_student

        ids = calibration_ids(src, self.calibration, self.chat)
        student = Student(src)
        facts = student.facts

        def grid_of(name: str) -> Grid:
            return self.grid_of(name, facts)

        label = f"GPTQ to {self.bits} bits"
        quantize_student(student, dst, ids, grid_of, label=label, work=work)

    def cost(self, facts: DecoderFacts) -> StageCost:
        """The student as it was and the calibrated one, each half of a block run again."""
        return gptq_cost(facts, self.calibration.tokens)
