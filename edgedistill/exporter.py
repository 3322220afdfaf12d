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

    def context_limit(self, facts: DecoderFacts) -> tuple[int, str]:
        """(the most tokens that an artifact can claim, in words what ends it).

        Up to there it computes what the student does, whatever the length of a text.
        """
        limits = [(facts.max_context_tokens, f"the model's own {facts.max_context_tokens}")]
        short = facts.rope.short_text_tokens
        if short is not None:
            limits.append((short, f"the {short} tokens that LongRoPE's short factors are for"))
        return min(limits)

    def alike(self, facts: DecoderFacts) -> list[tuple[str, ...]]:
        """Matrices of all blocks that have to lie on one grid, where some have to."""
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

    def refuse_context(self, student: Student, context_tokens: int) -> None:
        """Hold what an artifact is to claim against ``context_limit``.

        Raises:
            InputError: it is more.
        """
        most, words = self.context_limit(student.facts)
        if context_tokens > most:
            raise InputError(
                f"context_tokens {context_tokens} is more than {words}",
                where=str(student.path / "config.json"),
                hint=f"the most that it can be is {most}",
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
