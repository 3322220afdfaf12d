"""Every recipe in recipes/ is in order: people copy them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.recipe_load import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(p for p in FOLDER.glob("*.yaml") if not p.stem.endswith(".waivers"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_and_all_that_it_names_is_in_order(recipe: Path) -> None:
    assert load_recipe(recipe).recipe.name == recipe.stem


def test_there_are_recipes() -> None:
    assert RECIPES
