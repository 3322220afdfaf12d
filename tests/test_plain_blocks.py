"""A student that a format cannot carry is refused by name, before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import InputError, RecipeError
from edgedistill.plain_blocks import beyond_plain_blocks
from edgedistill.plugins import load_plugin
from edgedistill.recipe_load import load_recipe
from edgedistill.student import Student, read_json, write_json
from tests.recipes import MINIMAL, write_recipe
from tests.tiny import PLAIN_FAMILIES

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_plain_families_are_held_by_every_format(tiny: Tiny, family: str) -> None:
    facts = Student(tiny(family)).facts
    assert beyond_plain_blocks(facts) == []
    for name in ("gguf", "onnx", "coreml"):
        assert load_plugin("exporters", name)().problems(facts) == []


def test_a_recipe_is_told_which_formats_cannot_carry_the_student(
    tiny: Tiny, tmp_path: Path
) -> None:
    listed = MINIMAL.replace("[gguf]", "[gguf, onnx, coreml]")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, tiny("gemma3"), listed))
    found = [str(problem) for problem in caught.value.problems]
    [problem] = found
    assert "export[1]: gemma3_text cannot be exported to ONNX yet" in problem
    assert "norms that multiply by 1 + w" in problem
    assert "layers that attend to a sliding window" in problem
    assert "hint: export it to coreml or gguf" in problem
    targets = "targets:\n  phone: {{format: onnx}}\n  pi: {{format: gguf}}\n"
    with pytest.raises(
        RecipeError, match=r"targets\.phone\.format: gemma3_text cannot be exported"
    ):
        load_recipe(
            write_recipe(tmp_path, tiny("gemma3"), MINIMAL.replace("export: [gguf]\n", targets))
        )
    assert load_recipe(write_recipe(tmp_path, tiny("gemma3"))).facts is not None


def test_an_exporter_refuses_it_too_and_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gemma3_text cannot be exported"):
        load_plugin("exporters", "onnx")().export(
            Student(tiny("gemma3")), tmp_path, context_tokens=64
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_pre_attn_scalar": 16}, "query_pre_attn_scalar: llama.cpp takes 32 for it"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "sliding_attention": {
                        "rope_type": "linear",
                        "rope_theta": 500.0,
                        "factor": 2.0,
                    },
                }
            },
            "a RoPE scaling of the sliding layers",
        ),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_held_against_the_config(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    student = Path(shutil.copytree(tiny("gemma3"), tmp_path / "student"))
    write_json(student / "config.json", read_json(student / "config.json") | change)
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, student))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        load_plugin("exporters", "gguf")().export(
            Student(student), tmp_path / "out", context_tokens=64
        )
