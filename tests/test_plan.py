from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.errors import UsageError
from edgedistill.pipeline import Step
from edgedistill.plan import BuildSteps, plan_build
from edgedistill.recipe_load import load_recipe
from edgedistill.tasks import BenchArtifact, Export, JudgeLogits, Score, Verify
from tests.recipes import MINIMAL, write_recipe, write_suite

Tiny = Callable[[str], Path]
ALL = MINIMAL.replace("[gguf]", "[coreml, onnx, gguf]") + "suite: suite.jsonl\n"


def plan(
    tiny: Tiny, directory: Path, text: str = ALL, *, only: tuple[str, ...] = (), machine: str = "m"
) -> BuildSteps:
    path = write_recipe(directory, tiny("llama"), text)
    write_suite(directory / "suite.jsonl")
    return plan_build(load_recipe(path).recipe, tiny("llama"), only, machine=machine)


def keys(steps: BuildSteps) -> dict[str, str]:
    return {step.label: step.key for step in steps.ordered()}


def test_rungs_share_their_prefix_and_formats_their_weights(tiny: Tiny, tmp_path: Path) -> None:
    steps = plan(tiny, tmp_path)
    by_name = {(a.rung, a.format): a for a in steps.artifacts}
    assert len(by_name) == 6
    assert by_name["float", "gguf"].student.key == steps.reference.key
    assert by_name["int8", "gguf"].student is by_name["int8", "onnx"].student
    judges = [s for s in steps.ordered() if isinstance(s.task, JudgeLogits)]
    assert len(judges) == 2  # the reference's weights are also the float rung's


def test_one_fast_format_judges_a_rung_and_the_others_run_a_sample(
    tiny: Tiny, tmp_path: Path
) -> None:
    steps = plan(tiny, tmp_path)
    sampled = {(a.rung, a.format): a.sample for a in steps.artifacts}
    assert sampled["int8", "gguf"] is None
    assert sampled["int8", "onnx"] == 500
    assert sampled["int8", "coreml"] == 60
    assert [a.format for a in steps.artifacts if a.judges] == ["gguf", "gguf"]
    without = plan(tiny, tmp_path, ALL.replace(", gguf]", "]"))
    assert {a.format for a in without.artifacts if a.judges} == {"onnx"}


def test_a_recipe_says_which_format_judges(tiny: Tiny, tmp_path: Path) -> None:
    asked = ALL + "evaluate: {{judge: onnx, sample: {{gguf: 7}}}}\n"
    sampled = {(a.rung, a.format): a.sample for a in plan(tiny, tmp_path, asked).artifacts}
    assert sampled["int8", "onnx"] is None
    assert sampled["int8", "gguf"] == 7
    assert sampled["int8", "coreml"] == 60
    alone = plan(tiny, tmp_path, asked, only=("int8/gguf",))
    assert [a.format for a in alone.artifacts if a.judges] == ["gguf"]  # it has none beside it


def test_benchmarks_run_last_and_only_where_speed_means_something(
    tiny: Tiny, tmp_path: Path
) -> None:
    steps = plan(tiny, tmp_path)
    ordered = steps.ordered()
    kinds = [isinstance(step.task, BenchArtifact) for step in ordered]
    assert kinds == sorted(kinds)
    assert sum(kinds) == 4
    assert all(a.bench is None for a in steps.artifacts if a.format == "coreml")


def test_every_step_comes_after_its_inputs(tiny: Tiny, tmp_path: Path) -> None:
    seen: set[str] = set()
    for step in plan(tiny, tmp_path).ordered():
        assert {source.key for source in step.inputs.values()} <= seen
        seen.add(step.key)


def test_another_machine_repeats_the_benchmarks_alone(tiny: Tiny, tmp_path: Path) -> None:
    one, other = (keys(plan(tiny, tmp_path, machine=name)) for name in "mn")
    assert {label for label in one if one[label] != other[label]} == {
        "float/onnx: bench",
        "float/gguf: bench",
        "int8/onnx: bench",
        "int8/gguf: bench",
    }


def test_a_changed_suite_repeats_the_scores_alone(tiny: Tiny, tmp_path: Path) -> None:
    before = plan(tiny, tmp_path)
    before_keys = keys(before)
    path = write_recipe(tmp_path, tiny("llama"), ALL)
    write_suite(tmp_path / "suite.jsonl", cases=9)
    after = plan_build(load_recipe(path).recipe, tiny("llama"), machine="m")
    changed = {label for label, key in keys(after).items() if before_keys[label] != key}
    assert changed
    assert all(label.endswith((": score", ": judge")) for label in changed)


def test_a_rungs_weights_do_not_depend_on_who_else_is_built(tiny: Tiny, tmp_path: Path) -> None:
    whole = keys(plan(tiny, tmp_path))
    alone = keys(
        plan(tiny, tmp_path, ALL.replace("coreml, onnx, ", "").replace("  float: []\n", ""))
    )
    shared = {label for label in alone if "bench" not in label and "judge" not in label}
    assert {"int8: quantize_rtn", "int8/gguf: export", "int8/gguf: score"} <= shared
    assert all(alone[label] == whole[label] for label in shared)


def test_only_takes_a_rung_or_one_of_its_formats(tiny: Tiny, tmp_path: Path) -> None:
    some = plan(tiny, tmp_path, only=("int8/onnx", "float"))
    assert [(a.rung, a.format) for a in some.artifacts] == [
        ("float", "coreml"),
        ("float", "onnx"),
        ("float", "gguf"),
        ("int8", "onnx"),
    ]
    with pytest.raises(UsageError, match="int8/gufg") as caught:
        plan(tiny, tmp_path, only=("int8/gufg",))
    assert caught.value.hint == "did you mean 'int8/gguf'?"


def test_merged_adapters_make_the_reference_and_the_student_before_is_judged_too(
    tiny: Tiny, tmp_path: Path
) -> None:
    from edgedistill.recipe import StageStep
    from edgedistill.stages.merge_lora import MergeLora

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    path = write_recipe(tmp_path, tiny("llama"), ALL)
    write_suite(tmp_path / "suite.jsonl")
    merge = StageStep.model_construct(
        name="merge_lora", config=MergeLora(adapter=tmp_path / "adapter")
    )
    recipe = load_recipe(path).recipe.model_copy(update={"stages": (merge,)})
    steps = plan_build(recipe, tiny("llama"), machine="m")
    assert steps.reference.label == "merge_lora"
    for step in steps.ordered():
        if isinstance(step.task, Verify):
            base: Step = step.inputs["base_judge"]
            assert base.inputs["student"].label == "take in the student"
        if isinstance(step.task, Score):
            assert step.inputs["student"].key == steps.reference.key
        if isinstance(step.task, Export):
            assert "merge_lora" in [s.label for s in step.lineage()]
