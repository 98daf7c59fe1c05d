"""The oracle of decoding: attention over stored rows by dense masks, in the inputs' precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnplan.kernels.operands.kv_rows import StoredRows, check


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over everything that a layer stores.

    The tokens of `query` are the last `queries` rows of every list: query r sees the rows before
    it, its own, and none after.

    Args:
        query: [batch, heads, queries, head_dim], heads of one group side by side.
        stored: every kv head of the layer once.
        scale: factor before the softmax.

    Returns:
        Output [batch, heads, queries, value_dim] in the dtype of `query`, and log-mass
        [batch, heads, queries] (natural logarithm). A query that sees nothing is zero, with
        log-mass -inf.

    Raises:
        ValueError: heads, dtypes or lengths do not fit together.
    """
    group = check(query, stored)
    batch, heads, queries, _ = query.shape
    value_dim = stored[0].value.shape[3]
    output = query.new_zeros(batch, heads, queries, value_dim)
    log_mass = query.new_zeros(batch, heads, queries)
    for rows in (some.gathered() for some in stored):
        of = [h * group + g for h in rows.kv_heads for g in range(group)]
        key, value = (
            t[:, :, : rows.length].repeat_interleave(group, 1) for t in (rows.key, rows.value)
        )
        logits = query[:, of] @ key.mT * scale
        if rows.bias is not None:
            bias = rows.bias[:, :, : rows.length].repeat_interleave(group, 1)
            logits = logits + bias[:, :, None].to(logits.dtype)
        row = torch.arange(rows.length, device=query.device)
        newest = rows.length - queries + torch.arange(queries, device=query.device)
        logits = logits.masked_fill(row > newest[:, None], float("-inf"))
        shift = logits.amax(-1, keepdim=True)
        shift = torch.where(shift.isfinite(), shift, torch.zeros_like(shift))
        weight = (logits - shift).exp()
        mass = weight.sum(-1)
        value = torch.where(weight.amax(2)[..., None] > 0, value, 0)  # padding may hold anything
        output[:, of] = weight @ value / torch.where(mass == 0, 1, mass)[..., None]
        log_mass[:, of] = mass.log() + shift[..., 0]
    return output, log_mass
