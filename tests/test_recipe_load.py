from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.errors import ExitCode, RecipeError
from edgedistill.recipe_load import load_recipe
from tests.recipes import MINIMAL, write_recipe, write_suite

Tiny = Callable[[str], Path]


def problems(path: Path, student: str | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, student)
    assert caught.value.exit_code is ExitCode.USAGE
    for problem in caught.value.problems:
        assert problem.where is not None
        assert problem.where.startswith(str(path))
    return [str(problem) for problem in caught.value.problems]


def only_problem(path: Path) -> str:
    found = problems(path)
    assert len(found) == 1, found
    return found[0]


def test_paths_are_relative_to_the_recipe(tiny: Tiny, tmp_path: Path) -> None:
    write_suite(tmp_path / "suite.jsonl")
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "here").symlink_to(tiny("llama"))
    more = "suite: suite.jsonl\ntexts: {{mine: text.txt}}\n"
    path = write_recipe(tmp_path, Path("here"), MINIMAL + more)
    loaded = load_recipe(path)
    assert loaded.recipe.suite == (tmp_path / "suite.jsonl",)
    assert loaded.recipe.texts == {"mine": tmp_path / "text.txt"}
    assert loaded.student == tmp_path / "here"
    assert loaded.facts is not None
    assert loaded.facts.layers == 3


def test_many_mistakes_of_all_kinds_are_reported_at_once_in_order(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = write_recipe(
        tmp_path,
        tiny("llama"),
        """\
name: tiny
student: {student}
contex_tokens: 64
stages:
  - quantize_rtn: {{bits: 4}}
  - merge_lora: {{adapter: nowhere}}
rungs:
  int6: [quantize_rtn: {{bits: 6}}]
  int4: [quantize_rtm: {{bits: 4}}]
  slow: [quantize_rtn: {{bits: 4, embedding: {{bits: 8}}}}]
  bare: [quantize_rtn: ]
export: [ggfu, onnx]
floor: {{retention: 1.5}}
name: again
""",
    )
    found = problems(path)
    expected = [
        (1, "context_tokens: is missing"),
        (3, "contex_tokens: is not a key here\n  hint: did you mean 'context_tokens'?"),
        (6, "stages[1].merge_lora.adapter: there is no such file"),
        (6, "stages[1].merge_lora: an adapter cannot be merged into quantized weights"),
        (8, "rungs.int6[0].quantize_rtn.bits: input should be 2, 3, 4, 5 or 8, not 6"),
        (9, "there is no stage 'quantize_rtm'\n  hint: did you mean 'quantize_rtn'?"),
        (10, "quantize_rtn.embedding: is not a key here\n  hint: did you mean 'embeddings'?"),
        (11, "rungs.bare[0].quantize_rtn.bits: is missing"),
        (12, "there is no format 'ggfu'\n  hint: did you mean 'gguf'?"),
        (13, "floor.retention: input should be less than or equal to 1, not 1.5"),
        (13, "floor: there is no suite to judge it on"),
        (14, "name: the key is given twice, first in line 1"),
    ]
    assert len(found) == len(expected)
    for problem, (line, words) in zip(found, expected, strict=True):
        assert problem.startswith(f"{path}:{line}: ")
        assert words in problem


def test_the_adapter_of_another_model_is_found_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 16, "r": 2}')
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": np.ones((2, 96), np.float32)}
    factors |= {f"{name}.lora_B.weight": np.ones((96, 2), np.float32)}
    save_file(factors, adapter / "adapter_model.safetensors")
    text = MINIMAL + "stages: [merge_lora: {{adapter: adapter}}]\n"
    assert "96x96" in only_problem(write_recipe(tmp_path, tiny("llama"), text))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("context_tokens: 64", "context_tokens: 100000", "more than the student's 256"),
        ("[gguf]", "[gguf, gguf]", "'gguf' is given twice"),
        ("{{bits: 8}}", "{{bits: 8, group_size: 48}}", "group_size 48 does not divide"),
        ("{{bits: 8}}", "{{bits: 8, group_size: 64}}", "cannot be stored exactly in gguf"),
        (
            "int8: [quantize_rtn: {{bits: 8}}]\nexport: [gguf]",
            "int3: [quantize_rtn: {{bits: 3}}]\nexport: [gguf, onnx, coreml]",
            "int3[0].quantize_rtn: int3 group 32 (fixed zero) cannot be stored exactly in gguf or "
            "onnx\n  hint: choose another grid, or give this rung targets that hold it",
        ),
        (
            "int8: [quantize_rtn: {{bits: 8}}]\nexport: [gguf]",
            "int5: [quantize_rtn: {{bits: 5}}]\nexport: [gguf, onnx, coreml]",
            "int5[0].quantize_rtn: int5 group 32 (fixed zero) cannot be stored exactly in onnx or "
            "coreml\n  hint: choose another grid, or give this rung targets that hold it",
        ),
        (
            "{{bits: 8}}",
            "{{bits: 5, group_size: 64}}",
            "int5 group 64 (fixed zero) cannot be stored exactly in gguf",
        ),
        (
            "{{bits: 8}}",
            "{{bits: 5, zero: integer}}",
            "zero: integer goes with 4 bits, not with 5",
        ),
        (
            "int8: [quantize_rtn: {{bits: 8}}]",
            "int8: []\nstages: [quantize_rtn: {{bits: 8, group_size: 64}}]",
            "stages[0].quantize_rtn: int8 group 64 (fixed zero) cannot be stored exactly in gguf",
        ),
        ("export: [gguf]", "", "give either `export` or `targets`"),
        ("export: [gguf]", "export: [gguf]\nfloor: {{score: 0.5}}", "floor: there is no suite"),
        (
            "export: [gguf]",
            "targets: {{phone: {{format: gguf, rungs: [int8, flaot]}}}}",
            "targets.phone.rungs[1]: there is no rung 'flaot'\n  hint: did you mean 'float'?",
        ),
        (
            "export: [gguf]",
            "targets: {{phone: {{format: gguf, budget: {{file_mb: 0.1}}}}}}",
            "0.1 MB, but the weights of the smallest rung, int8, take 0.154 MB",
        ),
        (
            "export: [gguf]",
            "export: [gguf]\nevaluate: {{judge: onnx}}",
            "evaluate.judge: no rung is exported to 'onnx'\n  hint: the recipe exports gguf",
        ),
        (
            "export: [gguf]",
            "export: [gguf, onnx]\nevaluate: {{sample: {{onnx: 9, gguf: 9}}}}",
            "evaluate.sample.gguf: gguf runs the whole suite, so it has no sample",
        ),
        (
            "float: []",
            "float: [merge_lora: {{adapter: .}}]",
            "none is in a rung\n  hint: move it to `stages`",
        ),
    ],
)
def test_what_is_known_to_be_impossible_is_refused(
    tiny: Tiny, tmp_path: Path, old: str, new: str, words: str
) -> None:
    assert old in MINIMAL
    path = write_recipe(tmp_path, tiny("llama"), MINIMAL.replace(old, new))
    assert any(words in problem for problem in problems(path)), problems(path)


