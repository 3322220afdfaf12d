"""Read a saved ``.mlpackage``: its program, op by op, and its weight file.

This shares no code with the exporter.  The format: ``Model.proto`` and ``MIL.proto`` of
https://github.com/apple/coremltools, read with coremltools' generated classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError
from edgedistill.mil_weight_file import WeightFile
from edgedistill.quiet_coremltools import import_coremltools

Array = npt.NDArray[Any]

# What parts that contradict each other, or are not there, make a reader raise.
DAMAGE = (
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
# A shape is taken for true up to this many elements: 16 GB of float16.
MOST_ELEMENTS = 1 << 33
# MIL.proto's DataType -> (name, numpy dtype that holds it, bits of one stored element)
DATA_TYPES: dict[int, tuple[str, str, int]] = {
    1: ("bool", "?", 8),
    2: ("string", "O", 0),
    10: ("float16", "<f2", 16),
    11: ("float32", "<f4", 32),
    21: ("int8", "i1", 8),
    22: ("int16", "<i2", 16),
    23: ("int32", "<i4", 32),
    25: ("int4", "i1", 4),
    31: ("uint8", "u1", 8),
    32: ("uint16", "<u2", 16),
    35: ("uint4", "u1", 4),
    36: ("uint2", "u1", 2),
    37: ("uint1", "u1", 1),
    39: ("uint3", "u1", 3),
}


@dataclass(frozen=True)
class Constant:
    """A value that the package holds: ``stored`` are its bytes, or text."""

    dtype: str
    shape: tuple[int, ...]
    stored: npt.NDArray[np.uint8] | str

    def values(self) -> Array:
        """The value in its dtype and shape; integers of fewer bits widened to 8."""
        if isinstance(self.stored, str):
            return np.array(self.stored, dtype=object)
        _, numpy_dtype, bits = _BY_NAME[self.dtype]
        count = math.prod(self.shape)
        if bits == 0:
            raise InputError(f"a constant of the type {self.dtype} is held as numbers")
        if bits >= 8:
            if self.stored.size * 8 % bits:
                raise InputError(f"a constant of {self.dtype} has {self.stored.size} bytes")
            flat = self.stored.view(numpy_dtype)
        else:
            flat = _unpack(self.stored, bits)
            if self.dtype.startswith("int"):  # two's complement of that width
                flat = (flat << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
        if min(self.shape, default=0) < 0 or flat.size < count:
            raise InputError(f"a constant of shape {self.shape} has {flat.size} values")
        return flat[:count].reshape(self.shape)


@dataclass(frozen=True)
class Operation:
    """One op: its inputs by parameter (names of values, or constants in place), its outputs."""

    kind: str
    inputs: dict[str, tuple[str | Constant, ...]]
    outputs: tuple[str, ...]
    output_dtypes: tuple[str, ...]


@dataclass(frozen=True)
class InputSpec:
    """An input: its dtype, and the smallest and largest size of each dimension."""

    dtype: str
    smallest: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True)
class Package:
    """A package's one function.

    Attributes:
        states: name -> (dtype, shape).
        constants: name -> value, of all ``const`` ops; ``operations`` holds the others in order.
        metadata: what the author wrote into it.
    """

    path: Path
    inputs: dict[str, InputSpec]
    states: dict[str, tuple[str, tuple[int, ...]]]
    outputs: tuple[str, ...]
    constants: dict[str, Constant]
    operations: tuple[Operation, ...]
    metadata: dict[str, str]


def read_package(path: Path) -> Package:
    """Read the program of an ``.mlpackage``; its weights stay in the mapped file.

    Raises:
        InputError: it is missing, damaged, or holds something other than one ML program.
        UnavailableError: coremltools, whose protobuf classes read it, is not installed.
    """
    spec = _read_spec(path)
    try:
        return _read_program(path, spec)
    except DAMAGE as error:
        raise _damaged(path, error) from error


def _read_program(path: Path, spec: Any) -> Package:
    function = spec.mlProgram.functions.get("main")
    if function is None or len(spec.mlProgram.functions) != 1:
        raise InputError("is not an ML program of one function", where=str(path))
    if function.opset not in function.block_specializations:
        raise InputError("is a program without its block of operations", where=str(path))
    block = function.block_specializations[function.opset]
    weights = _Weights(path / "Data" / "com.apple.CoreML")
    constants: dict[str, Constant] = {}
    operations = []
    for op in block.operations:
        if op.type == "const":
            constants[op.outputs[0].name] = weights.constant(op.attributes["val"])
        else:
            operations.append(_operation(op, weights))
    return Package(
        path=path,
        inputs={f.name: _input_spec(f.type.multiArrayType) for f in spec.description.input},
        states={f.name: _state_spec(f, function) for f in spec.description.state},
        outputs=tuple(block.outputs),
        constants=constants,
        operations=tuple(operations),
        metadata=dict(spec.description.metadata.userDefined),
    )


def _read_spec(path: Path) -> Any:
    model = import_coremltools("coremltools.proto.Model_pb2").Model()
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        program = Path(entry["path"])
        if program.is_absolute() or ".." in program.parts:
            raise InputError(f"names a program outside: {program}", where=str(path))
        model.ParseFromString((path / "Data" / program).read_bytes())
    except OSError as error:
        raise InputError(f"is not an mlpackage ({error.strerror})", where=str(path)) from error
    except (*DAMAGE, DecodeError) as error:
        raise _damaged(path, error) from error
    return model


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"is a damaged mlpackage ({error!r})", where=str(path), hint="export it again"
    )


class _Weights:
    """Turns ``Value`` messages into constants; each weight file is opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, WeightFile] = {}

    def constant(self, value: Any) -> Constant:
        tensor_type = value.type.tensorType
        shape = tuple(int(d.constant.size) for d in tensor_type.dimensions)
        dtype = _dtype_name(tensor_type.dataType)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            return Constant(dtype, shape, self._file(blob.fileName).read(blob.offset, dtype))
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field == "strings":
            return Constant(dtype, shape, str(tensor.strings.values[0]))
        values = getattr(tensor, field).values
        if field != "bytes":
            values = np.array(values, dtype=_BY_NAME[dtype][1]).tobytes()
        return Constant(dtype, shape, np.frombuffer(values, dtype=np.uint8))

    def _file(self, name: str) -> WeightFile:
        if name not in self._files:
            relative = Path(name.removeprefix("@model_path/"))
            if relative.is_absolute() or ".." in relative.parts:
                raise InputError(f"names a weight file outside: {name}", where=str(self._folder))
            self._files[name] = WeightFile(self._folder / relative)
        return self._files[name]


