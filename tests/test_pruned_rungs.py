"""Pruned rungs on their whole way: recipe, plan, stages as steps, all formats, all runtimes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.build import Options
from edgedistill.cache import Cache
from edgedistill.calibration import Calibration
from edgedistill.errors import RecipeError
from edgedistill.estimate import artifact_bytes, facts_of_rung
from edgedistill.healing_results import HEALING_FILE
from edgedistill.pipeline import Pipeline
from edgedistill.plan import BuildSteps, plan_build
from edgedistill.preview import describe, preview
from edgedistill.recipe_load import load_recipe
from edgedistill.stages.prune_depth import PruneDepth
from edgedistill.stages.prune_width import PruneWidth
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student
from tests.mutations import ALL
from tests.peaked import export, make_good, verify
from tests.recipes import write_recipe

pytestmark = pytest.mark.slow
Tiny = Callable[[str], Path]
SHORT = Calibration(sequence_tokens=64)
RECIPE = """\
name: tiny
student: {student}
context_tokens: 64
calibration: {{sequence_tokens: 64}}
rungs:
  float: []
  slim:
    - prune_depth: {{layers: 1, search_tokens: 128}}
    - prune_width: {{ffn_size: 96, multiple_of: 32, held_out_tokens: 128}}
    - heal: {{tokens: 1024, batch_tokens: 128, held_out_tokens: 128, learning_rate: 0.0003}}
    - quantize_rtn: {{bits: 8}}
