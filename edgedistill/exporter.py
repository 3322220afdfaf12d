"""What every exporter is: a student directory in, an artifact directory out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.quantized import Grid
from edgedistill.student import Student


class Exporter(ABC):
    """Writes one format; ``exporters/<name>.py`` holds one subclass.

    Attributes:
        extra: the pip extra that installs what it needs.
        runtime: the runtime, by file name in ``runtimes/``, that proves the artifact.
    """

    extra: ClassVar[str]
    runtime: ClassVar[str]

    @abstractmethod
    def holds(self, grid: Grid) -> bool:
        """Whether the format stores such codes, scales and zeros exactly."""

    def problems(self, facts: DecoderFacts) -> list[str]:
        """What of such a decoder the format cannot carry, known before any work."""
        return []

    def refuse_misfit(self, student: Student) -> None:
        """Hold the format against a student, as a recipe is before any work.

        Raises:
            InputError: ``problems`` finds something.
        """
        found = self.problems(student.facts)
        if found:
            raise InputError(
                "; ".join(found), where=str(student.path), hint="export it to another format"
            )

    @abstractmethod
    def stored_bytes(self, shape: tuple[int, ...], grid: Grid | None) -> int:
        """Bytes that a tensor of the student takes, without headers and alignment.

        Args:
            shape: of a matrix, or of a vector, which has no grid.
            grid: that ``holds``; None for a float tensor.
        """

    @abstractmethod
    def export(self, student: Student, dst: Path, *, context_tokens: int) -> None:
        """Write the artifact into the empty directory ``dst``, tensor by tensor.

        Quantized tensors keep their codes, scales and zeros; float matrices become float16 (ONNX:
        float32, which its CPU kernels want) and vectors float32 or float16 as the format needs.

        Args:
            student: float or quantized.
            dst: an empty directory.
            context_tokens: what the artifact claims.

        Raises:
            InputError: the student holds something that the format cannot carry.
        """

    @abstractmethod
    def weight_bytes(self, artifact: Path) -> int:
        """Bytes of all weight data in the artifact, the numerator of ``bits_per_weight``."""
