"""The weight file: byte for byte what coremltools writes, and never in memory as a whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.coreml_blobs import BlobWriter
from edgedistill.errors import InputError
from edgedistill.exporters.coreml import Coreml
from edgedistill.quantized import Grid, pack_codes
from edgedistill.quiet_coremltools import import_coremltools
from edgedistill.student import Student
from tests.rounded import random_grid_student
from tests.tiny import write_student

RANDOM = np.random.default_rng(3)
KINDS = {
    "fp16": np.float16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int4": None,
    "uint4": None,
    "uint3": None,
    "uint2": None,
}


def values_of(kind: str, count: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(what coremltools' writer takes, what ours does: narrow elements packed)."""
    types = import_coremltools("coremltools.converters.mil.mil").types
    dtype = KINDS[kind]
    if dtype is np.float16:
        floats = RANDOM.standard_normal(count).astype(np.float16)
        return floats.view(np.uint16), floats
    if dtype is not None:
        whole = RANDOM.integers(0, 100, count).astype(dtype)
        return whole, whole
    bits = int(kind.lstrip("uint"))
    codes = RANDOM.integers(0, 1 << bits, count).astype(np.uint8)
    low = 0 if kind.startswith("u") else 1 << bits
    half = 1 << (bits - 1)
    given = np.where((codes >= half) & (low > 0), codes.astype(int) - low, codes)
    return given.astype(types.string_to_nptype(kind)), pack_codes(codes, bits)


def test_bytes_are_those_of_coremltools_own_writer(tmp_path: Path) -> None:
    """Lengths that fill no byte, no 64 bytes, and exactly 64 bytes."""
    storage = import_coremltools("coremltools.libmilstoragepython")
    judge = storage._BlobStorageWriter(str(tmp_path / "judge.bin"))
    wanted, places = [], []
    with BlobWriter(tmp_path / "ours.bin") as ours:
        for kind in KINDS:
            for count in (37, 5, 256, 1):
                theirs, stored = values_of(kind, count)
                wanted.append(getattr(judge, f"write_{kind}_data")(theirs))
                cut = len(stored) // 3
                places.append(ours.write("w", kind, count, [stored[:cut], stored[cut:]]))
    del judge  # its file is whole when it is gone
    assert places == wanted
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "judge.bin").read_bytes()


@pytest.mark.parametrize("size", [9, 11])
def test_bytes_that_do_not_fit_the_shape_are_refused(size: int, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=f"w has {size} bytes, 20 elements of int4 take 10"),
        BlobWriter(tmp_path / "weight.bin") as writer,
    ):
        writer.write("w", "int4", 20, [np.zeros(size, np.uint8)])


@pytest.mark.parametrize("grid", [None, Grid(4, 32), Grid(8, 32, "integer")], ids=str)
def test_an_export_holds_a_few_tensors_at_most(
    grid: Grid | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedistill.coreml_weights.PART_ELEMENTS", 1 << 16)
    plain = write_student(
        tmp_path / "plain",
        "llama",
        num_hidden_layers=2,
        hidden_size=512,
        intermediate_size=8192,
    )
    source = random_grid_student(plain, tmp_path / "student", grid) if grid else plain
    student = Student(source)
    (tmp_path / "first").mkdir()
    Coreml().export(student, tmp_path / "first", context_tokens=64)  # imports are none of it
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    Coreml().export(student, tmp_path / "out", context_tokens=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < Coreml().weight_bytes(tmp_path / "out") / 2
