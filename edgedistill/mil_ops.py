"""MIL ops as torch functions, parameter names and meaning as in Apple's op reference.

Source: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
(the newest version of each op up to iOS 18).  Float values are float32 tensors that may hold
float16 values; rounding is the interpreter's business, except inside an op of several steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgedistill.errors import InputError

Rounding = Callable[[Tensor], Tensor]

# Elements of a tiled tensor; a mask is what gets tiled.
MOST_TILED = 1 << 31


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


def ints(values: Tensor) -> list[int]:
    """An integer or bool tensor as a flat list."""
    return [int(v) for v in values.reshape(-1).tolist()]


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


def reduce_max(x: Tensor, axes: Tensor, keep_dims: Tensor) -> Tensor:
    """The largest element over ``axes``."""
    return torch.amax(x, dim=ints(axes), keepdim=bool(keep_dims))


def reduce_mean(x: Tensor, axes: Tensor, keep_dims: Tensor) -> Tensor:
    """The mean over ``axes``."""
    return torch.mean(x, dim=ints(axes), keepdim=bool(keep_dims))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]."""
    return functional.linear(x, weight, bias)


def gather(
    x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Tensor, validate_indices: Tensor
) -> Tensor:
    """Slices of x along ``axis``; an index outside is refused, here in any case."""
    if int(batch_dims) != 0:
        raise InputError("gather with batch_dims is not supported")
    dim = int(axis) % x.ndim
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < x.shape[dim]:
        raise InputError(f"gather: an index lies outside of 0 .. {x.shape[dim] - 1}")
    picked = x.index_select(dim, indices.reshape(-1))
    return picked.reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])


def shape(x: Tensor) -> Tensor:
    """int32 [rank]."""
    return torch.tensor(x.shape, dtype=torch.int32)


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """Row-major reshape; -1 is inferred, 0 copies the dimension of x."""
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(ints(shape))]
    return x.reshape(sizes)


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    """Dimension i of the result is dimension perm[i] of x."""
    return x.permute(ints(perm))


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    """Insert dimensions of size 1; ``axes`` are places in the result."""
    rank = x.ndim + axes.numel()
    for axis in sorted(a % rank for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> Sequence[Tensor]:
    """Cut x along ``axis`` into equal parts, or into parts of the given sizes."""
    dim = int(axis)
    if split_sizes is not None:
        return _parts(x, ints(split_sizes), dim)
    parts = int(num_splits) if num_splits is not None else 0
    if parts < 1 or x.shape[dim] % parts:
        raise InputError(f"split: {x.shape[dim]} elements into {parts} parts")
    return _parts(x, [x.shape[dim] // parts] * parts, dim)


def _parts(x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [x.narrow(dim, end - size, size) for size, end in zip(sizes, ends, strict=True)]


def concat(values: Sequence[Tensor], axis: Tensor, interleave: Tensor) -> Tensor:
    """Put tensors behind each other along ``axis``."""
    if bool(interleave):
        raise InputError("concat with interleave is not supported")
    return torch.cat(list(values), dim=int(axis))


def tile(x: Tensor, reps: Tensor) -> Tensor:
    """Repeat x as a whole, ``reps[i]`` times along dimension i."""
    times = ints(reps)
    if min(times, default=1) < 1 or x.numel() * math.prod(times) > MOST_TILED:
        raise InputError(f"tile: {tuple(x.shape)} repeated {times} times")
    return x.repeat(times)


def _indices(
    sizes: Sequence[int],
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> tuple[int | slice, ...]:
    """The index that ``slice_by_index`` and ``slice_update`` describe; strides are positive."""

    def flags(mask: Tensor | None) -> list[int]:
        return [0] * len(sizes) if mask is None else ints(mask)

    steps = [1] * len(sizes) if stride is None else ints(stride)
    if min(steps) < 1:
        raise InputError(f"a slice with the strides {steps} is not supported")
    index: list[int | slice] = []
    for first, last, step, from_start, to_end, single in zip(
        ints(begin),
        ints(end),
        steps,
        flags(begin_mask),
        flags(end_mask),
        flags(squeeze_mask),
        strict=True,
    ):
        if single:
            index.append(first)
        else:
            index.append(slice(None if from_start else first, None if to_end else last, step))
    return tuple(index)


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """x[begin:end:stride]; masks open a side, or take one element and drop the dimension."""
    return x[_indices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """x with the slice replaced by ``update``, **in place**: the caller clones what must stay."""
    place = x[_indices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)]
    if place.shape != update.shape:
        raise InputError(
            f"slice_update: the place has the shape {tuple(place.shape)}, "
            f"the update {tuple(update.shape)}"
        )
    place.copy_(update)
    return x


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
    "reduce_max": reduce_max,
    "reduce_mean": reduce_mean,
    "linear": linear,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
}
KERNELS: dict[str, Kernel] = (
    {name: Kernel(run) for name, run in _COMPUTES.items()}
    | {name: Kernel(run, exact=True) for name, run in _MOVES.items()}
    | {name: Kernel(run, exact=True, views=True) for name, run in _VIEWS.items()}
    | {"scaled_dot_product_attention": Kernel(scaled_dot_product_attention, rounds_inside=True)}
)
