"""How a rung was made smaller: what its stages wrote down beside the weights, gathered."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from edgedistill.allocation_results import ALLOCATION_FILE, Allocation
from edgedistill.document import Document
from edgedistill.healing_results import HEALING_FILE, RECOVERY_FILE, Healing, Recovery
from edgedistill.pruning_results import PRUNING_FILE, Pruning

Result = TypeVar("Result", bound=Document)


class RungReport(Document):
    """What was done to one rung, each in the order of its stages."""

    rung: str
    prunings: list[Pruning] = Field(default=[])
    healings: list[Healing] = Field(default=[])
    allocations: list[Allocation] = Field(default=[])
    recoveries: list[Recovery] = Field(default=[])

    @property
    def says_something(self) -> bool:
        """Whether any stage wrote anything down."""
        return bool(self.prunings or self.healings or self.allocations or self.recoveries)


def read_rung(rung: str, students: Iterable[Path]) -> RungReport:
    """Gather the documents.

    Args:
        rung: its name.
        students: the directories that its stages wrote, the first one first.
    """
    directories = list(students)
    return RungReport(
        rung=rung,
        prunings=_read(directories, PRUNING_FILE, Pruning),
        healings=_read(directories, HEALING_FILE, Healing),
        allocations=_read(directories, ALLOCATION_FILE, Allocation),
        recoveries=_read(directories, RECOVERY_FILE, Recovery),
    )


def _read(directories: Iterable[Path], name: str, kind: type[Result]) -> list[Result]:
    files = (directory / name for directory in directories)
    return [kind.model_validate_json(file.read_bytes()) for file in files if file.exists()]
