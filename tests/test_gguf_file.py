from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill.errors import InputError
from edgedistill.exporters.gguf import Gguf
from edgedistill.gguf_blocks import pack_blocks
from edgedistill.gguf_file import GgufFile
from edgedistill.gguf_intake import read_gguf_facts
from edgedistill.quantized import Grid
from edgedistill.student import Student
from tests.rounded import random_tensor

Tiny = Callable[[str], Path]


@pytest.fixture
def exported(tiny: Tiny, tmp_path: Path) -> Path:
    Gguf().export(Student(tiny("llama3")), tmp_path, context_tokens=128)
    return tmp_path / "model.gguf"


def test_metadata_and_tensors_are_those_of_the_packages_reader(exported: Path) -> None:
    import gguf

    reader, file = gguf.GGUFReader(exported), GgufFile(exported)
    expected = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == expected
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        place = file.tensors[tensor.name]
        assert place.shape == tuple(tensor.shape.tolist())[::-1]
        assert (place.start, place.size_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert np.array_equal(file.read(tensor.name), tensor.data.astype(np.float32))


@pytest.mark.parametrize("kind", ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_quantized_tensors_are_dequantized(tmp_path: Path, kind: str) -> None:
    import gguf

    quantization = gguf.GGMLQuantizationType[kind]
    weights = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(weights, quantization)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.tensors["x"].shape == (6, 64)
    assert np.array_equal(file.read("x"), gguf.quants.dequantize(blocks, quantization))


def test_two_bit_blocks_which_the_package_does_not_know_are_read(tmp_path: Path) -> None:
    import gguf

    tensor = random_tensor(Grid(2, 64), 4, 128)
    blocks = pack_blocks(tensor, "x")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor_info("x", (4, 128), np.dtype(np.float16), blocks.nbytes, 42)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(blocks)
    writer.close()
    assert np.array_equal(GgufFile(tmp_path / "x.gguf").read("x"), tensor.dequantize())


def test_a_file_cut_anywhere_is_refused_with_a_hint(exported: Path) -> None:
    whole = exported.read_bytes()
    data_start = min(tensor.start for tensor in GgufFile(exported).tensors.values())
    cuts = [4, 7, 23, 24, 50, 1000, data_start - 40, data_start, data_start + 1, len(whole) - 64]
    for cut in cuts:
        exported.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"not a whole GGUF file[\s\S]*hint: .*again"):
            GgufFile(exported)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 a zip file", bytes(100)):
        file.write_bytes(content)
        with pytest.raises(InputError, match="does not begin with GGUF"):
            GgufFile(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(InputError, match="version 1"):
        GgufFile(file)
    with pytest.raises(InputError, match="cannot be read"):
        GgufFile(tmp_path / "gone.gguf")


def test_counts_beyond_the_file_end_at_once(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    key = struct.pack("<Q", 1) + b"k"
    huge = 2**63
    for body in (
        struct.pack("<QQ", 0, huge),
        struct.pack("<QQ", huge, 0),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", huge),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 4, huge),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 8, huge),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<IIQ", 9, 9, huge),
        struct.pack("<QQ", 0, 1) + key + struct.pack("<I", 77),
        struct.pack("<QQ", 1, 0) + key + struct.pack("<I", huge % 1000 + 900),
    ):
        file.write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
        with pytest.raises(InputError, match="not a whole GGUF file"):
            GgufFile(file)


def test_a_damaged_header_never_ends_in_another_error(exported: Path) -> None:
    whole = bytearray(exported.read_bytes())
    header_bytes = min(tensor.start for tensor in GgufFile(exported).tensors.values())
    rng = np.random.default_rng(0)
    refused = 0
    # The keys of the model come first and the tensors last; the token list between is long.
    ranges = [(4, 700)] * 100 + [(header_bytes - 2000, header_bytes)] * 100
    for low, high in ranges:
        damaged = whole.copy()
        place = int(rng.integers(low, high))
        damaged[place] ^= int(rng.integers(1, 256))
        exported.write_bytes(damaged)
        try:
            read_gguf_facts(exported)
        except InputError:
            refused += 1
    assert refused > 100
