"""How a healing went, as a document: ``healing.json`` beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgedistill.document import Document

HEALING_FILE = "healing.json"


class HealingPoint(Document):
    """A point of the curve.

    Attributes:
        step: of the optimizer; 0 is before the first.
        tokens: trained on so far, a token counted as often as it was seen.
        learning_rate: of the last step.
        loss: mean training loss a token since the point before, in nats; None at step 0.
        held_out_kl: mean KL to the teacher on held-out text, in nats, at temperature 1.
    """

    step: int
    tokens: int
    learning_rate: float
    loss: float | None
    held_out_kl: float


class Healing(Document):
    """What was trained, and what came of it.

    Attributes:
        parameters_trained: how many numbers the optimizer moved.
        kept_step: whose weights were written: those of the least held-out KL.
        stopped_early: the held-out KL had ceased to fall before the budget was spent.
    """

    trained: Literal["full", "lora", "norms"]
    parameters_trained: int
    held_out_tokens: int
    kl_before: float
    kl_after: float
    kept_step: int
    stopped_early: bool
    curve: list[HealingPoint]

    def write(self, directory: Path) -> None:
        """Write the document into a student directory."""
        text = self.model_dump_json(indent=2) + "\n"
        (directory / HEALING_FILE).write_text(text, encoding="utf-8")
