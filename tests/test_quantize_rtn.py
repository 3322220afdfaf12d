"""Rounding to a grid: the integers are right, and the search pays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.errors import InputError
from edgedistill.quantized import Bits, Grid
from edgedistill.stages.quantize_rtn import GridChoice, QuantizeRtn, round_to_grid
from edgedistill.student import Student

GRIDS = [
    Grid(8, 32),
    Grid(4, 32),
    Grid(4, 32, "integer"),
    Grid(2, 64),
    Grid(3, 32),
    Grid(5, 32),
]


def _weights(rows: int = 48, columns: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_weight_lands_on_the_nearest_point_of_its_groups_grid(grid: Grid) -> None:
    weights = _weights()
    quantized = round_to_grid(weights, grid)
    points = np.arange(grid.max_code + 1, dtype=np.float32)
    scales = quantized.scales.astype(np.float32)[:, :, None, None]
    zeros = quantized.zero_points().astype(np.float32)[:, :, None, None]
    allowed = points[1:] if grid.bits == 8 else points  # symmetric int8 leaves out -128
    grouped = weights.reshape(48, -1, grid.group_size, 1)
    nearest = np.abs((allowed - zeros) * scales - grouped).min(axis=-1).reshape(weights.shape)
    np.testing.assert_allclose(np.abs(quantized.dequantize() - weights), nearest, atol=1e-7)


@pytest.mark.parametrize(
    ("grid", "largest"),
    [
        (GRIDS[0], 0.006),
        (GRIDS[1], 0.09),
        (GRIDS[2], 0.085),
        (GRIDS[3], 0.45),
        (GRIDS[4], 0.19),
        (GRIDS[5], 0.045),
    ],
)
def test_relative_error_is_that_of_its_bits(grid: Grid, largest: float) -> None:
    weights = _weights(256, 512)
    error = np.linalg.norm(round_to_grid(weights, grid).dequantize() - weights)
    assert error / np.linalg.norm(weights) < largest


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [(2, 3, 4), (4, 5, 8)], ids=["3", "5"])
def test_more_bits_lose_less(bits: tuple[Bits, Bits, Bits], group_size: int) -> None:
    weights = _weights(256, 512)
    few, some, many = (
        float(np.linalg.norm(round_to_grid(weights, Grid(b, group_size)).dequantize() - weights))
        for b in bits
    )
    # A bit more halves the steps; 8 bits have 8 times as many as 5.
    assert 1.5 * 2 ** (bits[2] - bits[1] - 1) * many < some < 0.6 * few


def test_scale_search_beats_plain_min_max() -> None:
    weights = _weights(256, 512)
    grouped = weights.reshape(-1, 32)
    low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
    scale = ((high - low) / 15)[:, None]
    zero = np.clip(np.rint(-low[:, None] / scale), 0, 15)
    plain = (np.clip(np.rint(grouped / scale) + zero, 0, 15) - zero) * scale
    searched = round_to_grid(weights, GRIDS[2]).dequantize().reshape(-1, 32)
    assert np.square(searched - grouped).sum() < 0.97 * np.square(plain - grouped).sum()


def test_scales_of_integer_zeros_leave_room_for_the_product_in_float16() -> None:
    quantized = round_to_grid(_weights() + np.float32(0.02), GRIDS[2])
    product = quantized.zero_points().astype(np.float32) * quantized.scales.astype(np.float32)
    np.testing.assert_array_equal(product.astype(np.float16).astype(np.float32), product)


@given(st.integers(0, 2**32 - 1), st.sampled_from(GRIDS), st.floats(1e-7, 1e4))
@settings(max_examples=60, deadline=None)
def test_any_magnitude_and_empty_groups_stay_finite(seed: int, grid: Grid, size: float) -> None:
    weights = np.random.default_rng(seed).normal(0, size, (4, 128)).astype(np.float32)
    weights[1] = 0.0
    result = round_to_grid(weights, grid).dequantize()
    assert np.isfinite(result).all()
    assert not result[1].any()


def test_weights_beyond_float16_scales_are_refused() -> None:
    with pytest.raises(InputError, match="scales"):
        round_to_grid(np.full((1, 64), 1e9, dtype=np.float32), Grid(2, 64))


def test_kinds_of_matrices_may_have_grids_of_their_own(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    stage = QuantizeRtn(bits=2, linears={"v": GridChoice(bits=8), "down": GridChoice(bits=4)})
    stage.run(tiny("llama"), tmp_path)
    student = Student(tmp_path)
    bits = {"v": 8, "down": 4}
    for layer in range(student.facts.layers):
        for short, name in student.facts.linears(layer).items():
            assert student.read_quantized(name).grid.bits == bits.get(short, 2)
    assert student.grids[student.facts.embedding].bits == 8
    odd = QuantizeRtn(bits=2, linears={"q": GridChoice(bits=8, group_size=240)})
    assert "does not divide" in odd.problems(student.facts, quantized=False)[0]


def test_stage_quantizes_matrices_and_carries_the_rest(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Student(tiny("qwen2"))
    QuantizeRtn(bits=4).run(source.path, tmp_path)
    written = Student(tmp_path)
    assert written.names() == source.names()
    assert set(written.grids) == set(source.facts.matrices())
    assert written.grids["model.embed_tokens.weight"] == Grid(8, 32)
    assert written.grids["model.layers.1.mlp.up_proj.weight"] == Grid(4, 32, "integer")
    bias = "model.layers.0.self_attn.q_proj.bias"
    np.testing.assert_array_equal(written.read(bias), source.read(bias))
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        source.path / "tokenizer.json"
    ).read_bytes()


def test_stage_reads_back_the_integers_that_it_decided(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Student(tiny("llama"))
    QuantizeRtn(bits=4, embeddings=GridChoice(bits=2)).run(source.path, tmp_path)
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"):
        written = Student(tmp_path).read_quantized(name)
        expected = round_to_grid(source.read(name), written.grid)
        np.testing.assert_array_equal(written.codes, expected.codes)
        np.testing.assert_array_equal(written.scales, expected.scales)
        np.testing.assert_array_equal(written.zero_points(), expected.zero_points())


def test_groups_are_of_32_weights_and_at_two_bits_of_64() -> None:
    assert GridChoice(bits=2).grid() == Grid(2, 64)
    assert GridChoice(bits=3).grid() == Grid(3, 32)
    assert GridChoice(bits=4).grid() == Grid(4, 32, "integer")
    assert GridChoice(bits=5).grid() == Grid(5, 32)
    assert GridChoice(bits=8).grid() == Grid(8, 32)


def test_impossible_choices_are_known_before_any_work(tiny: Callable[[str], Path]) -> None:
    facts = Student(tiny("llama")).facts
    assert QuantizeRtn(bits=8).problems(facts, quantized=False) == []
    assert "already" in QuantizeRtn(bits=8).problems(facts, quantized=True)[0]
    stage = QuantizeRtn(bits=8, group_size=48, zero="integer")
    assert len(stage.problems(facts, quantized=False)) >= 2
    for bits in (3, 5):
        choice = QuantizeRtn.model_validate({"bits": bits, "zero": "integer"})
        told = choice.problems(facts, quantized=False)
        assert told == [f"zero: integer goes with 4 bits, not with {bits}"]
    assert "head" in QuantizeRtn(bits=4, head=GridChoice(bits=8)).problems(facts, False)[0]


def test_weights_that_are_not_finite_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    from edgedistill.student import StudentWriter

    source, broken = Student(tiny("llama")), tmp_path / "broken"
    broken.mkdir()
    with StudentWriter(broken, source) as writer:
        for name in source.names():
            values = source.read(name)
            if name.endswith("1.mlp.up_proj.weight"):
                values[3, 5] = np.nan
            writer.write(name, values)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"1\.mlp\.up_proj"):
        QuantizeRtn(bits=8).run(broken, out)


def test_threads_and_blocks_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(5).standard_normal((96, 256)).astype(np.float32)
    importance = np.random.default_rng(6).random(256).astype(np.float32) + 0.1
    for grid in (Grid(4, 32), Grid(4, 32, "integer"), Grid(2, 64), Grid(8, 32)):
        whole = round_to_grid(weights, grid, importance)
        monkeypatch.setattr("edgedistill.stages.quantize_rtn.BLOCK_WEIGHTS", 7 * 256)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        parts = round_to_grid(weights, grid, importance)
        monkeypatch.undo()
        assert np.array_equal(parts.codes, whole.codes)
        assert np.array_equal(parts.scales, whole.scales)
        assert np.array_equal(parts.zero_points(), whole.zero_points())
