"""Rounding that knows what the student computes with: GPTQ on calibration text.

The same grids as ``quantize_rtn``, so whatever carries the one carries the other;
docs/compression.md has the method and its figures.
"""

from __future__ import annotations

from pathlib import Path

from edgedistill.calibration import Calibration, calibration_ids
from edgedistill.chat import Chat
from edgedistill.grid_choice import MatrixGrids
from edgedistill.stage import Stage
from edgedistill.student import Student


class QuantizeGptq(MatrixGrids, Stage):
    """Put every matrix on a grid; those of the blocks by GPTQ, embedding and head by rounding.

    Attributes:
        calibration: the text that it runs the student on; default: the recipe's.
        chat: the fixed part of the conversations that the text is put into; default: the recipe's.
    """

    calibration: Calibration = Calibration()
    chat: Chat = Chat()

    def run(self, src: Path, dst: Path) -> None:
        """Quantize all matrices of ``src``; norms and biases are carried as they are."""
        from edgedistill.gptq_student import quantize_student

        ids = calibration_ids(src, self.calibration, self.chat)
        quantize_student(Student(src), dst, ids, self)
