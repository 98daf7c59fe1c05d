"""Attention over stored rows on a CPU, at a cost proportional to the rows.

With a C++ compiler the work is done by `decode.cpp`; without one, by torch, for the same result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from attnplan.kernels.engines import build
from attnplan.kernels.stored import StoredRows, check

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RUN = 256
"""Fewest rows of a head that are worth a work item of their own; items have whole multiples."""


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over everything that a layer stores.

    Arithmetic is float32, whatever the dtype of the inputs; see `decode_reference.decode`.

    Args:
        query: [batch, heads, queries, head_dim], float32, bfloat16 or float16.
        stored: every kv head of the layer once.
        scale: factor before the softmax.

    Returns:
        Output [batch, heads, queries, value_dim] in the dtype of `query`, laid out as
        [batch, queries, heads, value_dim], and float32 log-mass [batch, heads, queries].

    Raises:
        ValueError: heads, dtypes or lengths do not fit together.
    """
    group = check(query, stored)
    if query.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"query is {query.dtype}; the cpu engine takes {known}")
    library = build.load().library
    if library is None:
        return decode_torch(query, stored, scale=scale)
    return _decode_compiled(library, query, stored, scale, group)


class _Strided(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
    )


class _Head(ctypes.Structure):
    """`Head` of decode.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "bias", "pages")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("key_batch", "key_row", "value_batch", "value_row", "bias_batch", "pages_batch"),
                *("rows", "index"),
            )
        ),
    )


class _Call(ctypes.Structure):
    """`DecodeCall` of decode.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("dtype", "batch", "kv_heads", "group", "queries", "head_dim", "value_dim"),
                *("threads", "run"),
            )
        ),
        ("scale", ctypes.c_double),
        ("query", _Strided),
        ("output", _Strided),
        ("lse", ctypes.c_void_p),
        ("heads", ctypes.c_void_p),
    )


def _decode_compiled(
    library: ctypes.CDLL,
    query: Tensor,
    stored: Sequence[StoredRows],
    scale: float,
    group: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = query.shape
    value_dim = stored[0].value.shape[3]
    query = query.detach()
    query = query if query.stride(3) == 1 else query.contiguous()
    output = query.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, queries)
    held = []  # copies must outlive the call
    rows_of: list[_Head] = []
    for rows in stored:
        key, value = (
            t if t.stride(3) == 1 else t.contiguous() for t in (rows.key.detach(), rows.value)
        )
        bias = rows.bias
        if bias is not None and bias.stride(2) != 1:
            bias = bias.contiguous()
        pages = None if rows.pages is None else rows.pages.contiguous()
        held += [key, value, bias, pages]
        size = key.element_size()
        for place, index in enumerate(rows.kv_heads):
            rows_of.append(
                _Head(
                    key.data_ptr() + place * key.stride(1) * size,
                    value.data_ptr() + place * value.stride(1) * size,
                    None if bias is None else bias.data_ptr() + place * bias.stride(1) * 4,
                    None if pages is None else pages.data_ptr() + place * pages.stride(1) * 4,
                    *(key.stride(0), key.stride(2), value.stride(0), value.stride(2)),
                    0 if bias is None else bias.stride(0),
                    0 if pages is None else pages.stride(0),
                    *(rows.length, index),
                )
            )
    threads = torch.get_num_threads()
    total = batch * sum(head.rows for head in rows_of)
    table = (_Head * len(rows_of))(*rows_of)
    call = _Call(
        *(DTYPES[query.dtype], batch, len(rows_of), group, queries, head_dim, value_dim),
        *(threads, max(RUN, -(-total // (4 * threads * RUN)) * RUN)),
        scale,
        _Strided(query.data_ptr(), *query.stride()[:3]),
        _Strided(output.data_ptr(), *output.stride()[:3]),
        lse.data_ptr(),
        ctypes.addressof(table),
    )
    if library.attnplan_decode(ctypes.byref(call)):
        raise MemoryError("out of memory")
    return output, lse


def decode_torch(
    query: Tensor, stored: Sequence[StoredRows], *, scale: float
) -> tuple[Tensor, Tensor]:
    """`decode` in torch alone, for machines without a C++ compiler."""
    group = check(query, stored)
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, stored[0].value.shape[3]).transpose(1, 2)
    device = query.device
    lse = torch.empty(batch, heads, queries, device=device)
    for rows in (some.gathered() for some in stored):
        of = [h * group + g for h in rows.kv_heads for g in range(group)]
        packed = query[:, of].float().unflatten(1, (-1, group)).flatten(2, 3) * scale
        key, value = (t[:, :, : rows.length].float() for t in (rows.key, rows.value))
        logits = (packed @ key.mT).unflatten(2, (group, queries))
        if rows.bias is not None:
            logits += rows.bias[:, :, None, None, : rows.length]
            value = torch.where(rows.bias[:, :, : rows.length, None].isneginf(), 0, value)
        row = torch.arange(rows.length, device=device)
        newest = rows.length - queries + torch.arange(queries, device=device)
        logits.masked_fill_(row > newest[:, None], float("-inf"))
        shift = logits.amax(-1, keepdim=True)
        shift = torch.where(shift == float("-inf"), 0, shift)
        weight = (logits - shift).exp_()
        mass = weight.sum(-1)
        found = weight.flatten(2, 3) @ value / torch.where(mass == 0, 1, mass).flatten(2)[..., None]
        output[:, of] = found.unflatten(2, (group, queries)).flatten(1, 2).to(output.dtype)
        lse[:, of] = (mass.log() + shift[..., 0]).flatten(1, 2)
    return output, lse
