"""What a recipe may do, and should know the price of: 2-bit weights that nothing recovers."""

from __future__ import annotations

from collections.abc import Iterator

from edgedistill.decoder import DecoderFacts
from edgedistill.recipe import Recipe

# SmolLM2-135M, group 64, technical text: 28.4 as float, 230 by sequential GPTQ.
PRICE = "by GPTQ alone the perplexity of SmolLM2-135M rose to 8 times its own"


def low_bit_warnings(recipe: Recipe, facts: DecoderFacts) -> Iterator[str]:
    """A sentence for each rung that puts weights on 2 bits with no ``recover`` behind.

    Args:
        recipe: checked.
        facts: of its student.
    """
    for rung, steps in recipe.rungs.items():
        plain = None
        for step in [*recipe.stages, *steps]:
            if any(grid.bits == 2 for grid in step.config.grids(facts)):
                plain = step.name
            elif step.config.recovers:
                plain = None
        if plain is not None:
            yield (
                f"rungs.{rung}: {plain} puts weights on 2 bits and nothing recovers what that "
                f"loses: {PRICE}; put `recover` behind it"
            )