export: [gguf]
"""


def _plan(tiny: Tiny, directory: Path, text: str = RECIPE) -> BuildSteps:
    loaded = load_recipe(write_recipe(directory, tiny("llama"), text))
    return plan_build(loaded.recipe, tiny("llama"), machine="m")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_pruned_students_pass_in_all_formats(family: str, tmp_path: Path) -> None:
    narrow = PruneWidth(ffn_size=96, kv_heads=1, hidden_size=96, multiple_of=32, calibration=SHORT)
    stages = [PruneDepth(layers=1, search_tokens=128, calibration=SHORT), narrow]
    rungs = {"float": stages, "int8": [*stages, QuantizeRtn(bits=8)]}
    alarms = []
    good_of = make_good(tmp_path, family, rungs, 77, hidden_size=128)
    for rung, good in good_of.items():
        facts = Student(good.rung.student).facts
        assert (facts.layers, facts.ffn_size, facts.kv_heads, facts.hidden_size) == (2, 96, 1, 96)
        for name in ALL:
            artifact = export(good.rung.student, tmp_path / f"{rung}-{name}", name)
            alarms += [
                f"{rung}/{name} {check.name}: {check.value} against {check.limit}"
                for check in verify(good, artifact, name, pruned=True).checks
                if not check.passed
            ]
    assert alarms == []


def test_an_adapter_that_is_lost_behind_a_pruning_is_named(tmp_path: Path) -> None:
    stages = [PruneDepth(layers=1, search_tokens=128, calibration=SHORT)]
    good = make_good(tmp_path, "llama", {"float": stages}, 77)["float"]
    unadapted = tmp_path / "unadapted"
    unadapted.mkdir()
    stages[0].run(good.base.student, unadapted)
    artifact = export(unadapted, tmp_path / "gguf", "gguf")
    checks = {c.name: c for c in verify(good, artifact, "gguf", pruned=True).checks}
    assert not checks["adapter: effect retained"].passed
    assert "pruning left" in checks["adapter: effect retained"].detail


def test_a_slim_rung_is_built_step_by_step_and_healed_by_the_reference(
    tiny: Tiny, tmp_path: Path
) -> None:
    steps = _plan(tiny, tmp_path)
    slim = next(a for a in steps.artifacts if a.rung == "slim")
    by_label = {step.label: step for step in steps.ordered()}
    heal = by_label["slim: heal"]
    assert heal.inputs["teacher"] is steps.reference
    assert list(by_label["slim: prune_depth"].inputs) == ["student"]
    pipeline = Pipeline(Cache(tmp_path / "cache"), lambda line: None)
    pipeline.run([slim.student])
    out = pipeline.output(slim.student)
    assert out is not None
    assert Student(out).facts.layers == 2
    assert Student(out).facts.ffn_size == 96
    healed = pipeline.output(heal)
    assert healed is not None
    assert (healed / HEALING_FILE).exists()
    assert not (tmp_path / "cache" / "work" / heal.key).exists()


def test_a_teacher_of_the_recipes_own_takes_the_place_of_the_reference(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = RECIPE.replace("heal: {{", f"heal: {{{{teacher: {tiny('llama')}, ")
    heal = next(s for s in _plan(tiny, tmp_path, text).ordered() if s.label == "slim: heal")
    assert list(heal.inputs) == ["student"]


def test_plan_counts_what_is_left(tiny: Tiny, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny("llama"), RECIPE)
    recipe = load_recipe(path).recipe
    facts = Student(tiny("llama")).facts
    stages = recipe.rungs["slim"]
    left = facts_of_rung(facts, stages)
    assert (left.layers, left.ffn_size) == (2, 96)
    assert artifact_bytes(facts, stages, "gguf") == artifact_bytes(left, stages[-1:], "gguf")
    plan = preview(Options(recipe=path, cache=tmp_path / "cache"))
    by_rung = {a.rung: a for a in plan.artifacts}
    assert by_rung["slim"].parameters == left.parameters
    assert by_rung["float"].parameters == facts.parameters
    assert by_rung["float"].decode_speedup is None
    whole = artifact_bytes(facts, stages[-1:], "gguf")
    assert by_rung["slim"].decode_speedup == pytest.approx(
        whole / by_rung["slim"].weight_bytes, rel=1e-6
    )
    told = "\n".join(describe(plan))
    assert "decode up to" in told
    heal = next(step for step in plan.steps if step.label == "slim: heal")
    assert heal.seconds is not None
    # What trains is told of a GPU too, and nothing else is.
    assert [step.label for step in plan.steps if step.gpu_seconds is not None] == ["slim: heal"]
    assert heal.gpu_seconds is not None
    assert 0 < heal.gpu_seconds < heal.seconds
    assert "slim: heal trains: ~0.0 h on two cores" in told


@pytest.mark.parametrize(
    ("change", "line", "named"),
    [
        (("layers: 1", "layers: 3"), 8, "leaves none"),
        (("ffn_size: 96, multiple_of: 32", "ffn_size: 96"), 9, "multiple of 64"),
        (("ffn_size: 96", "kv_heads: 2"), 9, "not below"),
        # The stages behind are held against what arrives there, not against the student.
        (("ffn_size: 96, multiple_of: 32", "ffn_size: 80, multiple_of: 16"), 11, "80 columns"),
    ],
)
def test_impossible_rungs_are_refused_with_their_line(
    tiny: Tiny, tmp_path: Path, change: tuple[str, str], line: int, named: str
) -> None:
    path = write_recipe(tmp_path, tiny("llama"), RECIPE.replace(*change))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 1
    assert named in str(caught.value)
    assert f"recipe.yaml:{line}" in str(caught.value)


def test_pruning_behind_quantization_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    text = RECIPE.replace("    - prune_depth", "    - quantize_rtn: {{bits: 8}}\n    - prune_depth")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, tiny("llama"), text))
    assert len(caught.value.problems) == 4


def test_a_changed_text_changes_the_keys_of_what_is_chosen_on_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    file = tmp_path / "calibration.txt"
    text = RECIPE.replace("{{sequence_tokens: 64}}", "{{file: calibration.txt}}")

    def keys(content: str) -> dict[str, str]:
        file.write_text(content, encoding="utf-8")
        return {step.label: step.key for step in _plan(tiny, tmp_path, text).ordered()}

    first, second = keys("one text " * 500), keys("another text " * 500)
    changed = {label for label in first if first[label] != second[label]}
    assert {"slim: prune_depth", "slim: heal", "slim/gguf: export"} <= changed
    assert not {"take in the student", "float/gguf: export"} & changed
