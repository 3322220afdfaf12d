"""Packages that coremltools saved, read and executed: weights, states, memory, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgedistill.errors import InputError
from edgedistill.mil_interpreter import Interpreter
from edgedistill.mil_package import Constant, read_package
from edgedistill.mil_states import states_in_place
from edgedistill.mil_weight_file import WeightFile
from edgedistill.quiet_coremltools import import_coremltools
from tests.mil_programs import mil, save_program

RANDOM = np.random.default_rng(1)
PLACES = 6
ROW = np.array([[1.0, 2.0, 3.0]], dtype=np.float16)


def read_back(path: Path, offset: int, dtype: str) -> npt.NDArray[Any]:
    """By coremltools' own reader."""
    storage = import_coremltools("coremltools.libmilstoragepython")
    kind = {"float16": "fp16"}.get(dtype, dtype)
    values = getattr(storage._BlobStorageReader(str(path)), f"read_{kind}_data")(offset)
    return np.asarray(values).view(np.float16) if dtype == "float16" else np.asarray(values)


@pytest.mark.parametrize("dtype", ["float16", "int4", "uint4", "uint3", "uint2", "int8", "uint8"])
def test_weights_are_read_as_coremltools_reads_them(dtype: str, tmp_path: Path) -> None:
    storage = import_coremltools("coremltools.libmilstoragepython")
    path = tmp_path / "weight.bin"
    writer = storage._BlobStorageWriter(str(path))
    if dtype == "float16":
        arrays = [RANDOM.standard_normal(n).astype(np.float16) for n in (37, 5)]
        offsets = [writer.write_fp16_data(a.view(np.uint16)) for a in arrays]
    else:
        bits = int(dtype.lstrip("uint"))
        low = 0 if dtype.startswith("u") else -(2 ** (bits - 1))
        stored = mil().types.string_to_nptype(dtype)
        arrays = [RANDOM.integers(low, low + 2**bits, n).astype(stored) for n in (37, 5)]
        offsets = [getattr(writer, f"write_{dtype}_data")(a) for a in arrays]
    del writer
    ours = WeightFile(path)
    for offset, array in zip(offsets, arrays, strict=True):
        values = Constant(dtype, array.shape, ours.read(offset, dtype)).values()
        np.testing.assert_array_equal(values, array)
        np.testing.assert_array_equal(values, read_back(path, offset, dtype))
    width = {"float16": 16}.get(dtype) or int(dtype.lstrip("uint"))
    assert ours.data_bytes == sum(
        -(-37 * width // 8) if n == 37 else -(-5 * width // 8) for n in (37, 5)
    )
    with pytest.raises(InputError, match="the program wants"):
        ours.read(offsets[0], "int32")
    with pytest.raises(InputError, match="no blob"):
        ours.read(offsets[0] + 64, dtype)


def counter(mb: Any, x: Any, state: Any) -> Any:
    """Writes x at place 1 of the state and gives the sum of what is there with 10 x."""
    held = mb.read_state(input=state)
    updated = mb.slice_update(x=held, update=x, begin=[1, 0], end=[2, 3])
    held = mb.coreml_update_state(state=state, value=updated)
    return mb.add(
        x=mb.slice_by_index(x=held, begin=[1, 0], end=[2, 3]), y=mb.mul(x=x, y=np.float16(10))
    )


def before_and_after(mb: Any, x: Any, state: Any) -> Any:
    """What stood at place 1 before the update is used after it: sharing memory would show."""
    held = mb.read_state(input=state)
    before = mb.slice_by_index(x=held, begin=[1, 0], end=[2, 3])
    updated = mb.slice_update(x=held, update=x, begin=[1, 0], end=[2, 3])
    after = mb.coreml_update_state(state=state, value=updated)
    return mb.sub(x=mb.slice_by_index(x=after, begin=[1, 0], end=[2, 3]), y=before)


def written_twice(mb: Any, x: Any, state: Any) -> Any:
    """The first update never reaches the state."""
    held = mb.read_state(input=state)
    lost = mb.slice_update(x=held, update=x, begin=[0, 0], end=[1, 3])
    kept = mb.slice_update(x=held, update=x, begin=[2, 0], end=[3, 3])
    after = mb.coreml_update_state(state=state, value=kept)
    return mb.add(x=mb.mul(x=after, y=np.float16(100)), y=lost)


def test_a_state_lasts_from_one_prediction_to_the_next(tmp_path: Path) -> None:
    interpreter = Interpreter(save_program(tmp_path / "p.mlpackage", counter, [ROW], [(PLACES, 3)]))
    state = interpreter.new_state()
    [out] = interpreter.run({"x0": ROW}, state).values()
    np.testing.assert_array_equal(out, ROW * 11)
    expected = np.zeros((PLACES, 3), np.float32)
    expected[1] = ROW
    np.testing.assert_array_equal(state["state0"].numpy(), expected)
    interpreter.run({"x0": ROW * 2}, state)
    np.testing.assert_array_equal(state["state0"].numpy(), expected * 2)
    assert not interpreter.new_state()["state0"].any()


def test_a_state_is_updated_in_place_where_that_cannot_be_told(tmp_path: Path) -> None:
    package = save_program(tmp_path / "p.mlpackage", counter, [ROW], [(PLACES, 3)])
    assert "state0" in states_in_place(read_package(package))
    for hazard in (before_and_after, written_twice):
        package = save_program(tmp_path / "p.mlpackage", hazard, [ROW], [(PLACES, 3)])
        assert not states_in_place(read_package(package))


def test_reading_a_state_gives_a_copy_where_it_matters(tmp_path: Path) -> None:
    package = save_program(tmp_path / "p.mlpackage", before_and_after, [ROW], [(PLACES, 3)])
    interpreter = Interpreter(package)
    state = interpreter.new_state()
    interpreter.run({"x0": ROW}, state)
    [out] = interpreter.run({"x0": ROW * 3}, state).values()
    np.testing.assert_array_equal(out, ROW * 2)

    package = save_program(tmp_path / "q.mlpackage", written_twice, [ROW], [(PLACES, 3)])
    interpreter = Interpreter(package)
    state = interpreter.new_state()
    [out] = interpreter.run({"x0": ROW}, state).values()
    expected = np.zeros((PLACES, 3))
    expected[0], expected[2] = ROW, 100 * ROW
    np.testing.assert_array_equal(out, expected)
    assert not state["state0"][0].any()


def test_weights_beyond_the_memory_bound_give_the_same_result(tmp_path: Path) -> None:
    weight = RANDOM.standard_normal((300, 200)).astype(np.float16)  # above what is always held
    x = RANDOM.standard_normal((1, 200)).astype(np.float16)
    package = save_program(
        tmp_path / "p.mlpackage", lambda mb, x: mb.linear(x=x, weight=weight), [x]
    )
    outputs = []
    for held_bytes in (1 << 30, 0):
        interpreter = Interpreter(package, held_bytes=held_bytes)
        outputs += [interpreter.run({"x0": x}, {}) for _ in range(2)]
    first = next(iter(outputs[0].values()))
    for out in outputs[1:]:
        np.testing.assert_array_equal(next(iter(out.values())), first)


def test_an_unknown_op_is_named(tmp_path: Path) -> None:
    package = save_program(tmp_path / "p.mlpackage", lambda mb, x: mb.erf(x=mb.cos(x=x)), [ROW])
    with pytest.raises(InputError, match="does not know: cos, erf"):
        Interpreter(package)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x0": ROW, "x1": ROW},
        {"x0": ROW.astype(np.float32)},
        {"x0": ROW[0]},
        {"x0": ROW[:, :2]},
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    inputs: dict[str, npt.NDArray[Any]], tmp_path: Path
) -> None:
    interpreter = Interpreter(
        save_program(tmp_path / "p.mlpackage", lambda mb, x: mb.abs(x=x), [ROW])
    )
    with pytest.raises(InputError):
        interpreter.run(inputs, {})


