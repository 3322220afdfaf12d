"""What every compression stage is: a frozen typed config, directory in, directory out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgedistill.decoder import DecoderFacts
from edgedistill.errors import InputError
from edgedistill.quantized import Grid
from edgedistill.student import Student


@dataclass(frozen=True)
class StageCost:
    """What a stage that runs the student takes, by arithmetic.

    Attributes:
        forward_tokens: that go through the whole student once; a backward pass counts as two.
        held_bytes: of weights, states and logits, the most at once.
    """

    forward_tokens: float
    held_bytes: int


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

    @property
    def wants_teacher(self) -> bool:
        """Whether the stage is to be run with the reference beside the student, as its teacher."""
        return False

    @property
    def keeps_work(self) -> bool:
        """Whether a run that was killed goes on from what it left in a directory of its own."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether the stage takes parts out of the student."""
        return False

    @property
    def needs_text(self) -> bool:
        """Whether the built-in texts will not do, where there is no ``calibration.file``."""
        return False

    @property
    def changes_vocabulary(self) -> bool:
        """Whether the student that is written has token ids of its own, and a map of them."""
        return False

    @property
    def recovers(self) -> bool:
        """Whether the stage makes up for what few bits lose, so that they need no warning."""
        return False

    def run_beside(self, src: Path, dst: Path, *, teacher: Path | None, work: Path | None) -> None:
        """As :meth:`run`, with what the stage wants.

        Args:
            src: the student that arrives.
            dst: an empty directory.
            teacher: the directory of the reference, where ``wants_teacher``.
            work: a directory that outlives a killed run, where ``keeps_work``.
        """
        self.run(src, dst)

    def facts_after(self, facts: DecoderFacts) -> DecoderFacts:
        """The facts of the student that the stage writes, known before any work.

        Args:
            facts: of the student that arrives.  Where ``problems`` finds something wrong with
                them the answer means nothing, but there is one.
        """
        return facts

    def cost(self, facts: DecoderFacts) -> StageCost | None:
        """What a run will take; None for a stage that goes tensor by tensor.

        Args:
            facts: of the student that arrives.
        """
        return None

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """What makes this stage impossible on such a student, known before any work.

        Args:
            facts: of the student that arrives.
            quantized: whether an earlier stage has quantized it.
        """
        return []

    def problems_on(self, grids: Collection[Grid]) -> list[str]:
        """What makes it impossible behind a stage that puts the blocks' matrices on ``grids``."""
        return []

    def refuse_misfit(self, student: Student) -> None:
        """Hold the stage against the student that it is run on, as a recipe is before any work.

        Raises:
            InputError: ``problems`` finds something.
        """
        found = self.problems(student.facts, student.is_quantized)
        if found:
            raise InputError("; ".join(found), where=str(student.path))

    def grids(self, facts: DecoderFacts) -> list[Grid]:
        """The grids that this stage puts weights on; empty when it does not quantize."""
        return []

    def expected_grids(self, name: str, facts: DecoderFacts) -> dict[Grid, float]:
        """What share of a matrix is likely to lie on which grid, known before any work.

        Args:
            name: of its tensor.
            facts: of the student that the stage writes.

        Returns:
            Grid -> share, of sum 1; empty when the stage does not quantize.
        """
        return {}

    @property
    def formats_read(self) -> tuple[str, ...]:
        """Formats whose layouts decide what the stage does: their code is part of its key."""
        return ()
