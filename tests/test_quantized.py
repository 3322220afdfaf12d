from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedistill.errors import InputError
from edgedistill.quantized import FIXED_ZERO, Grid, QTensor, pack_codes, unpack_codes
from tests.rounded import random_tensor

GRIDS = [Grid(8, 32), Grid(4, 32), Grid(4, 32, "integer"), Grid(3, 32), Grid(2, 64), Grid(5, 32)]


@given(
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    rows=st.integers(1, 4),
    count=st.integers(1, 37),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_codes_come_back_as_they_were(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    stream = np.unpackbits(packed, axis=1, bitorder="little")
    for row, place in itertools.product(range(rows), range(count)):
        own = np.packbits(stream[row, place * bits : (place + 1) * bits], bitorder="little")
        assert own == codes[row, place]
    assert not stream[:, count * bits :].any()
    assert np.array_equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [1, 2, 3, 0, 3], [0b00111001, 0b11]),
        (3, [1, 2, 7, 5, 0, 3], [0b11_010_001, 0b1_000_101_1, 0b01]),
        (4, [0xA, 0x5, 0xF], [0x5A, 0x0F]),
        (5, [1, 30, 17, 31, 2], [0b110_00001, 0b1_10001_11, 0b0010_1111, 0b0]),
        (8, [7], [7]),
    ],
)
def test_the_first_code_lies_in_the_low_bits_and_padding_is_zero(
    bits: int, codes: list[int], packed: list[int]
) -> None:
    assert pack_codes(np.array([codes], dtype=np.uint8), bits).tolist() == [packed]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_is_its_code_less_the_zero_point_times_the_scale(grid: Grid) -> None:
    tensor = random_tensor(grid, 5, 128)
    weights = tensor.dequantize()
    zeros = tensor.zero_points()
    for row, column in [(0, 0), (1, 31), (2, 64), (4, 127)]:
        group = column // grid.group_size
        steps = int(tensor.codes[row, column]) - int(zeros[row, group])
        assert weights[row, column] == np.float32(steps) * np.float32(tensor.scales[row, group])
    assert weights.dtype == np.float32


def test_a_fixed_grid_has_its_zero_point_everywhere() -> None:
    for bits, zero in FIXED_ZERO.items():
        grid = Grid(bits, 32)  # type: ignore[arg-type]
        assert np.all(random_tensor(grid, 2, 64).zero_points() == zero)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(8, 32), 8.5),
        (Grid(4, 32), 4.5),
        (Grid(4, 32, "integer"), 4.625),
        (Grid(3, 32), 3.5),
        (Grid(5, 32), 5.5),
        (Grid(2, 64), 2.25),
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(grid: Grid, expected: float) -> None:
    assert grid.bits_per_weight == expected


def _codes(columns: int = 32) -> npt.NDArray[np.uint8]:
    return np.zeros((2, columns), dtype=np.uint8)


def _scales(groups: int = 1) -> npt.NDArray[np.float16]:
    return np.ones((2, groups), dtype=np.float16)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    zeros = np.zeros((2, 1), dtype=np.uint8)
    integer = Grid(4, 32, "integer")
    with pytest.raises(InputError, match="do not fit"):
        QTensor(Grid(8, 32), _codes(48), _scales())
    with pytest.raises(InputError, match="do not fit"):
        QTensor(Grid(8, 32), _codes(), _scales(2))
    with pytest.raises(InputError, match="float32"):
        QTensor(Grid(8, 32), _codes(), _scales().astype(np.float32))
    with pytest.raises(InputError, match="contradict"):
        QTensor(Grid(8, 32), _codes(), _scales(), zeros)
    with pytest.raises(InputError, match="contradict"):
        QTensor(integer, _codes(), _scales())
    with pytest.raises(InputError, match="zero points"):
        QTensor(integer, _codes(), _scales(), np.zeros((2, 2), dtype=np.uint8))
