"""Single keys per query: the top scores of every row.

On the CPU with a C++ compiler `native/token_selection.cpp` does the work; elsewhere torch does,
in chunks of rows, so that no tensor of queries x keys appears.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from attnplan.kernels.native import build

TORCH_SCORES = 1 << 24  # scores that the torch path holds at a time


def top_tokens(
    query: Tensor,
    key: Tensor,
    *,
    kv_head: tuple[int, ...],
    low: Tensor,
    high: Tensor,
    top: int | Sequence[int],
    rank: Sequence[int] | None = None,
) -> Tensor:
    """The keys with the largest query.key of every query row.

    Args:
        query: [batch, heads, queries, rank], floating point; scores are float32.
        key: [batch, kv_heads, keys, rank].
        kv_head: for each head of `query`, the kv head it reads.
        low, high: integers [batch, queries] or [batch, heads, queries]; a row chooses among keys
            [low, high), maybe none.
        top: keys per row, for all heads or for each.
        rank: leading dimensions that each head scores with; by default all.

    Returns:
        int32 [batch, heads, queries, most], key positions, ascending, then -1 where there were
        fewer candidates or the head takes fewer than the `most` of any. Of equal scores the
        smaller position is taken.

    Raises:
        ValueError: shapes do not fit together.
    """
    batch, heads, queries, dims = query.shape
    tops = (top,) * heads if isinstance(top, int) else tuple(top)
    ranks = (dims,) * heads if rank is None else tuple(rank)
    low, high = (_per_head(bound, batch, heads, queries) for bound in (low, high))
    _check(query, key, kv_head, tops, ranks)
    library = build.load().library if query.device.type == "cpu" else None
    if library is None:
        return _top_tokens_torch(query, key, kv_head, low, high, tops, ranks)
    most = max(tops)
    query, key = query.detach().float().contiguous(), key.detach().float().contiguous()
    bounds = (bound.to(torch.int32).contiguous() for bound in (low, high))
    per_head = (torch.tensor(each, dtype=torch.int32) for each in (kv_head, ranks, tops))
    out = torch.empty(batch, heads, queries, most, dtype=torch.int32)
    sizes = (batch, heads, key.shape[1], queries, key.shape[2], dims, most)
    tensors = (query, key, *per_head, *bounds, out)
    call = _TopCall(*sizes, torch.get_num_threads(), *(t.data_ptr() for t in tensors))
    library.attnplan_top_tokens(ctypes.byref(call))
    return out


def top_tokens_torch(
    query: Tensor,
    key: Tensor,
    *,
    kv_head: tuple[int, ...],
    low: Tensor,
    high: Tensor,
    top: int | Sequence[int],
    rank: Sequence[int] | None = None,
) -> Tensor:
    """`top_tokens` in torch alone: other devices, and machines without a C++ compiler."""
    batch, heads, queries, dims = query.shape
    tops = (top,) * heads if isinstance(top, int) else tuple(top)
    ranks = (dims,) * heads if rank is None else tuple(rank)
    low, high = (_per_head(bound, batch, heads, queries) for bound in (low, high))
    _check(query, key, kv_head, tops, ranks)
    return _top_tokens_torch(query, key, kv_head, low, high, tops, ranks)


def _top_tokens_torch(
    query: Tensor,
    key: Tensor,
    kv_head: tuple[int, ...],
    low: Tensor,
    high: Tensor,
    tops: tuple[int, ...],
    ranks: tuple[int, ...],
) -> Tensor:
    batch, heads, queries, dims = query.shape
    keys, device, most = key.shape[2], query.device, max(tops)
    out = torch.full((batch, heads, queries, most), -1, dtype=torch.int32, device=device)
    position = torch.arange(keys, device=device)
    used = torch.arange(dims, device=device) < torch.tensor(ranks, device=device)[:, None]
    query = query.float() * used[:, None]
    by_key = key[:, list(kv_head)].float().mT
    room_for = torch.tensor(tops, device=device)[:, None, None]
    rows = max(1, TORCH_SCORES // max(1, batch * heads * keys))
    for first in range(0, queries if keys else 0, rows):
        part = slice(first, first + rows)
        allowed = (position >= low[:, :, part, None]) & (position < high[:, :, part, None])
        score = (query[:, :, part] @ by_key).masked_fill_(~allowed, float("-inf"))
        best = score.topk(min(most, keys), dim=-1).values
        place = (room_for - 1).clamp(max=best.shape[-1] - 1).expand(*best.shape[:3], 1)
        last = best.gather(-1, place)
        tied = (score == last) & allowed
        room = room_for - (score > last).sum(-1, keepdim=True)
        taken = (score > last) | (tied & (tied.cumsum(-1) <= room))
        chosen = torch.where(taken, position, keys).topk(min(most, keys), dim=-1, largest=False)
        kept = chosen.values.sort(dim=-1).values
        out[:, :, part, : kept.shape[-1]] = torch.where(kept < keys, kept, -1).to(torch.int32)
    return out


def best(scores: Tensor, candidate: Tensor, top: int) -> Tensor:
    """The `top` best candidates of every row as a mask, fewer where there are fewer.

    Of equal scores the first is taken.

    Args:
        scores: [..., n].
        candidate: bool, broadcastable to `scores`.
        top: how many.
    """
    scores = scores.masked_fill(~candidate, float("-inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :top]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True) & candidate


def distinct(tokens: Tensor) -> Tensor:
    """Keys [..., top] in ascending order, -1 in the place of all but the first of equal ones."""
    tokens = tokens.sort(-1).values
    twice = torch.zeros_like(tokens, dtype=torch.bool)
    twice[..., 1:] = tokens[..., 1:] == tokens[..., :-1]
    return torch.where(twice, -1, tokens)


def _per_head(bound: Tensor, batch: int, heads: int, queries: int) -> Tensor:
    """A bound as [batch, heads, queries]."""
    if bound.shape == (batch, queries):
        bound = bound[:, None].expand(batch, heads, queries)
    if bound.shape != (batch, heads, queries):
        raise ValueError(
            f"low and high are {[batch, queries]} or {[batch, heads, queries]}, got "
            f"{list(bound.shape)}"
        )
    return bound


def _check(
    query: Tensor,
    key: Tensor,
    kv_head: tuple[int, ...],
    tops: tuple[int, ...],
    ranks: tuple[int, ...],
) -> None:
    batch, heads, _, dims = query.shape
    if key.shape[0] != batch or key.shape[3] != dims:
        raise ValueError(f"query is {list(query.shape)}, key is {list(key.shape)}")
    if len(kv_head) != heads or not all(0 <= h < key.shape[1] for h in kv_head):
        raise ValueError(f"kv_head {kv_head} does not name one of {key.shape[1]} kv heads per head")
    if len(tops) != heads:
        raise ValueError(f"top must be one number, or one for each of {heads} heads, got {tops}")
    if min(tops) < 1:
        raise ValueError(f"top must be at least 1 key, got {min(tops)}")
    if len(ranks) != heads or not all(1 <= r <= dims for r in ranks):
        raise ValueError(f"ranks must be 1 to {dims}, for each of {heads} heads, got {ranks}")


class _TopCall(ctypes.Structure):
    """`TopCall` of token_selection.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "queries", "keys", "rank", "top", "threads")
        ),
        *((name, ctypes.c_void_p) for name in ("query", "key", "kv_head")),
        *((name, ctypes.c_void_p) for name in ("ranks", "tops", "low", "high", "out")),
    )
