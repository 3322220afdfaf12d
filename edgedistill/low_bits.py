"""What a recipe may do, and should know the price of: 2-bit weights that nothing recovers."""

from __future__ import annotations

from collections.abc import Iterator

from edgedistill.decoder import DecoderFacts
from edgedistill.recipe import Recipe, StageStep

# SmolLM2-135M off its grid, groups of 64, by docs/compression.md: 16.1 -> 31.4, and 59.6 -> 144.4.
PRICE = "by GPTQ alone the perplexity of SmolLM2-135M doubled on text like the calibration's"


def low_bit_warnings(recipe: Recipe, facts: DecoderFacts) -> Iterator[str]:
    """A sentence for each rung that puts weights on 2 bits with no ``recover`` behind.

    Args:
        recipe: checked.
        facts: of its student.
    """
    for rung, steps in recipe.rungs.items():
        plain, arriving = None, facts
        for step in [*recipe.stages, *steps]:
            if _puts_on_two_bits(step, arriving):
                plain = step.name
            elif step.config.recovers:
                plain = None
            arriving = step.config.facts_after(arriving)
        if plain is not None:
            yield (
                f"rungs.{rung}: {plain} puts weights on 2 bits and nothing recovers what that "
                f"loses: {PRICE}; `recover` behind it makes up for some of that "
                "(docs/compression.md), and a suite tells what is left"
            )


def _puts_on_two_bits(step: StageStep, facts: DecoderFacts) -> bool:
    """Whether it is likely to: a mixture may need no 2 bits for its target."""
    return any(
        grid.bits == 2 and share > 0
        for name in facts.matrices()
        for grid, share in step.config.expected_grids(name, facts).items()
    )
