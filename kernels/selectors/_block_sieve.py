"""Single keys per query behind a sieve of blocks: bounds choose blocks, scores choose keys.

On the CPU with a C++ compiler `native/token_selection.cpp` does the work; elsewhere torch does,
in chunks of rows, so that no tensor of queries x keys appears.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from attnplan.kernels.native import build

SIEVE = 16
"""Keys per block of the sieve, counted from the first real token."""
TORCH_FLOATS = 1 << 24  # numbers that the torch path gathers at a time


def sieved_tokens(
    query: Tensor,
    key: Tensor,
    *,
    kv_head: tuple[int, ...],
    start: Sequence[int],
    sinks: int,
    high: Tensor,
    blocks: int,
    top: int,
) -> Tensor:
    """The keys with the largest query.key among those of the blocks with the largest bounds.

    Args:
        query: [batch, heads, queries, rank], floating point; scores are float32.
        key: [batch, kv_heads, keys, rank].
        kv_head: for each head of `query`, the kv head it reads.
        start: for each batch row, the first key that is no left padding.
        sinks: first keys after `start` that are not chosen among.
        high: integers [queries]; a row chooses among keys [start + sinks, high), maybe none.
        blocks: blocks that a row scores the keys of.
        top: keys per row.

    Returns:
        int32 [batch, heads, queries, top], key positions, ascending, then -1 where there were
        fewer candidates. Of equal bounds or scores the smaller position is taken.
    """
    library = build.load().library if query.device.type == "cpu" else None
    if library is None:
        return sieved_tokens_torch(
            query,
            key,
            kv_head=kv_head,
            start=start,
            sinks=sinks,
            high=high,
            blocks=blocks,
            top=top,
        )
    batch, heads, queries, rank = query.shape
    query, key = query.detach().float().contiguous(), key.detach().float().contiguous()
    lists = [torch.tensor(tuple(each), dtype=torch.int32) for each in (kv_head, start)]
    lists.append(high.to(torch.int32).contiguous())
    out = torch.empty(batch, heads, queries, top, dtype=torch.int32)
    sizes = (batch, heads, key.shape[1], queries, key.shape[2], rank, blocks, top, sinks)
    tensors = (query, key, *lists, out)
    call = _SieveCall(*sizes, torch.get_num_threads(), *(t.data_ptr() for t in tensors))
    library.attnplan_sieved_tokens(ctypes.byref(call))
    return out


def sieved_tokens_torch(
    query: Tensor,
    key: Tensor,
    *,
    kv_head: tuple[int, ...],
    start: Sequence[int],
    sinks: int,
    high: Tensor,
    blocks: int,
    top: int,
) -> Tensor:
    """`sieved_tokens` in torch alone: other devices, and machines without a C++ compiler."""
    batch, heads, queries, rank = query.shape
    keys, device = key.shape[2], query.device
    out = torch.full((batch, heads, queries, top), -1, dtype=torch.int32, device=device)
    for row, first in enumerate(start):
        count = -(-(keys - first) // SIEVE)
        length = count * SIEVE
        inside = key[row, :, first:].float()
        pad = (0, 0, 0, length - inside.shape[1])
        runs = torch.nn.functional.pad(inside, pad).unflatten(1, (count, SIEVE))
        real = torch.arange(length, device=device).view(count, SIEVE) < keys - first
        infinite = torch.tensor(float("inf"), device=device)
        most = torch.where(real[..., None], runs, -infinite).amax(2)[list(kv_head)]
        least = torch.where(real[..., None], runs, infinite).amin(2)[list(kv_head)]
        by_head = torch.tensor(kv_head, device=device)[:, None, None]
        position = torch.arange(length, device=device).view(count, SIEVE)
        step = max(1, TORCH_FLOATS // (heads * max(blocks * SIEVE * rank, count)))
        for begin in range(0, queries, step):
            some = query[row, :, begin : begin + step].float()
            end = (high[begin : begin + step].to(device) - first)[:, None]
            bound = some.clamp(min=0) @ most.mT + some.clamp(max=0) @ least.mT
            holds = (position[:, 0] < end) & (position[:, -1] >= sinks)
            bound = bound.masked_fill(~holds, float("-inf"))
            best = torch.sort(bound, dim=-1, descending=True, stable=True)
            chosen = best.indices[..., :blocks]
            chosen = chosen.masked_fill(best.values[..., :blocks] == float("-inf"), count)
            chosen = chosen.sort(-1).values  # ascending; `count` for none
            within = chosen.clamp(max=count - 1)
            scores = torch.einsum("hqr,hqbsr->hqbs", some, runs[by_head, within])
            where = position[within]
            allowed = (where >= sinks) & (where < end[..., None]) & (chosen < count)[..., None]
            scores = scores.masked_fill(~allowed, float("-inf")).flatten(2)
            best = torch.sort(scores, dim=-1, descending=True, stable=True)
            picked = where.flatten(2).gather(-1, best.indices[..., :top]) + first
            picked = picked.masked_fill(best.values[..., :top] == float("-inf"), keys)
            picked = picked.sort(-1).values
            picked = torch.where(picked < keys, picked, -1)
            out[row, :, begin : begin + step, : picked.shape[-1]] = picked.to(torch.int32)
    return out


class _SieveCall(ctypes.Structure):
    """`SieveCall` of token_selection.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "heads", "kv_heads", "queries", "keys", "rank"),
                *("blocks", "top", "sinks", "threads"),
            )
        ),
        *((name, ctypes.c_void_p) for name in ("query", "key", "kv_head", "start", "high", "out")),
    )