def test_an_index_outside_is_refused(tmp_path: Path) -> None:
    table, ids = RANDOM.standard_normal((5, 3)).astype(np.float16), np.array([5], dtype=np.int32)
    package = save_program(
        tmp_path / "p.mlpackage", lambda mb, x, i: mb.gather(x=x, indices=i), [table, ids]
    )
    with pytest.raises(InputError, match=r"outside of 0 \.\. 4"):
        Interpreter(package).run({"x0": table, "x1": ids}, {})


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("Manifest.json", 0.0),
        ("Manifest.json", 0.5),
        ("Manifest.json", None),
        ("Data/com.apple.CoreML/model.mlmodel", 0.3),
        ("Data/com.apple.CoreML/model.mlmodel", None),
        ("Data/com.apple.CoreML/weights/weight.bin", 0.05),
        ("Data/com.apple.CoreML/weights/weight.bin", 0.8),
        ("Data/com.apple.CoreML/weights/weight.bin", None),
    ],
)
def test_a_damaged_package_is_refused_with_its_place(
    file: str, kept: float | None, tmp_path: Path
) -> None:
    weight = RANDOM.standard_normal((300, 3)).astype(np.float16)
    package = save_program(
        tmp_path / "p.mlpackage", lambda mb, x: mb.linear(x=x, weight=weight), [ROW]
    )
    Interpreter(package)
    path = package / file
    if kept is None:
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError) as caught:
        Interpreter(package)
    assert "p.mlpackage" in str(caught.value)


def test_float16_values_lie_in_float32_tensors() -> None:
    from edgedistill.mil_interpreter import rounded_to_float16

    x = torch.tensor([1.0, 1 / 3, 65519.0, 65520.0, -1e9, 6e-8, 2e-8])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rounded_to_float16(x).numpy(), x.numpy().astype(np.float16))
    assert rounded_to_float16(x).dtype == torch.float32
