"""Exact causal attention two ways, neither of which holds a tokens x tokens matrix.

`attend` multiplies the attention matrix A with any values; `log_rows` hands out its rows.
Tensors are of one text, without a batch dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnplan.kernels.operands.tile_list import BLOCK

CHUNK = 1 << 20
"""Numbers in a chunk of rows, at least 64 rows of one head."""
MASKED = -1e4
"""Logarithm of a probability that is not there: its exponential is exactly zero."""


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Exact causal attention with any values.

    On a CPU it is torch's flash attention, in slices of head_dim value columns; elsewhere, rows of
    A in chunks.

    Args:
        query: [heads, tokens, head_dim].
        key: [kv_heads, tokens, head_dim].
        value: [kv_heads, tokens, any].
        scale: factor before the softmax.

    Returns:
        Output [heads, tokens, any], and natural log-mass [heads, tokens].
    """
    if query.device.type != "cpu":
        return _attend_in_chunks(query, key, value, scale=scale)
    head_dim, columns = query.shape[2], value.shape[2]
    # the kernel assumes that a vector's numbers lie side by side, and does not check
    query, key = query.contiguous(), key.contiguous()
    padded = torch.nn.functional.pad(value, (0, -columns % head_dim))
    outputs = []
    mass = query.new_empty(0)
    for first in range(0, max(columns, 1), head_dim):
        part, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None],
            key[None],
            padded[None, :, :, first : first + head_dim].contiguous(),
            0.0,
            True,
            attn_mask=None,
            scale=scale,
        )
        outputs.append(part[0])
    return torch.cat(outputs, dim=2)[:, :, :columns], mass[0]


def _attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend` on devices whose flash kernels return no log-mass in float32."""
    heads, tokens, _ = query.shape
    group = heads // key.shape[0]
    output = query.new_empty(heads, tokens, value.shape[2])
    mass = query.new_empty(heads, tokens)
    position = torch.arange(tokens, device=query.device)
    rows = max(1, CHUNK // max(tokens, 1))
    for head in range(heads):
        for first in range(0, tokens, rows):
            last = min(first + rows, tokens)
            score = query[head, first:last] @ key[head // group, :last].T * scale
            score.masked_fill_(position[:last] > position[first:last, None], float("-inf"))
            mass[head, first:last] = score.logsumexp(-1)
            output[head, first:last] = score.softmax(-1) @ value[head // group, :last]
    return output, mass


def log_rows(
    query: Tensor, key: Tensor, log_mass: Tensor, scale: float
) -> Iterator[tuple[int, Tensor]]:
    """(first, log A of some whole query blocks), [heads, 64 n, first + 64 n], `MASKED` where none.

    Rows past the text read nothing. The tensor is overwritten by the next one.

    Args:
        query: [heads, tokens, head_dim], of heads that share `key` [tokens, head_dim].
        log_mass: [heads, tokens].
    """
    heads, tokens, _ = query.shape
    missing = -tokens % BLOCK
    # one more column subtracts the log-mass inside the product
    query = torch.cat([query * scale, -log_mass[:, :, None]], dim=2)
    query = torch.nn.functional.pad(query, (0, 0, 0, missing))
    query[:, tokens:, -1] = MASKED
    key = torch.nn.functional.pad(key, (0, 0, 0, missing))
    key = torch.nn.functional.pad(key, (0, 1), value=1.0)
    count = max(BLOCK, CHUNK // (heads * (tokens + missing)) // BLOCK * BLOCK)
    count = min(count, 4 * BLOCK)  # keys past the diagonal of a chunk are wasted work
    later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
    buffer = query.new_empty(heads * count * (tokens + missing))
    for first in range(0, tokens, count):
        last = min(first + count, tokens + missing)
        size = last - first
        flat = buffer[: heads * size * last].view(heads * size, last)
        torch.mm(query[:, first:last].reshape(heads * size, -1), key[:last].T, out=flat)
        log_p = flat.view(heads, size, last)
        log_p[:, :, first:].masked_fill_(later[:size, :size], MASKED)
        yield first, log_p
