"""Damaged and hostile files end in an EdgedistillError: no other error, hang or huge allocation."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import EdgedistillError
from edgedistill.evaluate.score import SCORES_FILE, TIMING_FILE, read_scores, read_seconds
from edgedistill.evaluate.suite import load_suite
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_intake import convert_gguf, read_gguf_facts
from edgedistill.intake import read_facts
from edgedistill.manifest import MANIFEST_FILE
from edgedistill.plugins import load_plugin
from edgedistill.recipe_load import load_recipe
from edgedistill.results import GoldenVector
from edgedistill.safetensors_file import SafetensorsFile
from edgedistill.student import Student
from edgedistill.verify.manifest_files import check_files, read_manifest
from tests.artifact_tensors import rewrite_gguf
from tests.damage import JUNK, damaged_bytes, damaged_json
from tests.manifests import write_manifest
from tests.recipes import MINIMAL, write_suite
from tests.tiny import write_student

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MEMORY_BYTES = 1 << 30  # more than this for a file of some kilobytes is a length that was believed
SLOWEST = timedelta(seconds=5)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
}


@contextmanager
def limited_memory() -> Iterator[None]:
    """A giant allocation fails, as a MemoryError, which no reader turns into a message."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusals(
    inputs: st.SearchStrategy[Any], read: Callable[[Any], object], examples: int
) -> tuple[int, int]:
    """How many inputs were refused with an EdgedistillError, and how many were taken."""
    counts = {True: 0, False: 0}

    @settings(max_examples=examples, deadline=SLOWEST, derandomize=True, database=None)
    @given(inputs)
    def run(damaged: Any) -> None:
        try:
            read(damaged)
        except EdgedistillError as error:
            counts[bool(str(error))] += 1
        else:
            counts[False] += 1

    with limited_memory():
        run()
    return counts[True], counts[False]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("fuzz") / "student", "llama3", **SMALL)


@pytest.fixture(scope="module", params=["llama", "granite", "gemma2", "gemma3"])
def gguf(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A GGUF file that our own intake takes: a llama3 of this size has not Llama 3.1's bands."""
    root = tmp_path_factory.mktemp("gguf")
    student = write_student(root / "student", request.param, **SMALL)
    load_plugin("exporters", "gguf")().export(Student(student), root, context_tokens=64)
    return root / "model.gguf"


@pytest.fixture
def copied(student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student, tmp_path / "copied"))


def test_safetensors_of_damaged_bytes(tmp_path: Path) -> None:
    from safetensors.numpy import save

    tensors = {"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.int8), "c": np.ones((), "f2")}
    path = tmp_path / "x.safetensors"

    def read(damaged: bytes) -> None:
        path.write_bytes(damaged)
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.read(name)

    refused, taken = refusals(damaged_bytes(save(tensors)), read, 1000)
    assert refused > 300
    assert taken > 10


def test_safetensors_with_a_damaged_header(tmp_path: Path) -> None:
    from safetensors.numpy import save

    whole = save({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.int8)})
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    path = tmp_path / "x.safetensors"

    def read(text: str) -> None:
        path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.read(name)

    refused, _ = refusals(damaged_json(header), read, 500)
    assert refused > 300


@pytest.mark.parametrize(
    "family",
    ["llama3", "qwen2_yarn", "qwen3_sliding", "smollm3", "granite", "gemma2", "gemma3"],
)
def test_configs_with_damaged_values(tmp_path: Path, family: str) -> None:
    copied = write_student(tmp_path / "copied", family, **SMALL)
    path = copied / "config.json"
    config = json.loads(path.read_text())

    def read(text: str) -> None:
        path.write_text(text)
        facts = read_facts(copied)
        for layer in (0, facts.layers - 1):
            if rope := facts.rope_of(layer):
                rope.inverse_frequencies(facts.rotary_dim)

    refused, taken = refusals(damaged_json(config), read, 500)
    assert refused > 50
    assert taken > 50  # most keys of a config do not concern us


