from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedistill.errors import EdgedistillError, InputError, UnavailableError, UsageError
from edgedistill.intake import dequantize, read_facts, resolve_student, take_in
from edgedistill.stages.quantize_rtn import QuantizeRtn
from edgedistill.student import Student

Tiny = Callable[[str], Path]


def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "student"))


def test_a_directory_is_linked_and_reads_the_same(tiny: Tiny, tmp_path: Path) -> None:
    source, dst = copy(tiny, tmp_path), tmp_path / "dst"
    dst.mkdir()
    (source / "optimizer.pt").write_bytes(b"not for us")
    take_in(source, dst)
    before, after = Student(source), Student(dst)
    assert before.names() == after.names()
    assert (before.read(before.names()[0]) == after.read(before.names()[0])).all()
    assert (source / "model.safetensors").samefile(dst / "model.safetensors")
    assert not (source / "config.json").samefile(dst / "config.json")
    assert not (dst / "optimizer.pt").exists()


def test_a_gguf_in_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = resolve_student("pkg://some_model/model.gguf", tmp_path)
    assert found == package / "model.gguf"


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("nowhere", InputError, "no such student"),
        ("pkg://no_such_package/x.gguf", InputError, "no_such_package is not installed"),
        ("pkg://json/../x.gguf", UsageError, "pkg://package/file.gguf"),
        ("hf://org/name", UsageError, "hf://org/name@REVISION"),
        ("s3://bucket/name", UsageError, "of no known kind"),
        ("weights.pt", InputError, "is a pickle"),
        ("weights.txt", InputError, "neither a directory nor a .gguf"),
    ],
)
def test_a_source_that_cannot_be_is_refused(
    tmp_path: Path, source: str, kind: type[EdgedistillError], words: str
) -> None:
    for name in ("weights.pt", "weights.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(kind, match=words):
        resolve_student(source, tmp_path)


def test_the_hub_out_of_reach_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        resolve_student("hf://some-org/some-model@0123abc", tmp_path)
    assert caught.value.exit_code == 7
    assert "--student" in (caught.value.hint or "")


def test_a_truncated_file_is_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    source = copy(tiny, tmp_path)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_facts(source)


def test_a_pickled_checkpoint_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = copy(tiny, tmp_path)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights"):
        read_facts(source)


def test_tensors_of_another_shape_than_the_config_says_are_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    source = copy(tiny, tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] *= 2
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its config asks for"):
        read_facts(source)


def test_tensors_that_would_be_lost_are_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("qwen2"), tmp_path / "student"))
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = "llama"  # the same shapes, but without the biases of q, k and v
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"_proj\.bias and 8 more tensors"):
        read_facts(source)


def test_a_student_without_a_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source, dst = copy(tiny, tmp_path), tmp_path / "dst"
    dst.mkdir()
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"without tokenizer\.json"):
        take_in(source, dst)


def test_a_quantized_student_is_refused_and_its_dequantized_copy_taken(
    tiny: Tiny, tmp_path: Path
) -> None:
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    quantized.mkdir()
    QuantizeRtn(bits=8).run(tiny("llama"), quantized)
    with pytest.raises(InputError, match="quantized already"):
        read_facts(quantized)
    dequantize(quantized, plain)
    assert read_facts(plain) == read_facts(tiny("llama"))
    with pytest.raises(InputError, match="exists already"):
        dequantize(quantized, plain)
    assert not list(tmp_path.glob(".new-*"))
