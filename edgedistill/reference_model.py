"""A student in ``transformers``, in float32: the judge, and what quality is compared with.

Nothing of our own decoder runs here: the modules are those of ``transformers``.  A quantized
student is dequantized for them, because only float students open there.

A small student is loaded whole, by ``transformers`` itself.  Of a large one the modules are empty:
the weights of a block are read when a text reaches it and dropped behind it, so that memory grows
with a block and not with the model.  Both compute the same numbers.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import InputError, UnavailableError
from edgedistill.fused_tensors import fused_tensors
from edgedistill.student import Student, dequantize_student

# Of float32 weights; more are streamed.
HELD_BYTES = 4_000_000_000

_Slot = tuple[Any, str]  # a module, and its own name of one of its parameters


def load_reference(student: Path, *, threads: int, held_bytes: int = HELD_BYTES) -> Any:
    """A causal language model of ``transformers`` in float32, in evaluation mode.

    Args:
        student: float or quantized.
        threads: of torch, for the whole process.
        held_bytes: float32 weights of up to so many bytes are held, others streamed.

    Raises:
        InputError: the directory is damaged, or ``transformers`` does not know the model.
        UnavailableError: torch is not installed.
    """
    torch, transformers = _libraries()
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    opened = Student(student)
    if is_streamed(opened, held_bytes):
        return _empty_model(opened, transformers).eval()
    with tempfile.TemporaryDirectory(prefix="edgedistill-") as scratch:
        readable = student
        if opened.is_quantized:
            readable = Path(scratch)
            dequantize_student(student, readable)
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(readable),
                dtype=torch.float32,
                # Its own choice of attention: Gemma 2 has soft caps, for which sdpa has no place.
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _unopened(student, error) from error
    _refuse_misfit(info, student)
    return model.eval()


def is_streamed(student: Student, held_bytes: int = HELD_BYTES) -> bool:
    """Whether the weights of a student are too many to be held in float32."""
    return sum(4 * math.prod(student.shape(name)) for name in student.names()) > held_bytes


def _empty_model(student: Student, transformers: Any) -> Any:
    """The model without its weights, which come when something is about to go through them."""
    import torch
    from accelerate import init_empty_weights

    path = student.path
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        with init_empty_weights(include_buffers=False):  # what a config decides is computed
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unopened(path, error) from error
    model.tie_weights()
    weights = _Weights(student)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted, stored = shapes.keys(), weights.shapes.keys()
    tied = {"lm_head.weight"} - wanted
    _refuse_misfit(
        {
            "missing_keys": wanted - stored,
            "unexpected_keys": stored - wanted - tied,
            "mismatched_keys": {n for n in wanted & stored if weights.shapes[n] != shapes[n]},
        },
        path,
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for part in _parts(model):
        slots = {(module, own): names[id(p)] for module, own, p in _parameters(part)}
        empty = {(module, own): p for module, own, p in _parameters(part)}
        part.register_forward_pre_hook(_before(weights, slots))
        part.register_forward_hook(_behind(empty))
    return model


class _Weights:
    """The tensors of a student by the names of ``transformers``, which fuses some of them.

    Attributes:
        shapes: of all tensors.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        fused = fused_tensors(student.config, where=str(student.path))
        parts = {part for of in fused.values() for part in of}
        alone = (name for name in student.names() if name not in parts)
        self._parts = {name: [name] for name in alone} | {n: list(of) for n, of in fused.items()}
        whole = (n for n, parts in self._parts.items() if all(p in student for p in parts))
        self.shapes = {name: self._shape(name) for name in whole}

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor in float32, its parts below each other."""
        parts = [self._student.read(part) for part in self._parts[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [self._student.shape(part) for part in self._parts[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _parts(model: Any) -> Iterator[Any]:
    """The blocks, and what has weights outside of them: embedding, last norm, head."""
    blocks = list(model.model.layers)
    yield from blocks
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside and any(p is not None for p in module._parameters.values()):
            yield module


def _parameters(part: Any) -> Iterable[tuple[Any, str, Any]]:
    """(module, its own name of a parameter, the parameter) of all below a part."""
    for module in part.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield module, own, parameter


def _before(weights: _Weights, slots: dict[_Slot, str]) -> Callable[..., None]:
    import torch

    def load(*_: Any) -> None:
        for (module, own), name in slots.items():
            weight = torch.from_numpy(weights.read(name))
            module._parameters[own] = torch.nn.Parameter(weight, requires_grad=False)

    return load


def _behind(empty: dict[_Slot, Any]) -> Callable[..., None]:
    def drop(*_: Any) -> None:
        for (module, own), nothing in empty.items():
            module._parameters[own] = nothing

    return drop


def _unopened(student: Path, error: Exception) -> InputError:
    return InputError(
        f"transformers cannot open it ({error})",
        where=str(student),
        hint="a student is a complete Hugging Face directory of a causal language model",
    )


def _refuse_misfit(info: dict[str, Any], student: Path) -> None:
    """transformers fills missing weights with random numbers and only warns."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in info.get(kind, ()))
        if keys:
            raise InputError(
                f"{kind.replace('_', ' ')}: {', '.join(keys[:3])} ({len(keys)} in all)",
                where=str(student),
                hint="weights and config.json do not belong together",
            )


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnavailableError(
            f"torch and transformers are needed here ({error})",
            hint="pip install 'edgedistill[build]'",
        ) from error
    return torch, transformers
