"""What every compression stage is: a frozen typed config, directory in, directory out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgedistill.decoder import DecoderFacts
from edgedistill.quantized import Grid


class Stage(BaseModel, ABC):
    """One compression step of a recipe; ``stages/<name>.py`` holds one subclass.

    The fields are what a recipe may say of it.  A field of type ``Path`` names an input file or
    directory, relative to the recipe; its contents are part of the step's cache key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @abstractmethod
    def run(self, src: Path, dst: Path) -> None:
        """Read the student in ``src``, write the new student to the empty directory ``dst``.

        Raises:
            InputError: an input of the stage does not fit the student.
        """

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """What makes this stage impossible on such a student, known before any work.

        Args:
            facts: of the student that arrives.
            quantized: whether an earlier stage has quantized it.
        """
        return []

    def grids(self, facts: DecoderFacts) -> list[Grid]:
        """The grids that this stage puts weights on; empty when it does not quantize."""
        return []
