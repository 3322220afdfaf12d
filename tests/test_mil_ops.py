"""Each op, saved by coremltools and executed here, against numpy written from its specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgedistill.mil_interpreter import Interpreter, Precision
from tests.mil_programs import mil, save_program

Array = npt.NDArray[Any]
Cases = dict[str, tuple[Callable[..., Any], list[Array], Callable[..., Array]]]
RANDOM = np.random.default_rng(0)


def half(*shape: int, scale: float = 1.0) -> Array:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float16)


def int32(*values: int) -> Array:
    return np.array(values, dtype=np.int32)


def run(
    directory: Path, build: Callable[..., Any], *inputs: Array, precision: Precision = "float32"
) -> list[Array]:
    """The outputs of a small program whose inputs are these, in order."""
    package = save_program(directory / "op.mlpackage", build, list(inputs))
    interpreter = Interpreter(package, precision=precision)
    out = interpreter.run({f"x{i}": array for i, array in enumerate(inputs)}, {})
    return [out[name] for name in interpreter.package.outputs]


def save_cases(directory: Path, cases: Cases) -> Path:
    """One program with all cases side by side: saving costs more than running."""

    def build(mb: Any, *values: Any) -> list[Any]:
        left = list(values)
        results = []
        for one, inputs, _ in cases.values():
            results.append(one(mb, *left[: len(inputs)]))
            left = left[len(inputs) :]
        return results

    inputs = [array for _, inputs, _ in cases.values() for array in inputs]
    return save_program(directory / "ops.mlpackage", build, inputs)


def run_cases(package: Path, cases: Cases, precision: Precision) -> dict[str, Array]:
    """Results by case."""
    inputs = [array for _, inputs, _ in cases.values() for array in inputs]
    interpreter = Interpreter(package, precision=precision)
    out = interpreter.run({f"x{i}": array for i, array in enumerate(inputs)}, {})
    return dict(zip(cases, (out[n] for n in interpreter.package.outputs), strict=True))


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


X, Y, ROW = half(2, 3, 4), half(2, 3, 4, scale=3), half(1, 4)
POSITIVE = np.abs(half(2, 5)) + np.float16(0.01)

# name: (build, inputs, expected in float64)
COMPUTED: Cases = {
    "add": (lambda mb, x, y: mb.add(x=x, y=y), [X, Y], lambda x, y: x + y),
    "add broadcasts": (lambda mb, x, y: mb.add(x=x, y=y), [X, ROW], lambda x, y: x + y),
    "sub": (lambda mb, x, y: mb.sub(x=x, y=y), [X, Y], lambda x, y: x - y),
    "mul": (lambda mb, x, y: mb.mul(x=x, y=y), [X, ROW], lambda x, y: x * y),
    "real_div": (lambda mb, x, y: mb.real_div(x=x, y=y), [X, Y], lambda x, y: x / y),
    "maximum": (lambda mb, x, y: mb.maximum(x=x, y=y), [X, Y], np.maximum),
    "abs": (lambda mb, x: mb.abs(x=x), [X], np.abs),
    "rsqrt": (
        lambda mb, x: mb.rsqrt(x=x, epsilon=np.float16(0.5)),
        [POSITIVE],
        lambda x: 1 / np.sqrt(x + 0.5),
    ),
    "silu": (lambda mb, x: mb.silu(x=x), [Y], lambda x: x / (1 + np.exp(-x))),
    "gelu": (
        lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        [X],
        lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "gelu, exact": (
        lambda mb, x: mb.gelu(x=x, mode="EXACT"),
        [X],
        lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    ),
    "tanh": (lambda mb, x: mb.tanh(x=x), [Y], np.tanh),
    "softmax": (
        lambda mb, x: mb.softmax(x=x, axis=1),
        [Y],
        lambda x: np.moveaxis(softmax(np.moveaxis(x, 1, -1)), -1, 1),
    ),
    "matmul": (
        lambda mb, x, y: mb.matmul(x=x, y=y),
        [X, half(4, 5)],
        lambda x, y: np.einsum("abi,io->abo", x, y),
    ),
    "matmul, both transposed": (
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        [X, half(2, 5, 3)],
        lambda x, y: np.einsum("aib,aoi->abo", x, y),
    ),
    "reduce_max": (
        lambda mb, x: mb.reduce_max(x=x, axes=[1, -1], keep_dims=True),
        [X],
        lambda x: x.max(axis=(1, 2), keepdims=True),
    ),
    "reduce_mean": (
        lambda mb, x: mb.reduce_mean(x=x, axes=[-1], keep_dims=False),
        [X],
        lambda x: x.mean(axis=-1),
    ),
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cases(tmp_path_factory.mktemp("computed"), COMPUTED)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cases(tmp_path_factory.mktemp("moved"), MOVED)


@pytest.mark.parametrize("name", COMPUTED)
def test_an_arithmetic_op_follows_its_specification(name: str, computed: Path) -> None:
    _, inputs, expected = COMPUTED[name]
    exact = expected(*map(wide, inputs))
    plain = run_cases(computed, COMPUTED, "float32")[name]
    np.testing.assert_allclose(plain, exact, rtol=3e-6, atol=1e-6)
    assert plain.shape == exact.shape


@pytest.mark.parametrize("name", COMPUTED)
def test_float16_mode_gives_the_nearest_float16(name: str, computed: Path) -> None:
    _, inputs, expected = COMPUTED[name]
    out = run_cases(computed, COMPUTED, "float16")[name]
    exact = expected(*map(wide, inputs))
    assert np.array_equal(out, out.astype(np.float16))
    # half a unit in the last place of float16, and a breath for ties seen through float32
    assert np.all(np.abs(out - exact) <= np.spacing(np.abs(exact).astype(np.float16)) * 0.5001)


WEIGHT, BIAS = half(5, 4), half(5)
TABLE, IDS = half(7, 3), int32(6, 0, 6, 2).reshape(2, 2)
CUBE = half(3, 4, 6)

# name: (build, inputs, expected), equal to the last bit
MOVED: Cases = {
    "gather rows": (
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=0),
        [TABLE, IDS],
        lambda x, i: x[i],
    ),
    "gather along the last axis": (
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=-1),
        [CUBE, int32(5, 1)],
        lambda x, i: x[:, :, i],
    ),
    "reshape": (
        lambda mb, x: mb.reshape(x=x, shape=[2, -1, 4]),
        [CUBE],
        lambda x: x.reshape(2, 9, 4),
    ),
    "reshape copies a dimension": (
        lambda mb, x: mb.reshape(x=x, shape=[0, -1]),
        [CUBE],
        lambda x: x.reshape(3, 24),
    ),
    "transpose": (
        lambda mb, x: mb.transpose(x=x, perm=[2, 0, 1]),
        [CUBE],
        lambda x: np.moveaxis(x, 2, 0),
    ),
    "expand_dims": (
        lambda mb, x: mb.expand_dims(x=x, axes=[0, -1]),
        [CUBE],
        lambda x: x[None, :, :, :, None],
    ),
    "less and select": (
        lambda mb, x, y: mb.select(cond=mb.less(x=x, y=np.int32(5)), a=y, b=np.float16(-7)),
        [int32(4, 5, 6, 2049), half(3, 4)],
        lambda x, y: np.where(x < 5, y, np.float16(-7)),
    ),
    "concat": (
        lambda mb, x, y: mb.concat(values=[x, y, x], axis=-1),
        [CUBE, half(3, 4, 2)],
        lambda x, y: np.concatenate([x, y, x], axis=2),
    ),
    "concat of one": (lambda mb, x: mb.concat(values=[x], axis=0), [CUBE], lambda x: x),
    "tile": (
        lambda mb, x: mb.tile(x=x, reps=[1, 2, 3]),
        [CUBE],
        lambda x: np.tile(x, (1, 2, 3)),
    ),
    "slice_by_index": (
        lambda mb, x: mb.slice_by_index(x=x, begin=[1, 0, -4], end=[3, 3, 6], stride=[1, 2, 3]),
        [CUBE],
        lambda x: x[1:3, 0:3:2, -4:6:3],
    ),
    "slice_by_index with masks": (
        lambda mb, x: mb.slice_by_index(
            x=x,
            begin=[2, 3, 1],
            end=[0, 0, 4],
            begin_mask=[False, True, False],
            end_mask=[False, True, False],
            squeeze_mask=[True, False, False],
        ),
        [CUBE],
        lambda x: x[2, :, 1:4],
    ),
    "slice_update": (
        lambda mb, x, y: mb.slice_update(
            x=x,
            update=y,
            begin=[1, 0, 2],
            end=[0, 0, 5],
            begin_mask=[False, True, False],
            end_mask=[False, True, False],
            squeeze_mask=[True, False, False],
        ),
        [CUBE, half(4, 3)],
        lambda x, y: np.concatenate(
            [x[:1], np.concatenate([x[1:2, :, :2], y[None], x[1:2, :, 5:]], 2), x[2:]]
        ),
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_an_op_that_moves_values_moves_them_exactly(name: str, moved: Path) -> None:
    _, inputs, expected = MOVED[name]
    out = run_cases(moved, MOVED, "float16")[name]
    wanted = expected(*inputs)
    assert out.shape == wanted.shape
    np.testing.assert_array_equal(out, wanted)


def test_split_cuts_into_equal_parts_or_by_sizes(tmp_path: Path) -> None:
    parts = run(tmp_path, lambda mb, x: mb.split(x=x, num_splits=3, axis=-1), CUBE)
    for part, wanted in zip(parts, np.split(CUBE, 3, axis=2), strict=True):
        np.testing.assert_array_equal(part, wanted)
    parts = run(tmp_path, lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=1), CUBE)
    for part, wanted in zip(parts, (CUBE[:, :1], CUBE[:, 1:]), strict=True):
        np.testing.assert_array_equal(part, wanted)


def test_shape_and_integer_arithmetic_stay_integers(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> Any:
        size = mb.slice_by_index(x=mb.shape(x=x), begin=[2], end=[3])
        return mb.sub(x=size, y=np.array([70000], np.int32))  # beyond float16

    [out] = run(tmp_path, build, CUBE, precision="float16")
    assert out.tolist() == [6 - 70000]


def test_linear_multiplies_by_the_transposed_weight_and_adds_the_bias(tmp_path: Path) -> None:
    [out] = run(tmp_path, lambda mb, x: mb.linear(x=x, weight=WEIGHT, bias=BIAS), X)
    expected = np.einsum("abi,oi->abo", wide(X), wide(WEIGHT)) + wide(BIAS)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


QUERY, KEY, VALUE = half(1, 2, 3, 8), half(1, 2, 5, 8), half(1, 2, 5, 4)
VISIBLE = np.tril(np.ones((3, 5), dtype=bool), k=2)


def attention_case(
    mask: Array | None,
) -> tuple[Callable[..., Any], list[Array], Callable[..., Array]]:
    given = {} if mask is None else {"attn_mask": mask[None, None]}

    def build(mb: Any, q: Any, k: Any, v: Any) -> Any:
        return mb.scaled_dot_product_attention(query=q, key=k, value=v, **given)

    def expected(q: Array, k: Array, v: Array) -> Array:
        scores = np.einsum("bhle,bhse->bhls", wide(q), wide(k)) / np.sqrt(8)
        scores = scores if mask is None else np.where(VISIBLE, scores, -np.inf)
        return np.asarray(np.einsum("bhls,bhsv->bhlv", softmax(scores), wide(v)))

    return build, [QUERY, KEY, VALUE], expected


ATTENTION: Cases = {
    "no mask": attention_case(None),
    "float mask": attention_case(np.where(VISIBLE, 0, -4e4).astype(np.float16)),
    "bool mask": attention_case(VISIBLE),
}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float16", 3e-3)])
def test_attention_is_softmax_of_scaled_scores(
    precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    out = run_cases(save_cases(tmp_path, ATTENTION), ATTENTION, precision)
    for name, (_, inputs, expected) in ATTENTION.items():
        np.testing.assert_allclose(out[name], expected(*inputs), atol=tolerance, err_msg=name)


def blockwise_case(
    dtype: str, with_offset: bool, scale_shape: tuple[int, int]
) -> tuple[Callable[..., Any], list[Array], Callable[..., Array]]:
    """A weight [6, 8] in blocks, seen through a linear of the identity."""
    bits = int(dtype.lstrip("uint"))
    low = 0 if dtype.startswith("u") else -(2 ** (bits - 1))
    codes = RANDOM.integers(low, low + 2**bits, (6, 8))
    zeros = RANDOM.integers(low, low + 2**bits, scale_shape)
    scales = half(*scale_shape)

    def build(mb: Any, x: Any) -> Any:
        stored = mil().types.string_to_nptype(dtype)
        offset = {"offset": zeros.astype(stored)} if with_offset else {}
        weight = mb.constexpr_blockwise_shift_scale(
            data=codes.astype(stored), scale=scales, **offset
        )
        return mb.linear(x=x, weight=weight)

    def expected(_: Array) -> Array:
        weight = np.empty((6, 8))
        for i in range(6):
            for j in range(8):
                block = i * scale_shape[0] // 6, j * scale_shape[1] // 8
                zero = zeros[block] if with_offset else 0
                weight[i, j] = float(scales[block]) * (codes[i, j] - zero)
        return weight.T

    return build, [np.eye(8, dtype=np.float16)], expected


BLOCKWISE: Cases = {
    f"{dtype}, {'offset' if with_offset else 'no offset'}, scales {shape}": blockwise_case(
        dtype, with_offset, shape
    )
    for dtype in ("int4", "uint4", "int8", "uint8")
    for with_offset in (False, True)
    for shape in ((6, 2), (2, 1))
}


def test_blockwise_constants_are_shifted_and_scaled(tmp_path: Path) -> None:
    package = save_cases(tmp_path, BLOCKWISE)
    plain = run_cases(package, BLOCKWISE, "float32")
    device = run_cases(package, BLOCKWISE, "float16")
    for name, (_, inputs, expected) in BLOCKWISE.items():
        weight = expected(*inputs)  # products of 9 and 11 bits are exact in float32
        np.testing.assert_array_equal(plain[name], weight, err_msg=name)
        np.testing.assert_array_equal(device[name], weight.astype(np.float16), err_msg=name)


@pytest.mark.parametrize(("bits", "zero"), [(2, 1), (3, 4)])
def test_a_table_of_all_codes_feeds_the_blockwise_scale(
    bits: int, zero: int, tmp_path: Path
) -> None:
    codes, scales = RANDOM.integers(0, 1 << bits, (3, 8)), half(3, 2)
    lut = np.arange(-zero, (1 << bits) - zero, dtype=np.int8)

    def build(mb: Any, x: Any) -> Any:
        values = mb.constexpr_lut_to_dense(
            indices=codes.astype(mil().types.string_to_nptype(f"uint{bits}")),
            lut=lut.reshape(1, 1, -1, 1),
        )
        return mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=values, scale=scales))

    [out] = run(tmp_path, build, np.eye(8, dtype=np.float16))
    np.testing.assert_array_equal(out.T, (codes - zero) * np.repeat(wide(scales), 4, axis=1))


def test_float16_mode_overflows_where_a_device_does(tmp_path: Path) -> None:
    big = np.array([[300.0, 200.0]], dtype=np.float16)

    def square(mb: Any, x: Any) -> Any:
        return mb.mul(x=x, y=x)

    [plain] = run(tmp_path, square, big)
    [device] = run(tmp_path, square, big, precision="float16")
    assert plain.tolist() == [[90000.0, 40000.0]]
    assert device.tolist() == [[np.inf, 40000.0]]
