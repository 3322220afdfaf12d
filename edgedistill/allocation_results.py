"""Who got which grid and why, as a document: ``allocation.json`` beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgedistill.document import Document

ALLOCATION_FILE = "allocation.json"


class StepUp(Document):
    """The grid that would have paid most for a matrix, of those larger than its own.

    Attributes:
        more_bytes: that it would have taken.
        gain: of predicted KL, in nats a token.
        gain_per_byte: the quotient; what others gained by these bytes is more.
    """

    grid: str
    more_bytes: int
    gain: float
    gain_per_byte: float


class AllocatedMatrix(Document):
    """A matrix and its grid.

    Attributes:
        stored_bytes: in the fullest of the rung's formats.
        loss: the rise of the mean KL by this matrix alone, in nats a token.
        basis: ``predicted`` to second order, or ``measured`` (embedding and head).
        step_up: what more bytes would have given; None where no grid is better.
    """

    tensor: str
    grid: str
    bits: int
    stored_bytes: int
    loss: float
    basis: Literal["predicted", "measured"]
    step_up: StepUp | None


class Allocation(Document):
    """How the bytes of a target were given out.

    Attributes:
        formats: whose fullest counts.
        target_bytes: of all tensors; from ``bits_per_weight`` or ``size_mb``.
        total_bytes: that the student takes, norms and biases among them; never more.
        weights: parameters, a tied matrix counted once.
        bits_per_weight: the total over the weights.
        loss: the sum over matrices: what it would be if losses simply added up.
        matrices: in the order of their use.
    """

    formats: list[str]
    target_bytes: int
    total_bytes: int
    weights: int
    bits_per_weight: float
    loss: float
    matrices: list[AllocatedMatrix]

    def write(self, directory: Path) -> None:
        """Write the document into a student directory."""
        text = self.model_dump_json(indent=2) + "\n"
        (directory / ALLOCATION_FILE).write_text(text, encoding="utf-8")
