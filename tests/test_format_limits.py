"""A student that a format cannot carry is refused by name, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import InputError, RecipeError
from edgedistill.plugins import load_plugin
from edgedistill.recipe_load import load_recipe
from edgedistill.student import Student
from tests.recipes import MINIMAL, write_recipe
from tests.tiny import FAMILY_CONFIGS, HELD, write_student

Tiny = Callable[[str], Path]
WINDOW = 16  # of the tiny students that have one
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = FAMILY_CONFIGS["llama3"]["rope_parameters"]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_the_formats_say_which_families_they_hold(tiny: Tiny, family: str) -> None:
    facts = Student(tiny(family)).facts
    for name, families in HELD.items():
        exporter = load_plugin("exporters", name)()
        limit, _ = exporter.context_limit(facts)
        assert (not exporter.problems(facts) and limit > WINDOW) == (family in families)


def test_a_recipe_is_told_which_formats_cannot_carry_the_student(
    tiny: Tiny, tmp_path: Path
) -> None:
    student = tiny("phi4_mini")
    listed = MINIMAL.replace("[gguf]", "[gguf, onnx]")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, student, listed))
    (problem,) = (str(one) for one in caught.value.problems)
    assert "export[1]: " in problem
    assert "12" in problem  # the dimensions that are rotated
    assert "hint: export it to coreml or gguf" in problem
    targets = "targets:\n  phone: {{format: onnx}}\n  pi: {{format: gguf}}\n"
    with pytest.raises(RecipeError, match=r"targets\.phone\.format: "):
        load_recipe(write_recipe(tmp_path, student, MINIMAL.replace("export: [gguf]\n", targets)))
    held = MINIMAL.replace("[gguf]", "[gguf, coreml]")
    assert load_recipe(write_recipe(tmp_path, student, held)).facts is not None


def test_an_exporter_refuses_it_too_and_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="12"):
        load_plugin("exporters", "onnx")().export(
            Student(tiny("phi4_mini")), tmp_path, context_tokens=64
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


@pytest.mark.parametrize(
    ("family", "changes", "most", "words"),
    [
        ("phi4_mini", {}, 256, "the 256 tokens that LongRoPE's short factors are for"),
        ("phi4_mini", {"original_max_position_embeddings": 300}, 256, "contexts of 256s"),
        ("phi3_sliding", {}, 16, "a window of 16 tokens, which llama.cpp's phi3 has not"),
        ("mistral_sliding", {}, 16, "a window of 16 tokens, which llama.cpp's llama has not"),
        ("llama", {}, 256, "the student's 256"),
    ],
)
def test_a_context_in_which_llama_cpp_would_compute_something_else_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], most: int, words: str
) -> None:
    student = write_student(tmp_path / "student", family, **changes)
    longer = MINIMAL.replace("context_tokens: 64", f"context_tokens: {most + 1}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, student, longer))
    (problem,) = (str(one) for one in caught.value.problems)
    assert f"context_tokens: {most + 1} is more than " in problem
    assert words in problem
    assert f"the most that {'it' if family == 'llama' else 'gguf'} can hold" in problem
    longest = MINIMAL.replace("context_tokens: 64", f"context_tokens: {most}")
    assert load_recipe(write_recipe(tmp_path, student, longest)).facts is not None


def test_grids_that_one_tensor_of_a_format_would_have_to_have_at_once_are_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    mixed = MINIMAL.replace("{{bits: 8}}", "{{bits: 4, linears: {{up: {{bits: 8}}}}}}")
    with pytest.raises(RecipeError, match=r"quantize_rtn: gate and up are one tensor in gguf"):
        load_recipe(write_recipe(tmp_path, tiny("phi4_mini"), mixed))
    assert load_recipe(write_recipe(tmp_path, tiny("llama"), mixed)).facts is not None


def test_what_pruning_makes_is_held_against_the_formats_before_any_work(
    tiny: Tiny, tmp_path: Path
) -> None:
    fields = "{{kv_heads: 1, multiple_of: 32, calibration: {{file: text.txt}}}}"
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    text = MINIMAL.replace("  float: []", f"  slim: [prune_width: {fields}]")
    student = write_student(tmp_path / "student", "phi3_sliding", sliding_window=None)
    with pytest.raises(RecipeError, match=r"rungs\.slim: .* 2 heads of 16, .*phi3 wants 64 wide"):
        load_recipe(write_recipe(tmp_path, student, text))
