from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgedistill.build import Options, build
from edgedistill.errors import InputError, RecipeError
from edgedistill.evaluate.baseline import read_baseline
from edgedistill.evaluate.score import read_scores
from edgedistill.manifest import Manifest
from edgedistill.recipe_load import load_recipe
from edgedistill.release import find_released
from edgedistill.results import BuildReport
from tests.recipes import MINIMAL, write_recipe, write_suite

Tiny = Callable[[str], Path]
CASES = 160
RECIPE = (
    MINIMAL.replace("  int8: [quantize_rtn: {{bits: 8}}]\n", "")
    + """\
suite: suite.jsonl
floor: {{score: 0.01}}
router: {{target_accuracy: 0.1}}
teacher: answers.jsonl
build: {{threads: 1}}
"""
)


@dataclass(frozen=True)
class Built:
    options: Options
    report: BuildReport
    exports: Path


def write_all(directory: Path, student: Path, text: str = RECIPE) -> Path:
    recipe = write_recipe(directory, student, text)
    write_suite(directory / "suite.jsonl", CASES)
    lines = [json.dumps({"id": f"case-{i}", "answer": i % 2}) for i in range(CASES)]
    (directory / "answers.jsonl").write_text("\n".join(lines))
    return recipe


@pytest.fixture(scope="module")
def built(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A build of one float rung as GGUF."""
    directory = tmp_path_factory.mktemp("release")
    recipe = write_all(directory, tiny("llama"))
    options = Options(recipe, cache=directory / "cache", exports=directory / "exports")
    report, page = build(options, lambda _: None)
    return Built(options, report, page.parent)


def release(root: Path, shipped: dict[str, str | None], kept: list[str]) -> Path:
    """The exports of a recipe: format -> rung to ship, and which rung/format left scores."""
    root.mkdir(parents=True)
    rows = [{"format": f, "rung": rung, "target": f} for f, rung in shipped.items()]
    (root / "report.json").write_text(json.dumps({"judgements": rows, "of": "any version"}))
    (root / "evaluation").mkdir()
    for name in kept:
        (root / "evaluation" / name).mkdir(parents=True)
        (root / "evaluation" / name / "scores.jsonl").write_text("")
    return root


def test_an_artifact_is_compared_with_what_was_shipped_in_its_format(tmp_path: Path) -> None:
    kept = ["int8/gguf", "int4/gguf", "int4/onnx"]
    exports = release(tmp_path / "r", {"gguf": "int8", "onnx": None}, kept)

    def found(rung: str, form: str) -> str | None:
        released = find_released(exports, rung, form)
        if released is not None:
            assert released.scores == exports / "evaluation" / released.name
        return released.name if released else None

    assert found("int4", "gguf") == found("new", "gguf") == "int8/gguf"
    assert found("int4", "onnx") == "int4/onnx"  # nothing was shipped: the same rung
    assert found("new", "onnx") is None
    assert found("int4", "coreml") is None


def test_one_artifact_may_stand_for_the_release(tmp_path: Path) -> None:
    exports = release(tmp_path / "r", {}, ["int4/gguf"])
    for rung in ("int4", "int8"):
        (exports / rung / "gguf").mkdir(parents=True)
        (exports / rung / "gguf" / "manifest.json").write_text("{}")
    released = find_released(exports / "int4" / "gguf", "other", "onnx")
    assert released is not None
    assert released.name == "int4/gguf"
    with pytest.raises(InputError, match="no scores are kept"):
        find_released(exports / "int8" / "gguf", "other", "onnx")


@pytest.mark.parametrize("report", ["{", "[]", '{"judgements": [1]}', '{"judgements": 3}', None])
def test_a_directory_that_is_no_release_is_refused(tmp_path: Path, report: str | None) -> None:
    exports = release(tmp_path / "r", {}, [])
    (exports / "report.json").unlink()
    if report is not None:
        (exports / "report.json").write_text(report)
    with pytest.raises(InputError, match="cannot be read as a report"):
        find_released(exports, "int4", "gguf")
    (exports / "evaluation").rmdir()
    with pytest.raises(InputError, match="holds no evaluation"):
        find_released(exports, "int4", "gguf")


def test_a_rung_that_climbs_out_of_the_release_is_not_followed(tmp_path: Path) -> None:
    exports = release(tmp_path / "r", {"gguf": "../../other"}, ["int4/gguf"])
    outside = tmp_path / "other" / "gguf"
    outside.mkdir(parents=True)
    (outside / "scores.jsonl").write_text("")
    released = find_released(exports, "int4", "gguf")
    assert released is not None
    assert released.name == "int4/gguf"


def test_a_recipe_says_what_is_wrong_with_teacher_previous_and_router(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = RECIPE.replace("0.1}}", "1.5}}") + "previous: old\n"
    recipe = write_all(tmp_path, tiny("llama"), text)
    (tmp_path / "old").mkdir()
    (tmp_path / "answers.jsonl").write_text('{"id": "case-0", "answer": "none of them"}')
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    said = str(caught.value)
    assert "router.target_accuracy" in said
    assert "answers.jsonl:1" in said
    assert "holds no evaluation/" in said
    assert len(caught.value.problems) == 3
    recipe = write_recipe(tmp_path, tiny("llama"), RECIPE.replace("suite: suite.jsonl\n", ""))
    with pytest.raises(RecipeError, match="there is no suite to judge it on") as caught:
        load_recipe(recipe)
    assert {"router", "teacher"} <= {p.message.partition(":")[0] for p in caught.value.problems}


@pytest.mark.slow
def test_a_build_leaves_scores_queue_and_baseline_and_ships_the_router(built: Built) -> None:
    (artifact,) = built.report.artifacts
    assert artifact.evaluation is not None
    router = artifact.evaluation.router
    assert router is not None
    text = (built.options.exports / artifact.path / "manifest.json").read_text()
    manifest = Manifest.model_validate_json(text)
    assert manifest.router == router
    assert manifest.quality is not None
    assert manifest.quality.slices[0].choice == artifact.evaluation.overall.choice
    kept = built.exports / "evaluation" / "float" / "gguf"
    names = {p.name for p in kept.iterdir()}
    assert names - {"queue.jsonl"} == {"scores.jsonl", "cases.jsonl"}
    assert ("queue.jsonl" in names) == (router.threshold is not None)
    assert len(read_scores(kept)) == CASES
    reference = built.exports / "evaluation" / "_reference"
    (baseline,) = reference.glob("baseline-*.safetensors")
    assert hashlib.sha256(baseline.read_bytes()).hexdigest() in baseline.name
    assert len(read_baseline(baseline)) == CASES == len(read_scores(reference))
    (teacher,) = artifact.evaluation.against
    assert (teacher.kind, teacher.cases) == ("teacher", CASES)


@pytest.mark.slow
def test_the_next_release_is_compared_with_the_last(built: Built, tiny: Tiny) -> None:
    directory = built.options.recipe.parent
    shutil.copytree(built.exports, directory / "last")
    student, recipe = tiny("llama"), built.options.recipe
    before = recipe.read_text()
    try:
        write_recipe(directory, student, RECIPE + "previous: last\n")
        report, _ = build(built.options, lambda _: None)
    finally:
        recipe.write_text(before)
    evaluation = report.artifacts[0].evaluation
    assert evaluation is not None
    assert [found.kind for found in evaluation.against] == ["teacher", "previous release"]
    last = evaluation.against[1]
    assert (last.name, last.cases, last.flips) == ("float/gguf", CASES, [])
    assert last.slices[0].agreement == 1.0
    ran = [step.label for step in report.steps if not step.cached]
    assert ran == ["float/gguf: judge"]  # nothing else depends on it