def test_gguf_files_of_damaged_bytes(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = gguf.read_bytes()
    path.write_bytes(whole)
    header = min(tensor.start for tensor in GgufFile(path).tensors.values()) / len(whole)

    def read(damaged: bytes) -> None:
        path.write_bytes(damaged)
        file = GgufFile(path)
        for name in file.tensors:
            file.read(name)
        read_gguf_facts(path)

    refused, taken = refusals(damaged_bytes(whole, until=header), read, 1000)
    assert refused > 300
    assert taken > 10


def test_gguf_files_whose_metadata_are_of_other_types(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    whole = gguf.read_bytes()
    path.write_bytes(whole)
    keys = [*GgufFile(path).metadata, "split.count", "general.alignment", "llama.expert_count"]
    values = st.one_of(
        st.integers(-(2**31), 2**31 - 1),
        st.floats(width=32),
        st.booleans(),
        st.text(st.characters(codec="utf-8"), max_size=20),
        st.lists(st.integers(-9, 2**31 - 1), min_size=1, max_size=9),
        st.lists(st.text("ab ", max_size=3), min_size=1, max_size=9),
    )

    def read(change: tuple[str, Any]) -> None:
        path.write_bytes(whole)
        rewrite_gguf(tmp_path, {}, added=dict([change]))
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        convert_gguf(path, out)

    refused, taken = refusals(st.tuples(st.sampled_from(keys), values), read, 300)
    assert refused > 50
    assert taken > 20


def test_suites_with_damaged_values(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    case = json.loads(write_suite(path, 1).read_text()) | {"soft_label": [1, 0, 0], "weight": 2.5}

    def read(text: str) -> None:
        path.write_text(text)
        load_suite([path])

    refused, taken = refusals(damaged_json(case), read, 700)
    assert refused > 300
    assert taken > 10


def test_suites_and_scores_of_damaged_bytes(tmp_path: Path) -> None:
    suite, scores = write_suite(tmp_path / "suite.jsonl"), tmp_path / SCORES_FILE
    lines = [{"id": f"case-{i}", "log_probs": [-1.5, -0.25, -3.0]} for i in range(9)]
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read_into(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
        def run(damaged: bytes) -> object:
            path.write_bytes(damaged)
            return read()

        return run

    for path, read in (
        (suite, lambda: load_suite([suite])),
        (scores, lambda: read_scores(tmp_path)),
    ):
        refused, _ = refusals(damaged_bytes(path.read_bytes()), read_into(path, read), 500)
        assert refused > 100


def test_scores_with_damaged_values(tmp_path: Path) -> None:
    line = {"id": "case-1", "log_probs": [-1.5, -0.25, -3.0]}

    def read(text: str) -> None:
        (tmp_path / SCORES_FILE).write_text(text)
        read_scores(tmp_path)

    refused, _ = refusals(damaged_json(line), read, 300)
    assert refused > 100

    def read_timing(text: str) -> None:
        (tmp_path / TIMING_FILE).write_text(text)
        read_seconds(tmp_path)

    refused, _ = refusals(damaged_json({"seconds": 1.5, "cases": 3}), read_timing, 200)
    assert refused > 50


def test_recipes_with_damaged_values(student: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(MINIMAL.format(student=student))
    recipe |= {
        "suite": str(write_suite(tmp_path / "suite.jsonl")),
        "floor": {"retention": 0.9, "max_broken": 0.1},
        "slices": {"odd": {"protected": True}},
        "chat": {"system": "Be brief.", "template_args": {"a": 1}},
        "texts": {"own": str(tmp_path / "suite.jsonl")},
    }
    path = tmp_path / "recipe.yaml"

    def read(text: str) -> None:
        path.write_text(text)
        load_recipe(path)

    load_recipe(_written(path, json.dumps(recipe)))
    refused, _ = refusals(damaged_json(recipe), read, 500)
    assert refused > 200


def test_recipes_of_damaged_bytes(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    whole = MINIMAL.format(student=student).encode()

    def read(damaged: bytes) -> None:
        path.write_bytes(damaged)
        load_recipe(path)

    refused, _ = refusals(damaged_bytes(whole), read, 500)
    assert refused > 200


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("format_name", "inputs"), [("onnx", 400), ("coreml", 400)])
def test_artifacts_through_their_runtimes(
    student: Path, tmp_path: Path, format_name: str, inputs: int
) -> None:
    """In a process of its own: a crash of the runtime would end this one."""
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    load_plugin("exporters", format_name)().export(Student(student), artifact, context_tokens=64)
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_open", format_name, str(artifact), str(inputs), "0"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    refused, taken = (int(count) for count in ended.stdout.split())
    assert refused + taken == inputs
    assert refused > inputs / 4


def test_junk_covers_what_json_can_spell() -> None:
    kinds = {type(value) for value in JUNK}
    assert kinds >= {type(None), bool, int, float, str, list, dict}


def test_manifests_with_damaged_values(tmp_path: Path) -> None:
    manifest = json.loads(_small_artifact(tmp_path))

    def read(text: str) -> None:
        (tmp_path / MANIFEST_FILE).write_text(text)
        check_files(tmp_path, read_manifest(tmp_path))

    refused, taken = refusals(damaged_json(manifest), read, 700)
    assert refused > 200
    assert taken > 10


def test_manifests_of_damaged_bytes(tmp_path: Path) -> None:
    whole = _small_artifact(tmp_path).encode()

    def read(damaged: bytes) -> None:
        (tmp_path / MANIFEST_FILE).write_bytes(damaged)
        check_files(tmp_path, read_manifest(tmp_path))

    refused, _ = refusals(damaged_bytes(whole), read, 500)
    assert refused > 200


def _small_artifact(directory: Path) -> str:
    """A directory of three files, and the text of its manifest."""
    for name in "abc":
        (directory / name).write_text(name * 100)
    vector = GoldenVector(prompt="Hi", ids=[1, 2], steps=[3, 4, 5], leads=[1.0, 0.9, 0.8])
    write_manifest(directory, "gguf", [vector])
    return (directory / MANIFEST_FILE).read_text()
