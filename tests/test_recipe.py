from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from edgedistill.plugins import plugin_names
from edgedistill.recipe import Recipe, json_schema
from edgedistill.stages.quantize_rtn import QuantizeRtn

FIELDS: dict[str, Any] = {
    "name": "demo",
    "student": "somewhere",
    "context_tokens": 64,
    "rungs": {"float": [], "int4": [{"quantize_rtn": {"bits": 4}}]},
    "export": ["gguf", "onnx"],
}


def test_the_minimal_recipe_has_defaults_for_all_else() -> None:
    recipe = Recipe.model_validate(FIELDS)
    assert recipe.stages == ()
    assert recipe.floor is None
    assert recipe.build.threads == 2
    assert recipe.evaluate.sample_of("onnx") == 500
    assert recipe.evaluate.sample_of("coreml") == 60
    assert isinstance(recipe.rungs["int4"][0].config, QuantizeRtn)


def test_export_makes_one_target_a_format_without_a_budget() -> None:
    recipe = Recipe.model_validate(FIELDS)
    assert {n: t.format for n, t in recipe.all_targets().items()} == {
        "gguf": "gguf",
        "onnx": "onnx",
    }
    assert recipe.formats_of("float") == ("gguf", "onnx")


def test_targets_say_which_rungs_go_where_each_format_once() -> None:
    targets = {
        "phone": {"format": "gguf", "rungs": ["int4"]},
        "tablet": {"format": "gguf"},
        "desk": {"format": "onnx", "rungs": ["float"]},
    }
    fields = {k: v for k, v in FIELDS.items() if k != "export"} | {"targets": targets}
    recipe = Recipe.model_validate(fields)
    assert recipe.formats_of("float") == ("gguf", "onnx")
    assert recipe.formats_of("int4") == ("gguf",)


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.model_validate(FIELDS)
    with pytest.raises(ValidationError):
        recipe.name = "other"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../elsewhere"},
        {"name": ""},
        {"rungs": {}},
        {"rungs": {"a/b": []}},
        {"export": []},
        {"export": None},
        {"targets": {"phone": {"format": "gguf"}}},
        {"targets": {"phone": {"format": "gguf", "device": "pixel8"}}, "export": None},
        {"context_tokens": 0},
        {"suite": {"a": 1}},
        {"texts": {"a b": "x.txt"}},
        {"evaluate": {"sample": {"gguf": 0}}},
        {"build": {"peak_ram_gb": float("inf")}},
    ],
)
def test_values_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(FIELDS | change)


def test_the_schema_knows_every_stage_and_all_their_keys() -> None:
    schema = json.loads(json.dumps(json_schema()))
    steps = schema["$defs"]["StageStep"]["properties"]
    assert set(steps) == set(plugin_names("stages"))
    name = steps["quantize_rtn"]["$ref"].rpartition("/")[2]
    fields = schema["$defs"][name]["properties"]
    assert set(fields) == set(QuantizeRtn.model_fields)
    assert fields["bits"]["enum"] == [2, 3, 4, 5, 8]
