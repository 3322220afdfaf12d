"""Bytes to matrices: the grids of least predicted loss within a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgedistill.allocation_results import AllocatedMatrix, Allocation, StepUp
from edgedistill.decoder import DecoderFacts
from edgedistill.knapsack import choose
from edgedistill.mixed_bytes import MixedBytes
from edgedistill.quantized import Grid


@dataclass(frozen=True)
class Option:
    """A matrix on a grid: its bytes, and its predicted loss in nats a token."""

    grid: Grid
    stored_bytes: int
    loss: float


def allocate(
    sizes: MixedBytes, damage: Mapping[str, Mapping[Grid, float]], target_bytes: int
) -> dict[str, Grid]:
    """Matrix -> grid, for the least sum of losses whose bytes do not exceed the target.

    Args:
        sizes: of matrices on grids.
        damage: matrix -> grid -> predicted loss.
        target_bytes: of all tensors.

    Raises:
        ValueError: the target is below ``sizes.least``.
    """
    groups = dict.fromkeys(sizes.alike[name] for name in damage)
    options = {names: _together(names, sizes, damage) for names in groups}
    picked = choose(
        [np.array([o.stored_bytes for o in of], dtype=np.int64) for of in options.values()],
        [np.array([o.loss for o in of], dtype=np.float64) for of in options.values()],
        target_bytes - sizes.float_bytes,
    )
    chosen = zip(options.items(), picked, strict=True)
    found = {name: of[index].grid for (names, of), index in chosen for name in names}
    return {name: found[name] for name in damage}


def describe_allocation(
    facts: DecoderFacts,
    sizes: MixedBytes,
    damage: Mapping[str, Mapping[Grid, float]],
    grids: Mapping[str, Grid],
    target_bytes: int,
) -> Allocation:
    """The document of an allocation."""
    outer = (facts.embedding, facts.head)
    matrices = []
    for name in sizes.matrices:
        options = _options(name, sizes, damage[name])
        own = next(option for option in options if option.grid == grids[name])
        matrices.append(
            AllocatedMatrix(
                tensor=name,
                grid=str(own.grid),
                bits=own.grid.bits,
                stored_bytes=own.stored_bytes,
                loss=own.loss,
                basis="measured" if name in outer else "predicted",
                step_up=_step_up(own, options),
            )
        )
    total = sizes.float_bytes + sum(matrix.stored_bytes for matrix in matrices)
    return Allocation(
        formats=list(sizes.formats),
        target_bytes=target_bytes,
        total_bytes=total,
        weights=sizes.weights,
        bits_per_weight=8 * total / sizes.weights,
        loss=sum(matrix.loss for matrix in matrices),
        matrices=matrices,
    )


def _options(name: str, sizes: MixedBytes, losses: Mapping[Grid, float]) -> list[Option]:
    return [Option(grid, sizes.of(name, grid), loss) for grid, loss in losses.items()]


def _together(
    names: tuple[str, ...], sizes: MixedBytes, damage: Mapping[str, Mapping[Grid, float]]
) -> list[Option]:
    """Of matrices that lie on one grid, as of one."""
    each = [{o.grid: o for o in _options(name, sizes, damage[name])} for name in names]
    return [
        Option(
            grid,
            sum(options[grid].stored_bytes for options in each),
            sum(options[grid].loss for options in each),
        )
        for grid in each[0]
        if all(grid in options for options in each)
    ]


def _step_up(own: Option, options: list[Option]) -> StepUp | None:
    """The larger grid that gains most for each of its bytes."""
    steps = [
        StepUp(
            grid=str(option.grid),
            more_bytes=option.stored_bytes - own.stored_bytes,
            gain=own.loss - option.loss,
            gain_per_byte=(own.loss - option.loss) / (option.stored_bytes - own.stored_bytes),
        )
        for option in options
        if option.stored_bytes > own.stored_bytes and option.loss < own.loss
    ]
    return max(steps, key=lambda step: step.gain_per_byte, default=None)
