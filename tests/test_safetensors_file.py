from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import InputError
from edgedistill.safetensors_file import SafetensorsFile


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5).to(torch.float16),
        "brain": torch.randn(7, 2).to(torch.bfloat16),
        "single": torch.randn(4),
        "codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def test_every_dtype_is_read_as_the_library_reads_it(whole: Path) -> None:
    import torch
    from safetensors.torch import load_file

    file = SafetensorsFile(whole)
    expected = load_file(whole)
    assert set(file.tensors) == set(expected)
    for name, tensor in expected.items():
        value = file.read(name)
        assert value.shape == tuple(tensor.shape)
        # numpy has no bfloat16: it comes as the float32 of the same value.
        widened = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
        assert value.dtype == widened.numpy().dtype
        assert np.array_equal(value, widened.numpy())


@pytest.mark.parametrize("name", ["half", "brain", "single"])
def test_rows_are_read_as_tensors_of_their_own(whole: Path, name: str) -> None:
    file = SafetensorsFile(whole)
    expected = file.read(name)
    file.split_rows(name, {"above": 1, "below": len(expected) - 1})
    assert name not in file.tensors
    assert np.array_equal(file.read("above"), expected[:1])
    assert np.array_equal(file.read("below"), expected[1:])
    assert file.tensors["below"].size_bytes == file.tensors["above"].size_bytes * (
        len(expected) - 1
    )


@pytest.mark.parametrize("name", ["half", "one", "none"])
def test_rows_that_a_tensor_does_not_have_are_refused(whole: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} of shape .* 9 rows of above, below"):
        SafetensorsFile(whole).split_rows(name, {"above": 4, "below": 5})


def test_some_rows_are_those_of_the_whole_tensor(whole: Path) -> None:
    file = SafetensorsFile(whole)
    for name in ("half", "brain", "single", "codes", "none"):
        for rows in (slice(0, 1), slice(1, 3), slice(2, 99)):
            part = file.read(name, rows)
            np.testing.assert_array_equal(part, file.read(name)[rows])
            assert part.dtype == file.read(name).dtype


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused_with_a_hint(whole: Path, kept: int) -> None:
    whole.write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"not a whole safetensors file[\s\S]*hint: .*again"):
        SafetensorsFile(whole)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        SafetensorsFile(tmp_path / "gone.safetensors")


def _with_header(path: Path, header: object) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}, "has 12 bytes, not 16"),
        ({"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}, "ends at byte"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "-8 bytes"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}, "has 0 bytes"),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "F8_E4M3"),
        ({"dtype": "F32", "shape": [1]}, "malformed"),
        ({"dtype": "F32", "shape": "two", "data_offsets": [0, 4]}, "malformed"),
        ([], "malformed"),
    ],
)
def test_an_entry_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, entry: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SafetensorsFile(_with_header(tmp_path / "x.safetensors", {"w": entry}))


def test_a_header_that_is_not_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a table"):
        SafetensorsFile(_with_header(tmp_path / "x.safetensors", [1, 2]))
    (tmp_path / "y.safetensors").write_bytes((9).to_bytes(8, "little") + b"{'w': 12}")
    with pytest.raises(InputError, match="not JSON"):
        SafetensorsFile(tmp_path / "y.safetensors")
