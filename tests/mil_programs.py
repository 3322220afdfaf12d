"""Small ML programs, built and saved by coremltools itself."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.quiet_coremltools import import_coremltools


def mil() -> Any:
    return import_coremltools("coremltools.converters.mil.mil")


def save_program(
    path: Path,
    build: Callable[..., Any],
    inputs: Sequence[npt.NDArray[Any]],
    states: Sequence[tuple[int, ...]] = (),
) -> Path:
    """Save ``build(mb, *inputs, *states)``, of inputs like these (``x0``, ``x1``, …)."""
    ct = import_coremltools()
    mb, types = mil().Builder, mil().types
    kinds = {np.dtype(np.float16): types.fp16, np.dtype(np.int32): types.int32}
    specs = [mb.TensorSpec(x.shape, dtype=kinds[x.dtype]) for x in inputs]
    specs += [mb.StateTensorSpec(shape, dtype=types.fp16) for shape in states]
    names = [f"x{i}" for i in range(len(inputs))] + [f"state{i}" for i in range(len(states))]

    program = mil().Program()
    signature = dict(zip(names, specs, strict=True))
    with mil().Function(signature, opset_version=ct.target.iOS18) as function:
        outputs = build(mb, *(function.inputs[name] for name in names))
        function.set_outputs(list(outputs) if isinstance(outputs, list | tuple) else [outputs])
    program.add_function("main", function)
    with contextlib.redirect_stderr(io.StringIO()):
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            pass_pipeline=ct.PassPipeline.EMPTY,
        )
    shutil.rmtree(path, ignore_errors=True)
    model.save(str(path))
    return path
