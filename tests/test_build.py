from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgedistill.build import Options, build, student_name
from edgedistill.cache_place import open_cache
from edgedistill.errors import ExitCode, UsageError
from edgedistill.manifest import Manifest
from edgedistill.preview import describe, preview
from edgedistill.results import BuildReport
from tests.peaked import peaked_student
from tests.recipes import MINIMAL, write_recipe, write_suite

Tiny = Callable[[str], Path]
RECIPE = (
    MINIMAL.replace("{{bits: 8}}", "{{bits: 8, group_size: 32}}")
    + """\
license: apache-2.0
suite: suite.jsonl
floor: {{score: 0.01}}
build: {{threads: 1, peak_ram_gb: 8}}
"""
)


@dataclass(frozen=True)
class Built:
    options: Options
    report: BuildReport
    page: Path
    said: list[str]


@pytest.fixture(scope="module")
def built(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A build of two rungs as GGUF from an empty cache."""
    directory = tmp_path_factory.mktemp("build")
    recipe = write_recipe(directory, tiny("llama"), RECIPE)
    write_suite(directory / "suite.jsonl")
    options = Options(recipe, cache=directory / "cache", exports=directory / "exports")
    said: list[str] = []
    report, page = build(options, said.append)
    return Built(options, report, page, said)


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    files = (p for p in root.rglob("*") if p.is_file() and not p.name.startswith("report."))
    return {str(p): (p.stat().st_ino, p.read_bytes()) for p in files}


@pytest.mark.slow
def test_every_artifact_is_built_measured_and_reported(built: Built) -> None:
    report = built.report
    assert [(a.rung, a.format) for a in report.artifacts] == [("float", "gguf"), ("int8", "gguf")]
    assert all(step.error is None and not step.cached for step in report.steps)
    for artifact in report.artifacts:
        assert artifact.verification is not None
        assert artifact.evaluation is not None
        assert artifact.evaluation.cases == 12
        assert artifact.bench is not None
        assert artifact.bits_per_weight == 8 * artifact.weight_bytes / artifact.parameters
    assert report.reference is not None
    assert report.reference.retention == 1.0
    assert report.peak_own_bytes > 100e6
    assert json.loads((built.page.parent / "report.json").read_text())["recipe"] == "tiny"
    assert built.page.exists()


@pytest.mark.slow
def test_the_smallest_rung_that_passes_is_named_and_decides_the_exit_code(built: Built) -> None:
    report = built.report
    passing = [a for a in report.artifacts if a.shippable]
    (judgement,) = report.judgements
    if passing:
        smallest = min(passing, key=lambda a: a.size_bytes)
        assert (judgement.rung, report.exit_code) == (smallest.rung, ExitCode.OK)
    else:
        assert judgement.rung is None
        assert report.exit_code != ExitCode.OK
    assert next(a for a in report.artifacts if a.rung == "float").shippable


@pytest.mark.slow
def test_a_manifest_vouches_for_every_file_and_names_no_place(built: Built) -> None:
    for artifact in built.report.artifacts:
        directory = built.options.exports / artifact.path
        text = (directory / "manifest.json").read_text()
        manifest = Manifest.model_validate_json(text)
        present = {p.name for p in directory.iterdir()} - {"manifest.json", "README.md"}
        assert {f.path for f in manifest.files} == present
        for file in manifest.files:
            data = (directory / file.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.size_bytes, file.sha256)
        assert manifest.lineage[0].task == "TakeIn"
        assert manifest.lineage[-1].task == "Export"
        assert manifest.license == "apache-2.0"
        assert "gguf" in manifest.libraries
        assert str(built.options.recipe.parent) not in text


@pytest.mark.slow
def test_a_second_build_runs_nothing_and_touches_nothing(built: Built) -> None:
    before = tree(built.options.exports)
    said: list[str] = []
    report, _ = build(built.options, said.append)
    assert all(step.cached for step in report.steps)
    assert tree(built.options.exports) == before
    assert [line for line in said if "warning" not in line] == []
    assert report.artifacts == built.report.artifacts
    assert report.peak_own_bytes == built.report.peak_own_bytes


@pytest.mark.slow
def test_a_plan_of_what_is_built_has_nothing_to_run(built: Built) -> None:
    plan = preview(built.options)
    assert plan.to_run == 0
    assert {s.key for s in plan.steps} == {s.key for s in built.report.steps}
    assert preview(replace(built.options, rebench=True)).to_run == 2
    for planned, artifact in zip(plan.artifacts, built.report.artifacts, strict=True):
        assert planned.weight_bytes == pytest.approx(artifact.weight_bytes, rel=0.01)


@pytest.mark.slow
def test_a_gemma_is_verified_in_gguf_and_onnx(tmp_path: Path) -> None:
    peaked_student(tmp_path / "student", "gemma3")
    text = MINIMAL.replace("  float: []\n", "").replace("[gguf]", "[gguf, onnx]")
    recipe = write_recipe(tmp_path, tmp_path / "student", text + "build: {{threads: 1}}\n")
    report, _ = build(Options(recipe, cache=tmp_path / "cache", exports=tmp_path / "exports"))
    assert report.exit_code == ExitCode.OK
    assert [(a.rung, a.format) for a in report.artifacts] == [("int8", "gguf"), ("int8", "onnx")]
    for artifact in report.artifacts:
        assert artifact.verification is not None
        assert all(check.passed for check in artifact.verification.checks)


@pytest.mark.slow
def test_a_crash_in_one_rung_does_not_stop_the_other(built: Built, tiny: Tiny) -> None:
    """The weights of int8 vanish from the cache and cannot be made: its directory is a file."""
    cache = open_cache(built.options.cache)
    plan = preview(built.options)
    broken = next(step.key for step in plan.steps if step.label == "int8/gguf: export")
    cache.forget(broken)
    (cache.root / "scratch" / broken).parent.mkdir(exist_ok=True)
    (cache.root / "scratch" / broken).write_text("in the way")
    try:
        said: list[str] = []
        report, _ = build(built.options, said.append)
    finally:
        (cache.root / "scratch" / broken).unlink()
    assert [a.rung for a in report.artifacts] == ["float"]
    assert [s.label for s in report.steps if s.error] == ["int8/gguf: export"]
    assert report.judgements[0].rung == "float"
    assert report.exit_code == ExitCode.STAGE_FAILED


def test_a_plan_runs_nothing_and_shows_sizes_and_cases(tiny: Tiny, tmp_path: Path) -> None:
    text = RECIPE.replace("peak_ram_gb: 8", "peak_ram_gb: 0.4")
    recipe = write_recipe(tmp_path, tiny("llama"), text)
    write_suite(tmp_path / "suite.jsonl")
    options = Options(recipe, cache=tmp_path / "cache", exports=tmp_path / "exports")
    plan = preview(options)
    assert plan.to_run == len(plan.steps)
    assert {a.cases for a in plan.artifacts} == {12}
    text = "\n".join(describe(plan))
    assert "to run  int8: quantize_rtn" in text
    assert "warning: reference: float32 logits needs ~0.4" in text
    assert "warning: int8: quantize_rtn" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "suite.jsonl"]
    with pytest.raises(UsageError, match="--only"):
        preview(replace(options, only=("int9",)))


def test_a_student_is_named_without_the_machines_directories() -> None:
    assert student_name("/home/somebody/models/mine") == "mine"
    assert student_name("pkg://package/file.gguf") == "pkg://package/file.gguf"
