"""How a healing or a recovery went, as a document beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgedistill.document import Document

HEALING_FILE = "healing.json"
RECOVERY_FILE = "recovery.json"


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


class Training(Document):
    """What came of a training.

    Attributes:
        parameters_trained: how many numbers the optimizer moved.
        kept_step: whose weights were written: those of the least held-out KL.
        stopped_early: the held-out KL had ceased to fall before the budget was spent.
    """

    parameters_trained: int
    held_out_tokens: int
    kl_before: float
    kl_after: float
    kept_step: int
    stopped_early: bool
    curve: list[HealingPoint]


class Healing(Training):
    """``healing.json``: what ``heal`` did to a float student."""

    trained: Literal["full", "lora", "norms"]

    def write(self, directory: Path) -> None:
        """Write the document into a student directory."""
        _write(self, directory / HEALING_FILE)


class Recovery(Training):
    """``recovery.json``: what ``recover`` did to a quantized one.

    Attributes:
        sequences: of the text that it was trained on, each read as often as the budget allows.
        codes: of the matrices that were trained.
        codes_changed: how many of them are others than before.
    """

    trained: Literal["adapter", "scales"]
    sequences: int
    codes: int
    codes_changed: int

    def write(self, directory: Path) -> None:
        """Write the document into a student directory."""
        _write(self, directory / RECOVERY_FILE)


def _write(document: Document, file: Path) -> None:
    file.write_text(document.model_dump_json(indent=2) + "\n", encoding="utf-8")
