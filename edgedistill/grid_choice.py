"""Which grid each matrix goes on: the fields that every quantizing stage has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgedistill.decoder import DecoderFacts
from edgedistill.quantized import Bits, Grid, ZeroKind


class GridChoice(BaseModel):
    """A grid as a recipe states it; what is not given follows from the bits.

    Attributes:
        bits: 2, 3, 4, 5 or 8; 3 in Core ML alone, 5 in GGUF alone.
        group_size: weights that share a scale; default 32, and 64 for 2 bits.
        zero: ``integer`` (a zero point for each group; default for 4 bits) or ``fixed``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits
    group_size: Annotated[int, Field(ge=16, le=256, multiple_of=16)] | None = None
    zero: ZeroKind | None = None

    def grid(self) -> Grid:
        """The grid with its defaults filled in."""
        zero: ZeroKind = "integer" if self.bits == 4 else "fixed"
        return Grid(self.bits, self.group_size or (64 if self.bits == 2 else 32), self.zero or zero)


Linear = Literal["q", "k", "v", "o", "gate", "up", "down"]


class MatrixGrids(GridChoice):
    """Grids for all matrices of a student: its own fields are those of the linears.

    Attributes:
        linears: grids of some of the blocks' matrices by kind, in the place of its own: such as 8
            bits for the small `v` and `o`, which ``recover`` can then train.
        embeddings: grid of the token embedding (and of the head where they are tied); default: the
            linears' own, but never below 8 bits, because rows of rare tokens have no redundancy.
        head: grid of an untied head; default: the embeddings'.
    """

    linears: dict[Linear, GridChoice] = {}
    embeddings: GridChoice | None = None
    head: GridChoice | None = None

    def grid_of(self, name: str, facts: DecoderFacts) -> Grid:
        """The grid that the matrix ``name`` goes on."""
        embeddings = (self.embeddings or GridChoice(bits=8)).grid()
        if name == facts.embedding:
            return embeddings
        if name == facts.head:
            return self.head.grid() if self.head else embeddings
        for kind, choice in self.linears.items():
            if kind == facts.short_name(name):
                return choice.grid()
        return self.grid()

    def grids(self, facts: DecoderFacts) -> list[Grid]:
        """The distinct grids in use."""
        return list(dict.fromkeys(self.grid_of(name, facts) for name in facts.matrices()))

    def expected_grids(self, name: str, facts: DecoderFacts) -> dict[Grid, float]:
        """The one grid that the matrix ``name`` goes on."""
        return {self.grid_of(name, facts): 1.0}

    def problems(self, facts: DecoderFacts, quantized: bool) -> list[str]:
        """A student that is quantized already; rows that groups do not divide."""
        if quantized:
            return ["the student is quantized already: one stage a rung decides the integers"]
        problems = []
        if self.head and facts.tied_embeddings:
            problems.append("head: this student's head is its embedding; state `embeddings` alone")
        shapes = facts.tensor_shapes()
        # Blocks are alike: the first stands for all.
        for name in dict.fromkeys([facts.embedding, *facts.linears(0).values(), facts.head]):
            grid, columns = self.grid_of(name, facts), shapes[name][1]
            if columns % grid.group_size:
                problems.append(
                    f"group_size {grid.group_size} does not divide the {columns} columns of {name}"
                )
        problems += [
            f"zero: integer goes with 4 bits, not with {grid.bits}"
            for grid in self.grids(facts)
            if grid.zero == "integer" and grid.bits != 4
        ]
        return problems
