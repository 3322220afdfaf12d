"""``edgedistill verify``: the good pass, planted faults fail by name, damage is no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgedistill
from edgedistill.chat import Chat
from edgedistill.content import files_below, sha256_file
from edgedistill.errors import ExitCode, InputError
from edgedistill.evaluate.command import Request, evaluate_artifact
from edgedistill.manifest import MANIFEST_FILE, Manifest, ManifestFile
from edgedistill.plugins import load_plugin
from edgedistill.publish import publish_artifact
from edgedistill.quantized import Grid
from edgedistill.recheck import Rechecked, RecheckReport, Verifier
from edgedistill.results import Verification
from edgedistill.student import Student
from edgedistill.verify.golden import make_golden
from edgedistill.verify.manifest_files import read_manifest
from tests.recipes import write_suite
from tests.rounded import round_student
from tests.tiny import write_student

Tiny = Callable[[str], Path]
CONTEXT = 256
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(edgedistill.__file__).parents[1])}


def export(student: Path, dst: Path, format_name: str = "gguf") -> Path:
    dst.mkdir(parents=True)
    load_plugin("exporters", format_name)().export(Student(student), dst, context_tokens=CONTEXT)
    return dst


def publish(student: Path, root: Path, format_name: str = "gguf") -> Path:
    """An artifact as a build publishes it, golden vectors and all."""
    files = export(student, root / "made", format_name)
    runtime = load_plugin("exporters", format_name).runtime
    opened = load_plugin("runtimes", runtime)().open(files, context_tokens=CONTEXT, threads=1)
    with opened as session:
        golden = make_golden(session, student)
    listed = [
        ManifestFile(
            path=p.relative_to(files).as_posix(),
            size_bytes=p.stat().st_size,
            sha256=sha256_file(p),
        )
        for p in files_below(files)
    ]
    manifest = Manifest(
        recipe="tiny",
        rung="float",
        format=format_name,
        runtime=runtime,
        edgedistill=edgedistill.__version__,
        license=None,
        student="tiny",
        context_tokens=CONTEXT,
        chat=Chat(),
        parameters=1,
        size_bytes=sum(f.size_bytes for f in listed),
        weight_bytes=1,
        bits_per_weight=8.0,
        shippable=True,
        why_not=None,
        files=listed,
        lineage=[],
        libraries={},
        verification=Verification(checks=[], against_weights=[], against_reference=[], settings={}),
        quality=None,
        budget=[],
        bench=None,
        golden=tuple(golden),
    )
    publish_artifact(files, manifest, root / "published")
    return root / "published"


@pytest.fixture(scope="module")
def published(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tiny("llama"), tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all: the judge of a student is asked once."""
    return tmp_path_factory.mktemp("cache")


