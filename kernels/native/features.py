"""Features of rows on a CPU, and sums over them added to attention, compiled: `features.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attnplan.kernels.native import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

MOST = 1024
"""Features of a sketch."""


def is_fast(degree: int, features: int) -> bool:
    """Whether `sketch` makes such sketches: of degree two, a power of two of features."""
    return degree == 2 and 2 <= features <= MOST and features & (features - 1) == 0


def sketches(rows: Tensor, degree: int, features: int) -> bool:
    """Whether `sketch` makes them of these rows."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and is_fast(degree, features)
        and build.load().library is not None
    )


def sketch(rows: Tensor, scale: float, buckets: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
    """Tensor sketches of degree two of [1, rows * scale], in frequencies; see `tensor_sketch`.

    Args:
        rows: float32 [..., columns].
        scale: of the columns.
        buckets: int64 [2, columns + 1].
        signs: of the columns, same shape.
        weight: of the frequencies, [features / 2 + 1].

    Returns:
        float32 [..., features].
    """
    library = build.load().library
    assert library is not None
    flat = rows.reshape(-1, rows.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    features = 2 * (len(weight) - 1)
    signs, weight = (t.float().contiguous() for t in (signs, weight))
    out = flat.new_empty(len(flat), features)
    library.attnplan_sketch(
        ctypes.c_void_p(flat.data_ptr()),
        ctypes.c_int64(len(flat)),
        ctypes.c_int64(flat.stride(0)),
        ctypes.c_int64(flat.shape[1]),
        ctypes.c_float(scale),
        ctypes.c_void_p(buckets.data_ptr()),
        ctypes.c_void_p(signs.data_ptr()),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(features),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out.view(*rows.shape[:-1], features)


class _Sums(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("numerator", "mass", "shift", "head")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "value_dim")),
    )


def merges(numerator: Tensor, output: Tensor, log_mass: Tensor) -> bool:
    """Whether `merge` takes these."""
    return (
        output.device.type == "cpu"
        and numerator.dtype == log_mass.dtype == torch.float32
        and output.dtype in DTYPES
        and output.stride(3) == 1
        and log_mass.is_contiguous()
        and build.load().library is not None
    )


def merge(
    numerator: Tensor,
    mass: Tensor,
    shift: Tensor,
    head: tuple[int, ...],
    output: Tensor,
    log_mass: Tensor,
) -> None:
    """`Part.merge` in one pass, in place.

    Args:
        numerator, mass, shift, head: of the part, float32.
        output: [batch, heads, queries, value_dim], of the heads that `head` names and others.
        log_mass: float32 [batch, heads, queries].
    """
    library = build.load().library
    assert library is not None
    sums = [t.contiguous() for t in (numerator, mass, shift)]
    heads = torch.tensor(head, dtype=torch.int32)
    part = _Sums(*(t.data_ptr() for t in (*sums, heads)), *sums[0].shape)
    library.attnplan_merge(
        ctypes.byref(part),
        ctypes.c_int(DTYPES[output.dtype]),
        ctypes.c_void_p(output.data_ptr()),
        (ctypes.c_int64 * 3)(*output.stride()[:3]),
        ctypes.c_void_p(log_mass.data_ptr()),
        ctypes.c_int64(output.shape[2]),
        ctypes.c_int64(output.shape[1]),
    )