def _operation(op: Any, weights: _Weights) -> Operation:
    inputs = {
        parameter: tuple(
            a.name if a.WhichOneof("binding") == "name" else weights.constant(a.value)
            for a in argument.arguments
        )
        for parameter, argument in op.inputs.items()
    }
    return Operation(
        kind=op.type,
        inputs=inputs,
        outputs=tuple(output.name for output in op.outputs),
        output_dtypes=tuple(_dtype_name(o.type.tensorType.dataType) for o in op.outputs),
    )


def _input_spec(array: Any) -> InputSpec:
    dtypes = {0x10010: "float16", 0x10020: "float32", 0x20020: "int32"}  # ArrayDataType
    if array.dataType not in dtypes:
        raise InputError(f"an input has the array type {array.dataType:#x}, not known here")
    ranges = array.shapeRange.sizeRanges
    smallest = tuple(int(r.lowerBound) for r in ranges) or tuple(array.shape)
    largest = tuple(int(r.upperBound) for r in ranges) or tuple(array.shape)
    return InputSpec(dtypes[array.dataType], smallest, largest)


def _state_spec(feature: Any, function: Any) -> tuple[str, tuple[int, ...]]:
    for declared in function.inputs:
        if declared.name == feature.name:
            tensor = declared.type.stateType.wrappedType.tensorType
            shape = tuple(int(d.constant.size) for d in tensor.dimensions)
            if min(shape, default=0) < 1 or math.prod(shape) > MOST_ELEMENTS:
                raise InputError(f"the state {feature.name} has the shape {shape}")
            return _dtype_name(tensor.dataType), shape
    raise InputError(f"the state {feature.name} is no input of the program")


def _dtype_name(data_type: int) -> str:
    if data_type not in DATA_TYPES:
        raise InputError(f"a value has the MIL data type {data_type}, which is not known here")
    return DATA_TYPES[data_type][0]


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Elements narrower than a byte, the first in the low bits; some of 3 bits lie across two.

    So ``mlmodel/src/MILBlob/SubByteTypes.cpp`` packs them.  The last bytes may be no whole element.
    """
    period = math.lcm(bits, 8)
    runs = np.pad(packed, (0, -packed.size % (period // 8))).reshape(-1, period // 8)
    elements = np.empty((len(runs), period // bits), dtype=np.uint8)
    for i, start in enumerate(range(0, period, bits)):
        byte, shift = divmod(start, 8)
        value = runs[:, byte] >> np.uint8(shift)
        if shift + bits > 8:
            value |= runs[:, byte + 1] << np.uint8(8 - shift)
        elements[:, i] = value & np.uint8((1 << bits) - 1)
    return elements.reshape(-1)


_BY_NAME = {name: (name, dtype, bits) for name, dtype, bits in DATA_TYPES.values()}