def run(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgedistill", "verify", *map(str, arguments)]
    command += ["--cache", str(cache), "--threads", "1"]
    ran = subprocess.run(
        command,
        env={**ENVIRONMENT, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in ran.stdout + ran.stderr, ran.stderr
    return ran


def verify(cache: Path, *paths: Path, against: Path | None = None) -> RecheckReport:
    verifier = Verifier(cache, threads=1, tell=lambda _: None)
    return verifier.recheck(paths, str(against) if against else None)


def failed(item: Rechecked) -> set[str]:
    return {check.name for check in item.verification.checks if not check.passed}


def find(item: Rechecked, name: str) -> Any:
    return next(check for check in item.verification.checks if check.name == name)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / MANIFEST_FILE
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


# --- from the manifest alone -----------------------------------------------------------------


def test_a_published_artifact_is_verified_from_its_manifest(published: Path, cache: Path) -> None:
    ran = run(published, cache=cache)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "verified: " in ran.stdout
    assert "golden: tokens" in ran.stdout
    as_json = run(published, "--json", cache=cache)
    report = RecheckReport.model_validate_json(as_json.stdout)
    (item,) = report.artifacts
    assert (item.name, item.format, item.passed) == ("tiny/float/gguf", "gguf", True)
    assert find(item, "golden: tokens").passed


def flip_bit(directory: Path) -> None:
    path = directory / "model.gguf"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def truncate(directory: Path) -> None:
    path = directory / "model.gguf"
    path.write_bytes(path.read_bytes()[:-64])


def outside(directory: Path) -> None:
    (directory.parent / "secret").write_text("x")
    entry = {
        "path": "../secret",
        "size_bytes": 1,
        "sha256": sha256_file(directory.parent / "secret"),
    }
    edit_manifest(directory, lambda m: m["files"].append(entry))


def through_link(directory: Path) -> None:
    (directory.parent / "secret").write_text("x")
    (directory / "link").symlink_to(directory.parent / "secret")
    entry = {"path": "link", "size_bytes": 1, "sha256": sha256_file(directory.parent / "secret")}
    edit_manifest(directory, lambda m: m["files"].append(entry))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit flipped": (flip_bit, "files: sha256"),
    "truncated": (truncate, "files: size"),
    "a file gone": (lambda d: (d / "model.gguf").unlink(), "files: all there"),
    "a stranger": (lambda d: (d / "old.bin").write_text("x"), "files: no strangers"),
    "a path outside": (outside, "files: all there"),
    "a link outside": (through_link, "files: all there"),
    "an absolute path": (
        lambda d: edit_manifest(d, lambda m: m["files"][0].update(path="/etc/passwd")),
        "files: all there",
    ),
    "a NUL in a path": (
        lambda d: edit_manifest(d, lambda m: m["files"][0].update(path="a\0b")),
        "files: all there",
    ),
    "a path that is too long": (
        lambda d: edit_manifest(d, lambda m: m["files"][0].update(path="x" * 5000)),
        "files: all there",
    ),
    "no files": (lambda d: edit_manifest(d, lambda m: m.update(files=[])), "files: all there"),
    "another size": (
        lambda d: edit_manifest(d, lambda m: m.update(size_bytes=7)),
        "manifest: agrees with itself",
    ),
    "another runtime": (
        lambda d: edit_manifest(d, lambda m: m.update(runtime="onnx_runtime")),
        "manifest: agrees with itself",
    ),
    "no such format": (
        lambda d: edit_manifest(d, lambda m: m.update(format="../gguf")),
        "manifest: agrees with itself",
    ),
    "not JSON": (lambda d: (d / MANIFEST_FILE).write_text("{"), "manifest: readable"),
    "not a manifest": (lambda d: (d / MANIFEST_FILE).write_text("[]"), "manifest: readable"),
    "deep": (lambda d: (d / MANIFEST_FILE).write_text("[" * 100_000), "manifest: readable"),
    "bytes": (lambda d: (d / MANIFEST_FILE).write_bytes(b"\xff\x00" * 99), "manifest: readable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(published: Path, tmp_path: Path, cache: Path, damage: str) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    harm, name = DAMAGES[damage]
    harm(copy)
    report = verify(cache, copy)
    assert report.exit_code == ExitCode.VERIFICATION_FAILED
    assert name in failed(report.artifacts[0]), report.artifacts[0].verification.checks


def test_damage_on_the_command_line_is_exit_code_5(
    published: Path, tmp_path: Path, cache: Path
) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    flip_bit(copy)
    ran = run(copy, published, cache=cache)
    assert ran.returncode == 5
    assert "✗ files: sha256" in ran.stdout
    assert "not replayed" in ran.stdout
    assert "1 of 2 verified" in ran.stdout


def test_another_model_under_a_consistent_manifest_is_caught(
    published: Path, tmp_path: Path, cache: Path
) -> None:
    """Sizes and hashes agree: only what it says tells which model it is."""
    copy = shutil.copytree(published, tmp_path / "copy")
    other = export(write_student(tmp_path / "other", "llama", seed=5), tmp_path / "other-gguf")
    shutil.copyfile(other / "model.gguf", copy / "model.gguf")

    def relist(manifest: dict[str, Any]) -> None:
        (entry,) = manifest["files"]
        entry["sha256"] = sha256_file(copy / "model.gguf")
        entry["size_bytes"] = manifest["size_bytes"] = (copy / "model.gguf").stat().st_size

    edit_manifest(copy, relist)
    assert failed(verify(cache, copy).artifacts[0]) == {"golden: tokens", "golden: leads"}


def test_a_verdict_of_the_build_is_repeated(published: Path, tmp_path: Path, cache: Path) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    check = {"name": "logits: mean KL", "passed": False}
    edit_manifest(copy, lambda m: m["verification"]["checks"].append(check))
    edit_manifest(copy, lambda m: m.update(shippable=False, why_not="verification failed"))
    (item,) = verify(cache, copy).artifacts
    assert failed(item) == {"manifest: verified when built"}
    assert find(item, "golden: tokens").passed


def test_without_golden_vectors_it_is_said_that_nothing_was_run(
    published: Path, tmp_path: Path, cache: Path
) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    edit_manifest(copy, lambda m: m.pop("golden"))
    (item,) = verify(cache, copy).artifacts
    assert item.passed
    assert "nothing was run" in (item.verification.limitation or "")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mangled_manifest_is_an_input_error_or_a_manifest(published: Path, data: Any) -> None:
    text = bytearray((published / MANIFEST_FILE).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.integers(0, 40))
        text[start : start + length] = data.draw(st.binary(max_size=8))
    folder = published.parent / "mangled"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_FILE).write_bytes(text)
    try:
        found: Manifest | InputError = read_manifest(folder)
    except InputError as error:
        found = error
    assert isinstance(found, Manifest) or found.where == str(folder / MANIFEST_FILE)


@pytest.mark.parametrize("arguments", [("nowhere",), ("nowhere", "--against", "x")])
def test_a_path_that_is_not_there_is_a_usage_error(arguments: tuple[str, ...], cache: Path) -> None:
    ran = run(*arguments, cache=cache)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")


def test_a_file_without_a_manifest_asks_for_a_student(
    tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    ran = run(export(tiny("llama"), tmp_path / "a") / "model.gguf", cache=cache)
    assert ran.returncode == 2
    assert "hint: name the student that it should be: --against STUDENT" in ran.stderr


# --- files that others made -------------------------------------------------------------------


def quantize_by_llama_cpp(src: Path, dst: Path, file_type: int) -> Path:
    """A file of another quantization, made by llama.cpp itself."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    done = llama_cpp.llama_model_quantize(str(src).encode(), str(dst).encode(), parameters)
    assert done == 0
    return dst


def set_gguf(path: Path, key: str, value: float) -> None:
    import gguf

    field = gguf.GGUFReader(path, "r+").fields[key]
    field.parts[field.data[0]][0] = value


def edit_tensor(path: Path, name: str, edit: Callable[[np.ndarray], Any]) -> None:
    """Change a tensor's stored rows in place, with the gguf package's own reader."""
    import gguf

    tensors = gguf.GGUFReader(path, "r+").tensors
    edit(next(t.data for t in tensors if t.name == name))


@pytest.fixture(scope="module")
def foreign(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student as llama.cpp's own Q8_0."""
    root = tmp_path_factory.mktemp("foreign")
    plain = export(tiny("llama"), root / "plain") / "model.gguf"
    return quantize_by_llama_cpp(plain, root / "other-name.Q8_0.gguf", 7)


def test_a_file_by_another_program_is_verified(tiny: Tiny, foreign: Path, cache: Path) -> None:
    ran = run(foreign, "--against", tiny("llama"), cache=cache)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "loss: KL to the reference" in ran.stdout
    (item,) = verify(cache, foreign, against=tiny("llama")).artifacts
    groups = {check.name.partition(":")[0] for check in item.verification.checks}
    text = {"tokenizer", "template", "tokens"}
    assert groups == {"lint", "logits", "weights", "loss", "cache"} | text
    assert "rounding its weights alone costs" in find(item, "loss: KL to the reference").detail


def swap(rows: np.ndarray) -> None:
    rows[[3, 40]] = rows[[40, 3]]


def unpermute(rows: np.ndarray) -> None:
    heads, head_dim = 4, 16
    halves = rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape).copy()
    rows[:] = halves


def zero(values: np.ndarray) -> None:
    values[:] = 0


FAULTS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "RoPE theta": (
        lambda p: set_gguf(p, "llama.rope.freq_base", 500000.0),
        {"lint: RoPE theta", "logits: as its weights"},
    ),
    "norm epsilon": (
        lambda p: set_gguf(p, "llama.attention.layer_norm_rms_epsilon", 1e-2),
        {"lint: norm epsilon"},
    ),
    "EOS": (lambda p: set_gguf(p, "tokenizer.ggml.eos_token_id", 9), {"lint: EOS"}),
    "BOS": (
        lambda p: set_gguf(p, "tokenizer.ggml.add_bos_token", 1),
        {"lint: BOS put before a text"},
    ),
    "context": (lambda p: set_gguf(p, "llama.context_length", 4096), {"lint: context length"}),
    "a norm zeroed": (
        lambda p: edit_tensor(p, "blk.1.ffn_norm.weight", zero),
        {"weights: norms and biases"},
    ),
    "q not permuted": (
        lambda p: edit_tensor(p, "blk.1.attn_q.weight", unpermute),
        {"weights: like the reference's"},
    ),
    "a matrix zeroed": (
        lambda p: edit_tensor(p, "blk.2.ffn_up.weight", zero),
        {"weights: like the reference's"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_structural_fault_of_a_foreign_file_is_named(
    tiny: Tiny, foreign: Path, tmp_path: Path, cache: Path, fault: str
) -> None:
    harm, names = FAULTS[fault]
    copy = Path(shutil.copyfile(foreign, tmp_path / "copy.gguf"))
    harm(copy)
    report = verify(cache, copy, against=tiny("llama"))
    assert report.exit_code == ExitCode.VERIFICATION_FAILED
    assert names <= failed(report.artifacts[0]), report.artifacts[0].verification.checks


@pytest.mark.slow
def test_coarse_rounding_is_told_from_structure(tiny: Tiny, tmp_path: Path, cache: Path) -> None:
    """llama.cpp's Q4_0 of random weights loses much; all of it is rounding."""
    plain = export(tiny("llama"), tmp_path / "plain") / "model.gguf"
    coarse = quantize_by_llama_cpp(plain, tmp_path / "coarse.gguf", 2)
    (item,) = verify(cache, coarse, against=tiny("llama")).artifacts
    assert failed(item) <= {"loss: KL to the reference"}
    loss = find(item, "loss: KL to the reference")
    alone = float(loss.detail.rpartition("alone costs ")[2])
    assert loss.value == pytest.approx(alone, rel=0.3, abs=0.02)
    # The same loss with a fault on top of it is not taken for rounding.
    set_gguf(coarse, "llama.rope.freq_base", 500000.0)
    (item,) = verify(cache, coarse, against=tiny("llama")).artifacts
    assert {"lint: RoPE theta", "logits: as its weights"} <= failed(item)


@pytest.mark.slow
def test_a_tokenizer_of_another_model_is_named(
    tiny: Tiny, foreign: Path, tmp_path: Path, cache: Path
) -> None:
    student = shutil.copytree(tiny("llama"), tmp_path / "student")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    (item,) = verify(cache, foreign, against=student).artifacts
    assert any(name.startswith("tokenizer") for name in failed(item))


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["onnx", "coreml"])
def test_other_formats_are_held_against_a_student(
    tiny: Tiny, tmp_path: Path, cache: Path, format_name: str
) -> None:
    quantized = round_student(tiny("llama"), tmp_path / "student", Grid(8, 32))
    good = export(quantized, tmp_path / "good", format_name)
    paths = [good]
    if format_name == "coreml":
        # Alone and under another name, without the files beside it.
        paths.append(Path(shutil.copytree(good / "model.mlpackage", tmp_path / "Other.mlpackage")))
    report = verify(cache, *paths, against=tiny("llama"))
    assert report.exit_code == 0, report.model_dump_json(indent=1)
    faulty = shutil.copytree(quantized, tmp_path / "faulty")
    config = json.loads((faulty / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (faulty / "config.json").write_text(json.dumps(config))
    bad = export(faulty, tmp_path / "bad", format_name)
    (item,) = verify(cache, bad, against=tiny("llama")).artifacts
    assert {"lint: RoPE theta", "loss: KL to the reference"} <= failed(item)


@pytest.mark.slow
def test_a_graph_by_the_builder_of_onnxruntime_genai_is_verified_and_evaluated(
    tiny: Tiny, tmp_path: Path, cache: Path
) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(tiny("llama3")), "-o", str(tmp_path / "built"), "-p", "fp32", "-e", "cpu"]
    command += ["-c", str(tmp_path / "scratch")]
    made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert made.returncode == 0, made.stderr[-2000:]
    report = verify(cache, tmp_path / "built", against=tiny("llama3"))
    (item,) = report.artifacts
    assert report.exit_code == 0, item.verification.checks
    assert find(item, "loss: KL to the reference").value < 1e-6
    assert find(item, "lint: RoPE scaling").passed
    (item,) = verify(cache, tmp_path / "built", against=tiny("llama")).artifacts
    assert {"lint: RoPE scaling", "lint: head size", "loss: KL to the reference"} <= failed(item)
    suite = write_suite(tmp_path / "suite.jsonl", 24)
    asked = Request(tmp_path / "built", (suite,), str(tiny("llama3")), cache, threads=1)
    found = evaluate_artifact(asked, lambda _: None).evaluation
    assert found is not None
    assert found.runtime == "other_onnx"
    assert found.overall.retention == 1
    assert found.overall.choice is not None
    assert found.overall.choice.divergence.max < 1e-6


@pytest.mark.parametrize("size", [3, 1000, 20000])
def test_a_damaged_foreign_file_fails_without_a_traceback(
    tiny: Tiny, foreign: Path, tmp_path: Path, cache: Path, size: int
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(foreign.read_bytes()[:size])
    ran = run(damaged, "--against", tiny("llama"), cache=cache)
    assert ran.returncode == 5
    assert "✗ file: readable" in ran.stdout


def test_what_is_no_model_is_a_usage_error(tiny: Tiny, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.txt").write_text("x")
    for path in (tmp_path / "model.txt", tmp_path):
        ran = run(path, "--against", tiny("llama"), cache=cache)
        assert ran.returncode == 2
        assert "is not one artifact of a format that is known here" in ran.stderr


# --- the page ---------------------------------------------------------------------------------


def test_the_page_shows_every_check_of_every_artifact(
    published: Path, tmp_path: Path, cache: Path
) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    (copy / "<script>alert(1)<b>\x1b[31m").write_text("x")
    page = tmp_path / "page.html"
    assert run(published, copy, "--page", page, cache=cache).returncode == 5
    text = page.read_text(encoding="utf-8")
    assert text.count('<td class="good"') + text.count('<td class="bad"') == 14
    assert text.count('<td class="bad"') == 1
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "1 of 2 verified" in text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
