"""MIL ops as torch functions, parameter names and meaning as in Apple's op reference.

Source: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
(the newest version of each op up to iOS 18).  Float values are float32 tensors that may hold
float16 values; rounding is the interpreter's business, except inside an op of several steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.errors import InputError
from edgedistill.mil_moves import (
    concat,
    expand_dims,
    gather,
    ints,
    reshape,
    select,
    shape,
    slice_by_index,
    slice_update,
    split,
    tile,
    transpose,
)

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """How an op is computed.

    Attributes:
        run: called with the op's inputs by parameter name.
        exact: it only moves values, so its result needs no rounding.
        views: its result may share memory with an input.
        rounds_inside: ``run`` also takes ``rounded``, to round its intermediate results.
    """

    run: Callable[..., Any]  # -> Tensor, or a sequence of them
    exact: bool = False
    views: bool = False
    rounds_inside: bool = False


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, broadcast."""
    return x + y


def sub(x: Tensor, y: Tensor) -> Tensor:
    """x - y, broadcast."""
    return x - y


def mul(x: Tensor, y: Tensor) -> Tensor:
    """x * y, broadcast."""
    return x * y


def real_div(x: Tensor, y: Tensor) -> Tensor:
    """x / y, broadcast, never an integer division."""
    return x / y


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """The larger of x and y, broadcast."""
    return torch.maximum(x, y)


def absolute(x: Tensor) -> Tensor:
    """|x|."""
    return x.abs()


def rsqrt(x: Tensor, epsilon: Tensor) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + epsilon)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return functional.silu(x)


def gelu(x: Tensor, mode: str) -> Tensor:
    """x * Phi(x), exactly or by its approximation with tanh."""
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise InputError(f"gelu in the mode {mode} is not supported")
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(x)


def softmax(x: Tensor, axis: Tensor) -> Tensor:
    """exp(x), divided by its sum along ``axis``."""
    return torch.softmax(x, dim=int(axis))


def less(x: Tensor, y: Tensor) -> Tensor:
    """x < y, broadcast: bool."""
    return x < y


def reduce_max(x: Tensor, axes: Tensor, keep_dims: Tensor) -> Tensor:
    """The largest element over ``axes``."""
    return torch.amax(x, dim=ints(axes), keepdim=bool(keep_dims))


def reduce_mean(x: Tensor, axes: Tensor, keep_dims: Tensor) -> Tensor:
    """The mean over ``axes``."""
    return torch.mean(x, dim=ints(axes), keepdim=bool(keep_dims))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]."""
    return functional.linear(x, weight, bias)


def matmul(
    x: Tensor, y: Tensor, transpose_x: Tensor | None = None, transpose_y: Tensor | None = None
) -> Tensor:
    """x times y over the last two dimensions, either transposed first; the others broadcast."""
    x = x.transpose(-2, -1) if transpose_x is not None and bool(transpose_x) else x
    y = y.transpose(-2, -1) if transpose_y is not None and bool(transpose_y) else y
    return x @ y


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    rounded: Rounding,
) -> Tensor:
    """softmax(query key^T / sqrt(E) + mask) value.

    Scores, masked scores and probabilities are rounded too, as by a device that runs the op in
    parts.
    """
    scores = rounded((query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = rounded(scores + attn_mask)
    return rounded(torch.softmax(scores, dim=-1)) @ value


def constexpr_blockwise_shift_scale(
    data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> Tensor:
    """(data - offset) * scale, where each scale and offset serves a block of data."""
    blocked = [s for size, n in zip(data.shape, scale.shape, strict=True) for s in (n, size // n)]
    one_each = [s for n in scale.shape for s in (n, 1)]
    out = data.to(torch.float32, copy=True).reshape(blocked)
    if offset is not None:
        out -= offset.to(torch.float32).reshape(one_each)
    out *= scale.reshape(one_each)
    return out.reshape(data.shape)


def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, vector_axis: Tensor | None = None
) -> Tensor:
    """lut [1.., entries, 1] at ``indices``: one table for the whole tensor, of single values."""
    if lut.numel() != lut.shape[-2]:
        raise InputError("constexpr_lut_to_dense with several tables or vectors is not supported")
    return lut.reshape(-1)[indices.long()]


_MOVES: dict[str, Callable[..., Any]] = {
    "shape": shape,
    "less": less,
    "select": select,
    "gather": gather,
    "concat": concat,
    "tile": tile,
    "slice_update": slice_update,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
}
_VIEWS: dict[str, Callable[..., Any]] = {
    "reshape": reshape,
    "transpose": transpose,
    "expand_dims": expand_dims,
    "split": split,
    "slice_by_index": slice_by_index,
}
_COMPUTES: dict[str, Callable[..., Any]] = {
    "add": add,
    "sub": sub,
    "mul": mul,
    "real_div": real_div,
    "maximum": maximum,
    "abs": absolute,
    "rsqrt": rsqrt,
    "silu": silu,
    "gelu": gelu,
    "tanh": tanh,
    "softmax": softmax,
    "reduce_max": reduce_max,
    "reduce_mean": reduce_mean,
    "linear": linear,
    "matmul": matmul,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
}
KERNELS: dict[str, Kernel] = (
    {name: Kernel(run) for name, run in _COMPUTES.items()}
    | {name: Kernel(run, exact=True) for name, run in _MOVES.items()}
    | {name: Kernel(run, exact=True, views=True) for name, run in _VIEWS.items()}
    | {"scaled_dot_product_attention": Kernel(scaled_dot_product_attention, rounds_inside=True)}
)
