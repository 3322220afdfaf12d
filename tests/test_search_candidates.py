"""What arithmetic alone says of the candidates of a search; nothing is run here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.cache import Cache
from edgedistill.errors import RecipeError, UsageError
from edgedistill.plugins import load_plugin, plugin_names
from edgedistill.search import candidates as module
from edgedistill.search.candidates import Candidate, Field, find_candidates
from edgedistill.search.climb import Limits
from edgedistill.search.ladder import LADDER, STAGES_BY_COST, Remedy, cost_rank
from edgedistill.search.run import SearchOptions, plan_search, search_recipe
from tests.recipes import write_recipe, write_suite

Tiny = Callable[[str], Path]
RECIPE = """\
name: tiny
student: {student}
context_tokens: 64
targets:
  android: {{format: gguf, budget: {{file_mb: 100}}}}
  windows: {{format: onnx}}
suite: suite.jsonl
floor: {{score: 0.01}}
build: {{threads: 1}}
"""


def find(directory: Path, student: Path, text: str) -> Field:
    recipe = write_recipe(directory, student, text)
    write_suite(directory / "suite.jsonl")
    return find_candidates(recipe, None, directory / "cache")


def by_name(field: Field) -> dict[str, Candidate]:
    return {c.name: c for c in field.candidates}


def test_a_recipe_without_rungs_is_searched_by_the_ladder(tiny: Tiny, tmp_path: Path) -> None:
    field = find(tmp_path, tiny("llama"), RECIPE)
    names = [c.name for c in field.open]
    assert names[:3] == ["int8", "int4", "int4-gptq-embeddings4"]
    assert names[3:5] == ["int4-gptq", "int4-gptq-zeros"]
    sizes = {c.name: c.planned_bytes for c in field.open}
    assert list(sizes["int8"]) == ["gguf", "onnx"]
    assert sizes["int4"]["gguf"] < sizes["int4-gptq-zeros"]["gguf"] < sizes["int8"]["gguf"]
    assert not (tmp_path / "cache").exists()


def test_the_cheap_come_first_and_what_is_dear_begins_small(tiny: Tiny, tmp_path: Path) -> None:
    own = RECIPE + (
        "calibration: {{file: text.txt}}\n"
        "rungs:\n"
        "  zeros: [quantize_rtn: {{bits: 4, zero: integer}}]\n"
        "  dear: [heal: {{tokens: 64}}, quantize_rtn: {{bits: 8}}]\n"
        "  float: []\n"
    )
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 50)
    ordered = find(tmp_path, tiny("llama"), own).open
    names = [c.name for c in ordered]
    assert names[:4] == ["float", "int8", "zeros", "int4"]
    assert names[4:6] == ["int4-gptq-embeddings4", "int4-gptq"]
    healed = [c for c in ordered if any("heal" in step for step in c.steps)]
    assert ordered[-len(healed) :] == healed
    assert [c.total_bytes for c in healed] == sorted(c.total_bytes for c in healed)
    assert {"dear", "shallow-int8", "narrow-int4-gptq"} <= {c.name for c in healed}


def test_text_that_the_student_wrote_itself_is_text_to_learn_from(
    tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "own.jsonl").write_text('{"rendered": "The quick brown fox."}\n' * 50)
    without = find(tmp_path, tiny("llama"), RECIPE)
    own = find(tmp_path, tiny("llama"), RECIPE + "calibration: {{own_text: own.jsonl}}\n")
    assert "int2-recovered" not in by_name(without)
    assert "int2-recovered" in by_name(own)


def test_what_cannot_fit_its_budget_is_left_out_and_never_run(tiny: Tiny, tmp_path: Path) -> None:
    """The student has 0.15 M weights, so 8 bits take more and 4 bits less than 0.15 MB."""
    field = find(tmp_path, tiny("llama"), RECIPE.replace("file_mb: 100", "file_mb: 0.15"))
    found = by_name(field)
    limited = {n for n, c in found.items() if c.left_out and "over budget: android" in c.left_out}
    assert limited == {n for n, c in found.items() if c.planned_bytes["gguf"] > 150_000}
    assert "int8" in limited
    assert "int4" not in limited
    built = {a.rung for a in field.prepared.steps.artifacts}
    assert built == set(found) - limited


def test_without_any_candidate_that_fits_nothing_is_run(tiny: Tiny, tmp_path: Path) -> None:
    text = RECIPE.replace("file_mb: 100", "file_mb: 0.01")
    recipe = write_recipe(tmp_path, tiny("llama"), text)
    write_suite(tmp_path / "suite.jsonl")
    report = search_recipe(SearchOptions(recipe, tmp_path / "cache"), lambda _: None)
    assert (report.winner, report.written, report.exit_code) == (None, None, 4)
    assert {c.state for c in report.candidates} == {"left out"}
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "recipe.found.yaml").exists()
    assert json.loads((tmp_path / "recipe.search.json").read_text())["winner"] is None


def test_a_grid_that_one_format_cannot_hold_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    text = RECIPE + "rungs:\n  odd: [quantize_rtn: {{bits: 8, group_size: 16}}]\n"
    reason = by_name(find(tmp_path, tiny("llama"), text))["odd"].left_out
    holds = {f: [g for g in _grids(tiny) if not _holds(f, g)] for f in ("gguf", "onnx")}
    unable = [name for name, grids in holds.items() if grids]
    assert unable
    assert reason is not None
    assert f"cannot be stored exactly in {' or '.join(unable)}" in reason


def _grids(tiny: Tiny) -> list[object]:
    from edgedistill.student import Student

    stage = load_plugin("stages", "quantize_rtn").model_validate({"bits": 8, "group_size": 16})
    return list(stage.grids(Student(tiny("llama")).facts))


def _holds(format_name: str, grid: object) -> bool:
    return load_plugin("exporters", format_name)().holds(grid)  # type: ignore[arg-type]


def test_rungs_of_the_recipe_keep_their_names_and_stand_for_the_ladders(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = RECIPE + (
        "rungs:\n"
        "  mine: [quantize_rtn: {{bits: 4, zero: fixed}}]\n"
        "  int8: [quantize_rtn: {{bits: 8, group_size: 64}}]\n"
    )
    found = by_name(find(tmp_path, tiny("llama"), text))
    assert "int4" not in found  # the same steps as mine
    assert found["mine"].source == "recipe"
    assert found["int8"].steps == [{"quantize_rtn": {"bits": 8, "group_size": 64}}]
    assert found["int8-2"].steps == [{"quantize_rtn": {"bits": 8}}]
    assert found["mine"].gentler == ("int8-2",)


@pytest.mark.parametrize("gone", ["floor: {{score: 0.01}}\n", "suite: suite.jsonl\n"])
def test_without_a_floor_there_is_nothing_to_search_under(
    tiny: Tiny, tmp_path: Path, gone: str
) -> None:
    text = RECIPE.replace(gone, "").replace("floor: {{score: 0.01}}\n" * ("suite" in gone), "")
    with pytest.raises(UsageError, match="there is no") as caught:
        find(tmp_path, tiny("llama"), text)
    assert caught.value.hint is not None
    assert "floor" in caught.value.hint


def test_a_mistake_elsewhere_in_the_recipe_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="contxt"):
        find(tmp_path, tiny("llama"), RECIPE + "contxt: 1\nrungs: {{}}\n")
    with pytest.raises(RecipeError, match="rungs"):
        find(tmp_path, tiny("llama"), RECIPE + "rungs: [int8]\n")


def test_a_remedy_whose_stage_is_not_installed_is_said_and_left_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = Remedy("int1", "1 bit", ({"quantize_dreamt": {}},))
    monkeypatch.setattr(module, "LADDER", (*LADDER[:1], future))
    field = find(tmp_path, tiny("llama"), RECIPE)
    assert [c.name for c in field.candidates] == ["int8"]
    assert field.notes == ("int1: left out, there is no stage quantize_dreamt here",)


def test_a_dry_run_tells_sizes_and_runs_nothing(tiny: Tiny, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny("llama"), RECIPE)
    write_suite(tmp_path / "suite.jsonl")
    before = sorted(p.name for p in tmp_path.iterdir())
    options = SearchOptions(recipe, tmp_path / "cache", limits=Limits())
    report = plan_search(options)
    assert {c.state for c in report.candidates} == {"to try"}
    assert all(c.planned_bytes and c.planned_seconds > 0 for c in report.candidates)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert Cache(tmp_path / "cache").find("0" * 64) is None


@pytest.mark.parametrize("remedy", LADDER, ids=lambda r: r.name)
def test_every_remedy_is_one_that_a_recipe_may_have(remedy: Remedy) -> None:
    names = {r.name for r in LADDER}
    assert set(remedy.gentler) <= names - {remedy.name}
    for step in remedy.for_layers(30):
        for stage, fields in step.items():
            if stage in plugin_names("stages"):
                load_plugin("stages", stage).model_validate(fields)


def test_a_candidate_is_as_dear_as_its_dearest_stage() -> None:
    assert len({r.name for r in LADDER}) == len(LADDER)
    assert cost_rank([]) < cost_rank(["quantize_rtn"]) < cost_rank(["quantize_rtn", "heal"])
    assert cost_rank(["heal", "quantize_rtn"]) == STAGES_BY_COST.index("heal")
    assert cost_rank(["quantize_rtn", "unheard_of"]) > cost_rank(["heal"])
