"""Faults in published artifacts: of the files by their manifest, of the model by golden vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill.manifest import MANIFEST_FILE
from edgedistill.plugins import load_plugin
from edgedistill.recheck import Verifier
from edgedistill.results import Check
from edgedistill.verify.golden import replay_golden
from edgedistill.verify.manifest_files import check_files, read_manifest
from tests.artifact_tensors import CORE_ML
from tests.graph_faults import GRAPH_FAULTS
from tests.manifests import write_manifest
from tests.mutations import ALL, Fault
from tests.peaked import CONTEXT, THREADS, Good, export, make_good, verify
from tests.weight_faults import WEIGHT_FAULTS

pytestmark = pytest.mark.slow

WEIGHTS = {
    "gguf": "model.gguf",
    "onnx": "model.onnx.data",
    "coreml": str(CORE_ML / "weights/weight.bin"),
}
# A small adapter may leave tokens that lead clearly as they are; it moves the leads all the same.
SEEN_BY_GOLDEN = {
    "RoPE theta off": "golden: tokens",
    "two layers swapped": "golden: tokens",
    "a norm zeroed": "golden: tokens",
    "an adapter not merged": "golden: leads",
}
PLANTED: list[Fault] = [f for f in [*GRAPH_FAULTS, *WEIGHT_FAULTS] if f.name in SEEN_BY_GOLDEN]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return make_good(tmp_path_factory.mktemp("published"), "llama", {"float": []})["float"]


@pytest.fixture(scope="module")
def published(good: Good, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Format -> an artifact with its manifest, which is not to be written to."""
    made: dict[str, Path] = {}

    def make(format_name: str) -> Path:
        if format_name not in made:
            path = tmp_path_factory.mktemp("artifacts") / format_name
            export(good.rung.student, path, format_name)
            golden = verify(good, path, format_name).golden
            write_manifest(path, format_name, golden)
            made[format_name] = path
        return made[format_name]

    return make


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def replayed(artifact: Path, format_name: str) -> list[Check]:
    runtime = load_plugin("runtimes", load_plugin("exporters", format_name).runtime)()
    with runtime.open(artifact, context_tokens=CONTEXT, threads=THREADS) as session:
        return replay_golden(session, read_manifest(artifact).golden)


def truncate(artifact: Path, weights: Path) -> None:
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) * 3 // 4])


def flip_a_bit(artifact: Path, weights: Path) -> None:
    """The lowest bit of a weight: no logit would ever tell."""
    whole = bytearray(weights.read_bytes())
    whole[len(whole) * 3 // 4 & ~3] ^= 1
    weights.write_bytes(whole)


def add_a_stranger(artifact: Path, weights: Path) -> None:
    shutil.copy(weights, weights.with_name("old-weights"))


def lose_a_file(artifact: Path, weights: Path) -> None:
    next(artifact.rglob("tokenizer.json"), weights).unlink()


@pytest.mark.parametrize("format_name", ALL)
@pytest.mark.parametrize(
    ("plant", "caught_by"),
    [
        (truncate, "files: size"),
        (flip_a_bit, "files: sha256"),
        (add_a_stranger, "files: no strangers"),
        (lose_a_file, "files: all there"),
    ],
)
def test_a_fault_of_the_files_is_caught_by_the_manifest(
    published: Callable[[str], Path],
    tmp_path: Path,
    format_name: str,
    plant: Callable[[Path, Path], None],
    caught_by: str,
) -> None:
    artifact = Path(shutil.copytree(published(format_name), tmp_path / "artifact"))
    assert failed(check_files(artifact, read_manifest(artifact))) == set()
    plant(artifact, artifact / WEIGHTS[format_name])
    assert failed(check_files(artifact, read_manifest(artifact))) == {caught_by}


@pytest.mark.parametrize("format_name", ALL)
def test_the_manifest_of_another_artifact_is_caught(
    published: Callable[[str], Path], good: Good, tmp_path: Path, format_name: str
) -> None:
    artifact = Path(shutil.copytree(published(format_name), tmp_path / "artifact"))
    other = export(good.base.student, tmp_path / "other", format_name)
    write_manifest(other, format_name, read_manifest(artifact).golden)
    shutil.copy(other / MANIFEST_FILE, artifact / MANIFEST_FILE)
    assert "files: sha256" in failed(check_files(artifact, read_manifest(artifact)))


@pytest.mark.parametrize("format_name", ALL)
@pytest.mark.parametrize("fault", PLANTED, ids=[f.name.replace(" ", "-") for f in PLANTED])
def test_golden_vectors_catch_another_model_under_hashes_that_are_right(
    published: Callable[[str], Path], good: Good, tmp_path: Path, fault: Fault, format_name: str
) -> None:
    whole = published(format_name)
    golden = read_manifest(whole).golden
    assert golden, "a model this peaked leads clearly"
    assert failed(replayed(whole, format_name)) == set()
    faulty = fault.plants[format_name](good, whole, tmp_path / "faulty")
    write_manifest(faulty, format_name, golden)
    assert failed(check_files(faulty, read_manifest(faulty))) == set()
    assert SEEN_BY_GOLDEN[fault.name] in failed(replayed(faulty, format_name))


def test_the_command_tells_a_good_artifact_from_a_damaged_one(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    good_one = published("gguf")
    damaged = Path(shutil.copytree(good_one, tmp_path / "damaged"))
    flip_a_bit(damaged, damaged / WEIGHTS["gguf"])
    report = Verifier(cache=tmp_path / "cache", threads=THREADS, tell=_say_nothing).recheck(
        [good_one, damaged]
    )
    found = [failed(artifact.verification.checks) for artifact in report.artifacts]
    assert found == [set(), {"files: sha256"}]
    assert report.exit_code == 5


def _say_nothing(*_: Any, **__: Any) -> None:
    pass


def test_a_fault_of_the_list_is_there_to_be_planted() -> None:
    assert {fault.name for fault in PLANTED} == SEEN_BY_GOLDEN.keys()


def test_a_manifest_is_json_that_can_be_read_back(published: Callable[[str], Path]) -> None:
    path = published("gguf") / MANIFEST_FILE
    assert json.loads(path.read_text())["golden"][0]["steps"]
