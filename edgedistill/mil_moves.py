"""MIL ops that only move values: their results are exact, and some share memory with an input.

Source: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
(the newest version of each op up to iOS 18).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edgedistill.errors import InputError

# Elements of a tiled tensor; a mask is what gets tiled.
MOST_TILED = 1 << 31


def ints(values: Tensor) -> list[int]:
    """An integer or bool tensor as a flat list."""
    return [int(v) for v in values.reshape(-1).tolist()]


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where ``cond`` is true, else b, broadcast."""
    return torch.where(cond, a, b)


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
