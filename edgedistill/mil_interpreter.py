"""Execute a saved ``.mlpackage`` on any machine: its own program and weights, op by op, in torch.

In ``float16`` mode every op computes in float32 and its result is rounded to float16, as a device
stores it; in ``float32`` mode nothing is rounded, which tells a wrong program from float16 noise.
States are updated in place where the program lets it, else copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgedistill.errors import InputError
from edgedistill.mil_ops import KERNELS, Kernel
from edgedistill.mil_package import DAMAGE, Constant, Operation, Package, read_package
from edgedistill.mil_states import last_uses, state_name, states_in_place

Precision = Literal["float16", "float32"]
State = dict[str, Tensor]

ALWAYS_HELD_BYTES = 1 << 16
VARIADIC = {"values"}  # parameters that take a list even of one


def rounded_to_float16(x: Tensor) -> Tensor:
    """float32 holding the nearest float16 values; beyond 65504 infinite, as a device does."""
    return x.to(torch.float16).to(torch.float32)


@dataclass(frozen=True)
class _Step:
    """An op, ready to run.

    Attributes:
        kernel: None where the op reads or writes a state.
        fixed: arguments that are the same in every run.
        varying: parameter -> sources, of the others.
        rounds: whether its results are rounded to float16.
        frees: the values that no later op uses.
    """

    op: Operation
    kernel: Kernel | None
    fixed: dict[str, Any]
    varying: dict[str, tuple[str | Constant, ...]]
    rounds: bool
    frees: tuple[str, ...]


class Interpreter:
    """A package, ready to run.

    Args:
        package: the ``.mlpackage``.
        precision: see the module.
        held_bytes: most bytes of weights that stay expanded to float32 between runs; the others
            are expanded anew each time that they are used.

    Raises:
        InputError: the package is damaged, or has an op that is not known here.
        UnavailableError: coremltools, which reads its protobuf, is not installed.
    """

    def __init__(
        self, package: Path, *, precision: Precision = "float16", held_bytes: int = 1 << 30
    ) -> None:
        self.package: Package = read_package(package)
        self.precision = precision
        self._operands = _Operands(self.package, precision, held_bytes)
        try:
            self._in_place = states_in_place(self.package)
            self._steps = self._plan()
        except (*DAMAGE, RuntimeError) as error:  # torch raises the latter
            raise InputError(
                f"has ops that do not fit together ({error!r})", where=str(package)
            ) from error

    def new_state(self) -> State:
        """Zeroed states, as ``MLModel.makeState`` gives them: float32 tensors."""
        try:
            return {n: torch.zeros(shape) for n, (_, shape) in self.package.states.items()}
        except RuntimeError as error:
            raise InputError(f"its states do not fit into memory ({error})") from error

    @torch.inference_mode()
    def run(
        self, inputs: Mapping[str, npt.NDArray[Any]], state: State
    ) -> dict[str, npt.NDArray[np.float32]]:
        """One prediction; ``state`` is changed.

        Args:
            inputs: by name, in the dtype and a shape that the package declares.
            state: from :meth:`new_state`.

        Returns:
            The outputs by name, as float32.

        Raises:
            InputError: an input is missing or has another dtype or shape.
        """
        values = self._checked(inputs)
        for step in self._steps:
            self._run(step, values, state)
        missing = set(self.package.outputs) - set(values)
        if missing:
            raise InputError(f"computes no {min(missing)}", where=str(self.package.path))
        return {
            name: values[name].to(torch.float32).numpy(force=True) for name in self.package.outputs
        }

    def _checked(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        declared = self.package.inputs
        if set(inputs) != set(declared):
            raise InputError(f"the inputs are {sorted(inputs)}, not {sorted(declared)}")
        values = {}
        for name, array in inputs.items():
            spec = declared[name]
            fits = len(array.shape) == len(spec.largest) and all(
                low <= size <= high
                for low, size, high in zip(spec.smallest, array.shape, spec.largest, strict=True)
            )
            if not fits or array.dtype != spec.dtype:
                raise InputError(
                    f"{name} is {array.dtype} {array.shape}, the package takes {spec.dtype} "
                    f"of {spec.smallest} to {spec.largest}"
                )
            values[name] = _as_tensor(array)
        return values

    def _run(self, step: _Step, values: dict[str, Tensor], state: State) -> None:
        try:
            if step.kernel is None:
                self._touch_state(step.op, values, state)
            else:
                self._compute(step, step.kernel, values)
            for name in step.frees:
                del values[name]
        except (*DAMAGE, RuntimeError) as error:
            raise InputError(
                f"{step.op.kind} of {', '.join(step.op.outputs)} cannot be computed ({error!r})",
                where=str(self.package.path),
                hint="the package is damaged: export it again",
            ) from error

    def _compute(self, step: _Step, kernel: Kernel, values: dict[str, Tensor]) -> None:
        arguments = dict(step.fixed)
        for parameter, sources in step.varying.items():
            operands = [self._operands.get(source, values) for source in sources]
            arguments[parameter] = operands if parameter in VARIADIC else operands[0]
        if step.op.kind == "slice_update" and step.op.outputs[0] not in self._in_place:
            arguments["x"] = arguments["x"].clone()
        results = kernel.run(**arguments)
        for name, result in zip(
            step.op.outputs, [results] if isinstance(results, Tensor) else results, strict=True
        ):
            values[name] = rounded_to_float16(result) if step.rounds else result

    def _touch_state(self, op: Operation, values: dict[str, Tensor], state: State) -> None:
        name = state_name(op)
        if op.kind == "read_state":
            held = state[name]
            values[op.outputs[0]] = held if name in self._in_place else held.clone()
        else:
            data = op.inputs["data"][0]
            new = self._operands.get(data, values)
            if new.data_ptr() != state[name].data_ptr():
                state[name].copy_(new)

    def _plan(self) -> tuple[_Step, ...]:
        """Every op with its kernel, constants left to :class:`_Operands`."""
        unknown = sorted(
            {op.kind for op in self.package.operations}
            - set(KERNELS)
            - {"read_state", "write_state"}
        )
        if unknown:
            raise InputError(
                f"has ops that the interpreter does not know: {', '.join(unknown)}",
                where=str(self.package.path),
            )
        dying: dict[int, list[str]] = {}
        for name, index in last_uses(self.package).items():
            dying.setdefault(index, []).append(name)
        return tuple(
            self._step(op, tuple(dying.get(index, ())))
            for index, op in enumerate(self.package.operations)
            if not op.kind.startswith("constexpr_")
        )

    def _step(self, op: Operation, frees: tuple[str, ...]) -> _Step:
        kernel = KERNELS.get(op.kind)
        fixed: dict[str, Any] = {}
        for parameter, sources in op.inputs.items():
            text = self._operands.text(sources[0]) if sources else None
            if text is not None:
                fixed[parameter] = text
            elif parameter not in VARIADIC and self._operands.is_small_constant(sources[0]):
                fixed[parameter] = self._operands.get(sources[0], {})
        varying = {p: sources for p, sources in op.inputs.items() if p not in fixed}
        if kernel is not None and kernel.rounds_inside:
            fixed["rounded"] = self._operands.rounded
        exact = kernel is None or kernel.exact or self.precision == "float32"
        rounds = not exact and op.output_dtypes[0] == "float16"
        return _Step(op, kernel, fixed, varying, rounds, frees)


class _Operands:
    """What ops take: values of the run, constants, and weights expanded from ``constexpr`` ops."""

    def __init__(self, package: Package, precision: Precision, held_bytes: int) -> None:
        self._constants = package.constants
        self._compressed = {
            op.outputs[0]: op for op in package.operations if op.kind.startswith("constexpr_")
        }
        self._float16 = precision == "float16"
        self._budget = held_bytes
        self._held: dict[str, Tensor] = {}

    def rounded(self, x: Tensor) -> Tensor:
        """x as the precision stores it."""
        return rounded_to_float16(x) if self._float16 else x

    def is_small_constant(self, source: str | Constant) -> bool:
        """Whether it is a constant that may always be held."""
        constant = source if isinstance(source, Constant) else self._constants.get(source)
        return constant is not None and len(constant.stored) <= ALWAYS_HELD_BYTES

    def text(self, source: str | Constant) -> str | None:
        """What a constant says in words, such as the mode of an op; None for numbers."""
        constant = source if isinstance(source, Constant) else self._constants.get(source)
        stored = constant.stored if constant is not None else None
        return stored if isinstance(stored, str) else None

    def get(self, source: str | Constant, values: Mapping[str, Tensor]) -> Tensor:
        """A value by name, or a constant in place."""
        if isinstance(source, Constant):
            return _as_tensor(source.values())
        if source in values:
            return values[source]
        if source in self._held:
            return self._held[source]
        tensor = self._expand(source)
        size = tensor.numel() * tensor.element_size()
        # The first ones stay: a decoder uses all its weights in a circle, where dropping the least
        # recently used would drop each just before its turn.
        if size <= ALWAYS_HELD_BYTES or size <= self._budget:
            self._budget -= size if size > ALWAYS_HELD_BYTES else 0
            self._held[source] = tensor
        return tensor

    def _expand(self, name: str) -> Tensor:
        if name in self._constants:
            return _as_tensor(self._constants[name].values())
        if name not in self._compressed:
            raise InputError(f"the program uses {name} before it is computed")
        op = self._compressed[name]
        arguments = {
            parameter: self._expand(source)
            if isinstance(source, str)
            else _as_tensor(source.values())
            for parameter, (source, *_) in op.inputs.items()
        }
        result = KERNELS[op.kind].run(**arguments)
        assert isinstance(result, Tensor)
        return self.rounded(result) if op.output_dtypes[0] == "float16" else result


def _as_tensor(array: npt.NDArray[Any]) -> Tensor:
    """float16 widens to float32; a copy, because torch wants writable memory."""
    if array.dtype == np.float16:
        return torch.from_numpy(array.astype(np.float32))
    if array.dtype == np.uint16:
        return torch.from_numpy(array.astype(np.int32))
    return torch.from_numpy(np.array(array))
