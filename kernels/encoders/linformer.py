"""Linformer: attention over projected keys and values, for encoders of a fixed length.

    o = softmax(Q (E K)^T) (F V)      E, F: [slots, length]

A projection belongs to positions. `fit_projections` makes E = F for a pretrained encoder: rows
that are non-negative and sum to 1, fitted to the outputs of exact attention on calibration data,
starting from segment means.

Source: Wang et al., Linformer: Self-Attention with Linear Complexity,
https://arxiv.org/abs/2006.04768; there the projections are trained with the model.

Deviations: the fit is ours. Tokens are counted without padding, so padding on either side changes
nothing. A text that is shorter than the projections uses their first columns, as in public code;
slots that these leave empty are left out, where public code keeps them as zero keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.kernels.encoders.encoder_inputs import EncoderInputs, masked_softmax


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_projection: Tensor,
    value_projection: Tensor | None = None,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention, [batch, heads, length, value_dim]; zero where there is padding.

    Float64 stays float64; all else is computed in float32.

    Args:
        query, key: [batch, heads, length, head_dim].
        value: [batch, heads, length, value_dim].
        key_projection: E, [slots, columns] for all heads or [heads, slots, columns], of at least as
            many columns as the longest text has tokens.
        value_projection: F, of the same shape; None for E.
        scale: factor before the softmax, 1 / sqrt(head_dim) when None.
        padding: bool [batch, length], true for padding; None for none.

    Raises:
        ValueError: the sizes or dtypes do not fit.
    """
    inputs = EncoderInputs.of(query, key, value, scale=scale, padding=padding)
    if value_projection is None:
        value_projection = key_projection
    if value_projection.shape != key_projection.shape:
        raise ValueError(
            "the projections of keys and values must have one shape, got "
            f"{list(key_projection.shape)} and {list(value_projection.shape)}"
        )
    heads, tokens = query.shape[1], int(inputs.token.sum(1).max())
    shape = list(key_projection.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != heads):
        raise ValueError(
            f"a projection must be [slots, columns] or [{heads}, slots, columns], got {shape}"
        )
    if shape[-1] < tokens:
        raise ValueError(f"the projections have {shape[-1]} columns, a text has {tokens} tokens")
    return inputs.finish(_attend(inputs, key_projection, value_projection))


def pooled_projection(slots: int, length: int, *, device: torch.device | None = None) -> Tensor:
    """The projection to the means of `slots` segments of nearly equal length, [slots, length].

    Raises:
        ValueError: more slots than positions, or none.
    """
    if not 1 <= slots <= length:
        raise ValueError(f"slots must be between 1 and the length {length}, got {slots}")
    segment = torch.arange(length, device=device) * slots // length
    member = segment == torch.arange(slots, device=device)[:, None]
    return member / member.sum(1, keepdim=True)


def fit_projections(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    slots: int,
    steps: int = 30,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """E = F for one layer, by least squares of its outputs: float [heads, slots, length].

    A softmax over positions makes every row; L-BFGS with a line search runs a fixed number of
    steps, so that the same data give the same projections. On the data it is never worse than
    segment means.

    Args:
        query, key: calibration data [batch, heads, length, head_dim], as the layer sees it.
        value: [batch, heads, length, value_dim].
        slots: rows of the projections, at most `length`.
        steps: L-BFGS steps; 0 gives segment means.
        scale: factor before the softmax, 1 / sqrt(head_dim) when None.
        padding: bool [batch, length], true for padding; None for none.

    Raises:
        ValueError: the sizes, dtypes or knobs do not fit.
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    query, key, value = query.detach(), key.detach(), value.detach()
    inputs = EncoderInputs.of(query, key, value, scale=scale, padding=padding)
    pooled = pooled_projection(slots, inputs.length, device=query.device).to(inputs.query.dtype)
    pooled = pooled.repeat(query.shape[1], 1, 1)
    if steps == 0:
        return pooled
    weight = masked_softmax(
        inputs.query @ inputs.key.mT * inputs.scale, inputs.token[:, None, None]
    )
    exact = inputs.finish(weight @ inputs.value)

    def losses(projection: Tensor) -> Tensor:
        """Squared error of each head over that of nothing."""
        output = _attend(inputs, projection, projection)
        error = (output - exact).masked_fill(~inputs.token[:, None, :, None], 0)
        return error.square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3)).clamp(min=1e-30)

    with torch.enable_grad():
        logits = (pooled + _REST / inputs.length).log().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = losses(logits.softmax(-1)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        fitted = logits.softmax(-1)
        better = losses(fitted) < losses(pooled)
        return torch.where(better[:, None, None], fitted, pooled)


_REST = 0.1
"""What the start gives to all positions beside a slot's own: a zero could not grow."""


def _attend(inputs: EncoderInputs, key_projection: Tensor, value_projection: Tensor) -> Tensor:
    """Attention over slots, [batch, heads, length, value_dim]."""
    of_key, of_value = _columns(inputs, key_projection), _columns(inputs, value_projection)
    scores = inputs.query @ (of_key @ inputs.key).mT * inputs.scale
    there = ((of_key != 0) | (of_value != 0)).any(-1)[..., None, :]
    return masked_softmax(scores, there) @ (of_value @ inputs.value)


def _columns(inputs: EncoderInputs, projection: Tensor) -> Tensor:
    """The column of every token, zero for padding: [batch, heads or 1, slots, length]."""
    columns = projection.to(inputs.query.dtype)[..., inputs.token_ranks]
    columns = columns.movedim(-2, 0)  # [batch, heads or none, slots, length]
    if projection.ndim == 2:
        columns = columns[:, None]
    return columns.masked_fill(~inputs.token[:, None, None], 0)
