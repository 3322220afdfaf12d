"""A student that a format cannot carry is refused by name, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import InputError, RecipeError
from edgedistill.plain_blocks import beyond_plain_blocks
from edgedistill.plugins import load_plugin
from edgedistill.recipe_load import load_recipe
from edgedistill.student import Student
from tests.recipes import MINIMAL, write_recipe
from tests.tiny import FAMILY_CONFIGS, GGUF_FAMILIES, PLAIN_FAMILIES, write_student

Tiny = Callable[[str], Path]
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = FAMILY_CONFIGS["llama3"]["rope_parameters"]


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_plain_families_are_held_by_every_format(tiny: Tiny, family: str) -> None:
    facts = Student(tiny(family)).facts
    assert beyond_plain_blocks(facts) == []
    for name in ("gguf", "onnx", "coreml"):
        assert load_plugin("exporters", name)().problems(facts) == []


@pytest.mark.parametrize("family", sorted(set(GGUF_FAMILIES) - set(PLAIN_FAMILIES)))
def test_gguf_holds_the_others_that_llama_cpp_runs(tiny: Tiny, family: str) -> None:
    facts = Student(tiny(family)).facts
    assert beyond_plain_blocks(facts) != []
    assert load_plugin("exporters", "gguf")().problems(facts) == []


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
    ("family", "change", "message"),
    [
        ("gemma3", {"query_pre_attn_scalar": 16}, "llama.cpp takes 32 for it"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "llama.cpp takes 32 for it"),
        ("gemma2", {"attn_logit_softcapping": None}, r"always has one \(attention_softcap\)"),
        ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING]}, r"in no period \(\.ss\)"),
        ("gemma2", {"rope_parameters": YARN}, "the RoPE scaling yarn"),
        ("mistral_sliding", {}, "a window of 16 tokens, which llama.cpp's llama has not"),
        ("qwen3_sliding", {}, "a window of 16 tokens, which llama.cpp's qwen3 has not"),
        ("qwen3", {"attention_bias": True}, "biases of o"),
        ("smollm3", {"attention_bias": True}, "biases of o"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}, r"without rotation \(0, 3\)"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, r"without rotation \(none\)"),
        ("smollm3", {"rope_parameters": LLAMA3}, "the RoPE scaling llama3"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast 16.0"),
        (
            "gemma3",
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
    tmp_path: Path, family: str, change: dict[str, Any], message: str
) -> None:
    student = write_student(tmp_path / "student", family, **change)
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, student))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        load_plugin("exporters", "gguf")().export(
            Student(student), tmp_path / "out", context_tokens=64
        )
