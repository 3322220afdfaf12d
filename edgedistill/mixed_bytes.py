"""What every matrix of a student would take on every grid, in the fullest of a rung's formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from edgedistill.decoder import DecoderFacts
from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.quantized import Grid

GRIDS = (
    Grid(2, 64),
    Grid(2, 32),
    Grid(3, 64),
    Grid(3, 32),
    Grid(4, 64),
    Grid(4, 32),
    Grid(4, 32, "integer"),
    Grid(5, 32),
    Grid(8, 32),
)


class MixedBytes:
    """Bytes by matrix and grid.

    A rung has the same weights in every format, but not the same bytes: the fullest one counts, a
    tensor at a time, so that a total within a target is within it in every format.

    Args:
        facts: of the student that is quantized.
        formats: that it is exported to; every format that there is where None.
    """

    def __init__(self, facts: DecoderFacts, formats: Sequence[str] | None) -> None:
        self.formats = tuple(formats or plugin_names("exporters"))
        self._exporters = [load_plugin("exporters", name)() for name in self.formats]
        self._facts, self._shapes = facts, facts.tensor_shapes()
        self.matrices = tuple(facts.matrices())
        self.weights = facts.parameters

    @cached_property
    def candidates(self) -> dict[str, tuple[Grid, ...]]:
        """Matrix -> the grids that all formats hold and whose groups divide its columns."""
        held = [grid for grid in GRIDS if all(e.holds(grid) for e in self._exporters)]
        return {
            name: tuple(g for g in held if self._shapes[name][1] % g.group_size == 0)
            for name in self.matrices
        }

    @cached_property
    def alike(self) -> dict[str, tuple[str, ...]]:
        """Matrix -> those that one of the formats wants on its grid too, itself among them."""
        found: dict[str, tuple[str, ...]] = {name: (name,) for name in self.matrices}
        for exporter in self._exporters:
            for together in exporter.alike(self._facts):
                found |= dict.fromkeys(together, together)
        return found

    @cached_property
    def float_bytes(self) -> int:
        """Of all norms and biases."""
        names = self._shapes.keys() - set(self.matrices)
        return sum(self._fullest(name, None) for name in names)

    def of(self, name: str, grid: Grid) -> int:
        """Of a matrix on a grid."""
        return self._fullest(name, grid)

    @property
    def least(self) -> int:
        """Of the student on the smallest grids."""
        return self.float_bytes + sum(min(of) for of in self._of_candidates())

    @property
    def most(self) -> int:
        """Of the student on the largest grids."""
        return self.float_bytes + sum(max(of) for of in self._of_candidates())

    def expected(self, name: str, target: int) -> dict[Grid, float]:
        """Share of a matrix that is likely to lie on which grid.

        As if all matrices were mixed alike, of the two grids whose totals are next to the target.
        """
        uniform = {}
        for grid in GRIDS:
            if all(grid in candidates for candidates in self.candidates.values()):
                total = sum(self.of(matrix, grid) for matrix in self.matrices)
                uniform[total + self.float_bytes] = grid
        below = max((total for total in uniform if total <= target), default=None)
        above = min((total for total in uniform if total > target), default=None)
        if below is None or above is None:
            nearest = above if below is None else below
            return {} if nearest is None else {uniform[nearest]: 1.0}
        share = (target - below) / (above - below)
        return {uniform[below]: 1 - share, uniform[above]: share}

    def _of_candidates(self) -> Iterator[list[int]]:
        """Bytes on every candidate, of every matrix."""
        for name, grids in self.candidates.items():
            yield [self.of(name, grid) for grid in grids]

    def _fullest(self, name: str, grid: Grid | None) -> int:
        return max(e.stored_bytes(self._shapes[name], grid) for e in self._exporters)