def test_slices_that_the_suite_lacks_are_refused_with_near_names(
    tiny: Tiny, tmp_path: Path
) -> None:
    write_suite(tmp_path / "suite.jsonl")
    more = "suite: suite.jsonl\nslices: {{evn: {{sacrificed: rare}}, odd: {{protected: true}}}}\n"
    problem = only_problem(write_recipe(tmp_path, tiny("llama"), MINIMAL + more))
    assert "slices.evn: no case of the suite is in the sacrificed slice 'evn'" in problem
    assert "did you mean 'even'?" in problem


def test_a_damaged_suite_is_refused_with_its_line(tiny: Tiny, tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl")
    suite.write_text(suite.read_text().replace('"answer": 1', '"answer": 9', 1))
    more = "suite: suite.jsonl\nslices: {{odd: {{protected: true}}}}\n"
    assert "suite.jsonl:2" in only_problem(write_recipe(tmp_path, tiny("llama"), MINIMAL + more))


def test_the_student_can_be_named_on_the_command_line(tiny: Tiny, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, Path("nowhere"))
    assert "student: " in only_problem(path)
    assert load_recipe(path, str(tiny("llama"))).student == tiny("llama")


def test_a_hub_student_is_not_fetched_to_check_the_rest(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, Path("x"))
    path.write_text(path.read_text().replace("student: x", "student: hf://org/name@0123"))
    assert load_recipe(path).student is None


@pytest.mark.parametrize("text", ["", "- a list\n", "just words\n"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert "is empty, or not a mapping" in only_problem(path)
