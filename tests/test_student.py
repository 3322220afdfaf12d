from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill import student as student_module
from edgedistill.errors import InputError
from edgedistill.quantized import Grid, QTensor
from edgedistill.student import (
    INDEX_FILE,
    Student,
    StudentWriter,
    dequantize_student,
    read_json,
    write_json,
)
from tests.rounded import random_grid_student, random_tensor
from tests.tiny import FUSED_MODULES, parts_of

Tiny = Callable[[str], Path]


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "student"))


def _rewrite(src: Path, dst: Path) -> Student:
    dst.mkdir()
    student = Student(src)
    with StudentWriter(dst, student) as writer:
        for name in student.names():
            writer.write(name, student.read(name))
    return Student(dst)


def test_tensors_are_those_that_transformers_opens(tiny: Tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    student = Student(tiny("qwen2"))
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    expected = {n: p.detach().numpy() for n, p in model.named_parameters()}
    assert set(student.names()) == set(expected)
    for name, value in expected.items():
        assert name in student
        assert student.shape(name) == value.shape
        assert np.array_equal(student.read(name), value)


def test_a_written_student_in_many_shards_opens_in_transformers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(student_module, "SHARD_BYTES", 50_000)
    written = _rewrite(tiny("llama3"), tmp_path / "out")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert not list((tmp_path / "out").glob("shard-*"))
    ids = torch.arange(40)[None]
    logits = []
    for directory in (tiny("llama3"), written.path):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
    text = "x = 12345"
    first, second = (AutoTokenizer.from_pretrained(d) for d in (tiny("llama3"), written.path))
    assert first(text).input_ids == second(text).input_ids


def test_a_shard_is_closed_before_it_grows_over_its_limit(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_module, "SHARD_BYTES", 140_000)
    _rewrite(tiny("llama"), tmp_path / "out")
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 140_000 + 10_000 for shard in shards)


@pytest.mark.parametrize(
    "grid",
    [Grid(8, 32), Grid(5, 32), Grid(4, 32), Grid(4, 32, "integer"), Grid(3, 32), Grid(2, 64)],
    ids=str,
)
def test_a_quantized_tensor_comes_back_code_by_code(tiny: Tiny, tmp_path: Path, grid: Grid) -> None:
    like = Student(tiny("llama"))
    tensor = random_tensor(grid, 6, 128)
    with StudentWriter(tmp_path, like) as writer:
        writer.write("x.weight", tensor)
        writer.write("y.weight", np.arange(3, dtype=np.float32))
    student = Student(tmp_path)
    assert student.is_quantized
    assert student.names() == ["x.weight", "y.weight"]
    assert student.shape("x.weight") == (6, 128)
    back = student.read_quantized("x.weight")
    assert back.grid == grid
    assert np.array_equal(back.codes, tensor.codes)
    assert np.array_equal(back.scales.view(np.uint16), tensor.scales.view(np.uint16))
    assert np.array_equal(back.zero_points(), tensor.zero_points())
    assert np.array_equal(student.read("x.weight"), tensor.dequantize())


def test_a_dequantized_copy_opens_in_transformers_with_the_same_weights(
    tiny: Tiny, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    packed = random_grid_student(tiny("llama"), tmp_path / "packed", Grid(4, 32, "integer"))
    plain = tmp_path / "plain"
    plain.mkdir()
    dequantize_student(packed, plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    assert not Student(plain).is_quantized
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), Student(packed).read(name))


def test_a_new_student_needs_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config"):
        StudentWriter(tmp_path)


def test_nothing_is_committed_when_writing_fails(tiny: Tiny, tmp_path: Path) -> None:
    student = Student(tiny("llama"))
    with pytest.raises(RuntimeError), StudentWriter(tmp_path, student) as writer:  # noqa: PT012
        writer.write("x", np.zeros(3, dtype=np.float32))
        raise RuntimeError
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(InputError):
        Student(tmp_path)


def test_pickled_weights_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model.bin\)"):
        Student(copied)


def test_a_truncated_shard_is_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Student(copied)


