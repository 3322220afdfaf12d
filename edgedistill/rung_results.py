"""How a rung was made smaller: what its stages wrote down beside the weights, gathered."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from edgedistill.allocation_results import ALLOCATION_FILE, Allocation
from edgedistill.document import Document
from edgedistill.healing_results import HEALING_FILE, Healing
from edgedistill.pruning_results import PRUNING_FILE, Pruning


class RungReport(Document):
    """What was done to one rung, each in the order of its stages."""

    rung: str
    prunings: list[Pruning] = Field(default=[])
    healings: list[Healing] = Field(default=[])
    allocations: list[Allocation] = Field(default=[])

    @property
    def says_something(self) -> bool:
        """Whether any stage wrote anything down."""
        return bool(self.prunings or self.healings or self.allocations)


def read_rung(rung: str, students: Iterable[Path]) -> RungReport:
    """Gather the documents.

    Args:
        rung: its name.
        students: the directories that its stages wrote, the first one first.
    """
    prunings, healings, allocations = [], [], []
    for student in students:
        if (file := student / PRUNING_FILE).exists():
            prunings.append(Pruning.model_validate_json(file.read_bytes()))
        if (file := student / HEALING_FILE).exists():
            healings.append(Healing.model_validate_json(file.read_bytes()))
        if (file := student / ALLOCATION_FILE).exists():
            allocations.append(Allocation.model_validate_json(file.read_bytes()))
    return RungReport(rung=rung, prunings=prunings, healings=healings, allocations=allocations)
