"""Single keys per query: the top scores of every row, and the gather tiles that read them.

On the CPU with a C++ compiler `engines/token_selection.cpp` does the work; elsewhere torch does,
in chunks of rows, so that no tensor of queries x keys appears.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attnplan.kernels import tile_list
from attnplan.kernels.engines import build
from attnplan.kernels.tile_list import BLOCK, GATHER, TileList

TORCH_SCORES = 1 << 24  # scores that the torch path holds at a time


def top_tokens(
    query: Tensor, key: Tensor, *, kv_head: tuple[int, ...], low: Tensor, high: Tensor, top: int
) -> Tensor:
    """The keys with the largest query.key of every query row.

    Args:
        query: [batch, heads, queries, rank], floating point; scores are float32.
        key: [batch, kv_heads, keys, rank].
        kv_head: for each head of `query`, the kv head it reads.
        low, high: integers [batch, queries]; a row chooses among keys [low, high), maybe none.
        top: keys per row.

    Returns:
        int32 [batch, heads, queries, top], key positions, ascending, then -1 where there were
        fewer candidates than `top`. Of equal scores the smaller position is taken.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(query, key, kv_head, low, high, top)
    library = build.load().library if query.device.type == "cpu" else None
    if library is None:
        return top_tokens_torch(query, key, kv_head=kv_head, low=low, high=high, top=top)
    batch, heads, queries, rank = query.shape
    query, key = query.detach().float().contiguous(), key.detach().float().contiguous()
    low, high = low.to(torch.int32).contiguous(), high.to(torch.int32).contiguous()
    heads_read = torch.tensor(kv_head, dtype=torch.int32)
    out = torch.empty(batch, heads, queries, top, dtype=torch.int32)
    sizes = (batch, heads, key.shape[1], queries, key.shape[2], rank, top, torch.get_num_threads())
    tensors = (query, key, heads_read, low, high, out)
    library.attnplan_top_tokens(ctypes.byref(_TopCall(*sizes, *(t.data_ptr() for t in tensors))))
    return out


def top_tokens_torch(
    query: Tensor, key: Tensor, *, kv_head: tuple[int, ...], low: Tensor, high: Tensor, top: int
) -> Tensor:
    """`top_tokens` in torch alone: other devices, and machines without a C++ compiler."""
    batch, heads, queries, _ = query.shape
    keys, device = key.shape[2], query.device
    out = torch.full((batch, heads, queries, top), -1, dtype=torch.int32, device=device)
    position = torch.arange(keys, device=device)
    by_key = key[:, list(kv_head)].float().mT
    rows = max(1, TORCH_SCORES // max(1, batch * heads * keys))
    for first in range(0, queries if keys and top else 0, rows):
        part = slice(first, first + rows)
        allowed = (position >= low[:, part, None]) & (position < high[:, part, None])
        score = (query[:, :, part].float() @ by_key).masked_fill_(~allowed[:, None], float("-inf"))
        last = score.topk(min(top, keys), dim=-1).values[..., -1:]
        tied = (score == last) & allowed[:, None]
        room = top - (score > last).sum(-1, keepdim=True)
        taken = (score > last) | (tied & (tied.cumsum(-1) <= room))
        best = torch.where(taken, position, keys).topk(min(top, keys), dim=-1, largest=False)
        chosen = best.values.sort(dim=-1).values
        out[:, :, part, : chosen.shape[-1]] = torch.where(chosen < keys, chosen, -1).to(torch.int32)
    return out


def pack_tokens(tokens: Tensor, keys: int) -> TileList:
    """Gather tiles from the single keys that each query chose: `tile_list.from_tokens`, fast.

    Args:
        tokens: int32 [batch, heads, queries, top], key positions, -1 for none, distinct per query.
        keys: length of the text.

    Raises:
        ValueError: a token is outside the text.
    """
    library = build.load().library if tokens.device.type == "cpu" else None
    if library is None or tokens.numel() == 0:
        return tile_list.from_tokens(tokens, keys)
    batch, heads, queries, top = tokens.shape
    blocks = -(-queries // BLOCK)
    tokens = tokens.to(torch.int32).contiguous()
    offsets = torch.empty(batch * heads * blocks + 1, dtype=torch.int32)
    sizes = (batch * heads, queries, top, keys, torch.get_num_threads())
    arguments = (_pointer(tokens), *map(ctypes.c_int64, sizes), _pointer(offsets))
    if library.attnplan_count_tiles(*arguments):
        raise ValueError(f"a token is outside the text: {int(tokens.max())} of {keys} keys")
    total = int(offsets[-1])
    gather = torch.empty(total, BLOCK, dtype=torch.int32)
    masks = torch.empty(total, BLOCK, dtype=torch.int64)
    library.attnplan_fill_tiles(*arguments, _pointer(gather), _pointer(masks))
    index = torch.arange(total, dtype=torch.int32)
    tiles = torch.stack([torch.full_like(index, GATHER), index, index], dim=1)
    return TileList(batch, heads, blocks, offsets, tiles, gather, masks)


def _check(
    query: Tensor, key: Tensor, kv_head: tuple[int, ...], low: Tensor, high: Tensor, top: int
) -> None:
    batch, heads, queries, rank = query.shape
    if key.shape[0] != batch or key.shape[3] != rank:
        raise ValueError(f"query is {list(query.shape)}, key is {list(key.shape)}")
    if len(kv_head) != heads or not all(0 <= h < key.shape[1] for h in kv_head):
        raise ValueError(f"kv_head {kv_head} does not name one of {key.shape[1]} kv heads per head")
    for name, bound in (("low", low), ("high", high)):
        if bound.shape != (batch, queries):
            raise ValueError(f"{name} is {list(bound.shape)}, want {[batch, queries]}")
    if top < 1:
        raise ValueError(f"top must be at least 1 key, got {top}")


class _TopCall(ctypes.Structure):
    """`TopCall` of token_selection.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "queries", "keys", "rank", "top", "threads")
        ),
        *((name, ctypes.c_void_p) for name in ("query", "key", "kv_head", "low", "high", "out")),
    )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