def test_what_is_missing_is_named(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tensor model\.layers\.9"):
        Student(copied).read("model.layers.9.mlp.up_proj.weight")
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        Student(copied)
    with pytest.raises(InputError, match=r"no config\.json"):
        Student(tmp_path / "nowhere")


def test_an_index_that_points_outside_the_directory_is_refused(copied: Path) -> None:
    write_json(copied / INDEX_FILE, {"weight_map": {"x": "../elsewhere.safetensors"}})
    with pytest.raises(InputError, match="outside"):
        Student(copied)
    write_json(copied / INDEX_FILE, {"weight_map": []})
    with pytest.raises(InputError, match="no weight_map"):
        Student(copied)
    write_json(copied / INDEX_FILE, {"weight_map": {"x": "model-00009.safetensors"}})
    with pytest.raises(InputError, match=r"model-00009\.safetensors: cannot be read"):
        Student(copied)


@pytest.mark.parametrize(
    "fields", [{"bits": 3}, {"bits": 4, "group_size": 32, "extra": 1}, [4, 32]]
)
def test_a_grid_that_does_not_exist_is_refused(copied: Path, fields: object) -> None:
    write_json(copied / "grids.json", {"model.norm.weight": fields})
    with pytest.raises(InputError, match=r"grids\.json: model\.norm\.weight"):
        Student(copied)


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("[1]")
    with pytest.raises(InputError, match="not a JSON object"):
        read_json(file)
    file.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_json(file)


def test_grids_stand_beside_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    grid = Grid(4, 32, "integer")
    tensor: QTensor = random_tensor(grid, 2, 64)
    with StudentWriter(tmp_path, Student(tiny("llama"))) as writer:
        writer.write("x.weight", tensor)
    stored = json.loads((tmp_path / "grids.json").read_text())
    assert stored == {"x.weight": {"bits": 4, "group_size": 32, "zero": "integer"}}
    # Two codes a byte: the packed matrix has half as many columns.
    assert Student(tmp_path).stored("x.weight.codes").shape == (2, 32)


def _stored(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    stored: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        stored |= load_file(file)
    return stored


def test_parts_of_a_fused_tensor_are_tensors_of_their_own(tiny: Tiny) -> None:
    student, stored = Student(tiny("phi3_sliding")), _stored(tiny("phi3_sliding"))
    rows_of = {"q": 64, "k": 32, "v": 32, "gate": 128, "up": 128}
    for module in FUSED_MODULES:
        whole = f"model.layers.1.{module}.weight"
        assert whole not in student
        assert whole not in student.names()
        with pytest.raises(InputError, match="has no tensor"):
            student.read(whole)
        start = 0
        for name in parts_of(whole):
            rows = rows_of[name.split(".")[-2].removesuffix("_proj")]
            assert name in student
            assert name in student.names()
            assert student.shape(name) == student.stored(name).shape == (rows, 64)
            assert np.array_equal(student.read(name), stored[whole][start : start + rows])
            start += rows
        assert start == len(stored[whole])


def test_reading_a_part_maps_no_more_than_its_rows(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, mapped = Student(tiny("phi3_sliding")), list[int]()

    def memmap(*args: Any, **kwargs: Any) -> np.ndarray:
        array = real(*args, **kwargs)
        mapped.append(array.nbytes)
        return array

    real = np.memmap
    monkeypatch.setattr(np, "memmap", memmap)
    student.read(student.facts.linears(1)["k"])
    assert mapped == [4 * 32 * 64]


def test_what_is_written_part_by_part_is_the_checkpoint_again(tiny: Tiny, tmp_path: Path) -> None:
    source, stored = tiny("phi4_mini"), _stored(tiny("phi4_mini"))
    written = _rewrite(source, tmp_path / "out")
    again = _stored(written.path)
    assert set(again) == set(stored)
    for name, values in stored.items():
        assert again[name].tobytes() == values.tobytes()
    assert written.names() == Student(source).names()


def test_a_fused_student_that_is_quantized_and_dequantized_opens_in_transformers(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Its matrices are stored one by one while they are quantized."""
    import torch
    from transformers import AutoModelForCausalLM

    packed = random_grid_student(tiny("phi3_sliding"), tmp_path / "packed", Grid(4, 32, "integer"))
    assert not [name for name in _stored(packed) if "qkv_proj" in name or "gate_up" in name]
    (plain := tmp_path / "plain").mkdir()
    dequantize_student(packed, plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    student = Student(packed)
    for name, parameter in model.named_parameters():
        expected = np.concatenate([student.read(part) for part in parts_of(name)])
        assert np.array_equal(parameter.detach().numpy(), expected)


def test_float_parts_beside_quantized_ones_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    source = Student(tiny("phi3_sliding"))
    q, k, v = (source.facts.linears(0)[short] for short in "qkv")
    with StudentWriter(tmp_path, source) as writer:
        writer.write(q, random_tensor(Grid(4, 32), 64, 64))
        for name in source.names():
            if name != q:
                writer.write(name, source.read(name))
    student = Student(tmp_path)
    assert student.names() == source.names()
    assert list(student.grids) == [q]
    for name in (k, v):
        assert np.array_equal(student.read(name), source.read(name))


def test_a_fused_tensor_of_other_rows_or_beside_its_parts_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    copied = Path(shutil.copytree(tiny("phi3_sliding"), tmp_path / "student"))
    stored, fused = _stored(copied), "model.layers.1.mlp.gate_up_proj.weight"
    file = copied / "model.safetensors"
    save_file(stored | {fused: stored[fused][:-1].copy()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{fused} of shape \(255, 64\) does not hold the 256"):
        Student(copied)
    save_file(stored | {Student(tiny("phi3_sliding")).facts.linears(1)["up"]: stored[fused]}, file)
    with pytest.raises(InputError, match=rf"up_proj.weight beside {fused}"):
        Student(copied)
