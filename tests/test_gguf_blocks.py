from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.errors import InputError
from edgedistill.gguf_blocks import LAYOUTS, BlockLayout, pack_blocks
from edgedistill.quantized import Grid, QTensor
from tests.rounded import random_tensor


def _dequantized_by_ggml(
    layout: BlockLayout, blocks: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """By the C function that llama.cpp itself uses."""
    import llama_cpp

    directory = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(directory.glob("libggml-base.so"))))
    weights = np.empty(blocks.size // layout.block_bytes * layout.block, np.float32)
    dequantize = getattr(library, f"dequantize_row_{layout.name.lower()}")
    dequantize.restype = None
    dequantize(
        blocks.ctypes.data_as(ctypes.c_void_p),
        weights.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(weights.size),
    )
    return weights.reshape(blocks.shape[0], -1)


@pytest.mark.parametrize("grid", LAYOUTS, ids=str)
def test_llama_cpps_own_dequantizer_gives_the_same_weights(grid: Grid) -> None:
    tensor = random_tensor(grid, 7, 192)
    blocks = np.ascontiguousarray(pack_blocks(tensor, "x"))
    layout = LAYOUTS[grid]
    assert blocks.shape == (7, 192 // layout.block * layout.block_bytes)
    weights = _dequantized_by_ggml(layout, blocks)
    if grid.zero == "fixed":
        assert np.array_equal(weights, tensor.dequantize())
    else:
        # code * d + m rounds twice in float32, (code - zero) * d once: a last bit apart.
        np.testing.assert_allclose(weights, tensor.dequantize(), rtol=0, atol=2**-22)


@pytest.mark.parametrize(
    ("kind", "grid"),
    [("Q8_0", Grid(8, 32)), ("Q5_0", Grid(5, 32)), ("Q4_0", Grid(4, 32))],
)
def test_codes_of_the_gguf_packages_quantizer_pack_to_its_own_bytes(kind: str, grid: Grid) -> None:
    import gguf

    weights = np.random.default_rng(1).normal(0, 0.02, (5, 96)).astype(np.float32)
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    per_block = expected.reshape(5, 3, -1)
    scales = np.ascontiguousarray(per_block[..., :2]).view("<f2")[..., 0].astype(np.float16)
    # The codes are found from the values, not from the bytes: the layout is what is tested.
    values = gguf.quants.dequantize(expected, gguf.GGMLQuantizationType[kind]).reshape(5, 3, 32)
    codes = np.round(values / scales[..., None].astype(np.float32)) + grid.fixed_zero
    tensor = QTensor(grid, codes.astype(np.uint8).reshape(5, 96), scales)
    assert np.array_equal(pack_blocks(tensor, "x"), expected)


def test_a_minimum_that_float16_cannot_hold_is_refused_not_rounded() -> None:
    good = random_tensor(Grid(4, 32, "integer"), 3, 64)
    assert good.zeros is not None
    scales, zeros = good.scales.copy(), good.zeros.copy()
    scales[1, 1], zeros[1, 1] = np.float16(1.0009765625), 3  # 3 * (1 + 2^-10) takes 12 bits
    bad = QTensor(good.grid, good.codes, scales, zeros)
    with pytest.raises(InputError, match=r"x: zero \* scale is not a float16 in 1 of 6 groups"):
        pack_blocks(bad, "x")
    pack_blocks(good, "x")


@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(5, 64), Grid(5, 32, "integer")], ids=str)
def test_a_grid_without_a_layout_is_refused(grid: Grid) -> None:
    with pytest.raises(InputError, match=f"x is int{grid.bits} group {grid.group_size}"):
        pack_blocks(random_tensor(grid, 2, 64), "x")


def test_the_fifth_bit_of_an_element_is_the_bit_of_its_place() -> None:
    """In ``qh`` of ggml's ``block_q5_0``, a little-endian number of 32 bits."""
    for place in range(32):
        codes = np.zeros((1, 32), dtype=np.uint8)
        codes[0, place] = 16
        scales = np.ones((1, 1), dtype=np.float16)
        block = pack_blocks(QTensor(Grid(5, 32), codes, scales), "x")[0]
        assert int(block[2:6].view("<u4")[0]) == 1 << place
        assert not block[6:].any()
