"""Skyformer: attention with a Gaussian kernel, and its Nyström approximation, for encoders.

    o_i = sum over j of g(q_i, k_j) v_j      g(x, y) = e^{-|x - y|^2 / 2}      x, y scaled by sqrt(scale)

Rows are not normalised: this is another function than softmax attention, meant to be trained with.
The approximation goes through landmarks X, half of them queries and half of them keys:

    g(Q, K)  ~  g(Q, X) (g(X, X) + ridge I)^-1 g(X, K)

with the matrix scaled to D^-1/2 (...) D^-1/2, D its row sums, and inverted by a few Newton-Schulz
steps. With `softmax`, every key weighs e^{|k|^2 / 2} and rows are normalised, which is softmax
attention again, since e^{q.k} = e^{|q|^2 / 2} g(q, k) e^{|k|^2 / 2}: what a pretrained encoder needs. Queries
and keys are then centred first, which leaves softmax alone and brings them closer to each other.

Source: Chen et al., Skyformer: Remodel Self-Attention with Gaussian Kernel and Nyström Method,
https://arxiv.org/abs/2111.00035; the ridge is that of the authors' code.

Deviations: landmarks are drawn one per run of tokens, so none is drawn twice, and the draw is fixed
by a seed. `softmax` is ours; its output is held inside the range of the values, because the
approximate mass of a query may come out too small.
"""  # noqa: E501

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.kernels.encoders.encoder_inputs import EncoderInputs
from attnplan.kernels.encoders.newton_schulz import newton_schulz
from attnplan.kernels.numerics.gaussian import gaussian


def kernelized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The exact Gaussian attention, with its [length, length] matrix: what is approximated.

    Arguments, result and errors are those of `skyformer_attention`.
    """
    inputs = EncoderInputs.of(query, key, value, scale=scale, padding=padding)
    root = inputs.scale**0.5
    weight = gaussian(inputs.query * root, inputs.key * root)
    return inputs.finish(weight @ inputs.value)  # values of padding are zero


def skyformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: int,
    ridge: float = 0.1,
    steps: int = 6,
    seed: int = 0,
    softmax: bool = False,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention, [batch, heads, length, value_dim]; zero where there is padding.

    Float64 stays float64; all else is computed in float32.

    Args:
        query, key: [batch, heads, length, head_dim].
        value: [batch, heads, length, value_dim].
        landmarks: an even number, half of them queries and half of them keys; no more than there
            are tokens are drawn of each.
        ridge: added to the diagonal of the landmark matrix, whose own diagonal is 1.
        steps: Newton-Schulz steps.
        seed: of the landmarks.
        softmax: normalised softmax attention instead of the published function.
        scale: factor before the softmax, 1 / sqrt(head_dim) when None.
        padding: bool [batch, length], true for padding; None for none.

    Raises:
        ValueError: the sizes, dtypes or knobs do not fit.
    """
    if landmarks < 2 or landmarks % 2:
        raise ValueError(f"landmarks must be an even number from 2 up, got {landmarks}")
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    inputs = EncoderInputs.of(query, key, value, scale=scale, padding=padding)
    query, key = inputs.query * inputs.scale**0.5, inputs.key * inputs.scale**0.5
    size = key.new_zeros(())
    if softmax:
        query_mean = inputs.mean(query)
        query, key = query - query_mean, key - inputs.mean(key)
        size = key.square().sum(-1) / 2 + (key @ query_mean.mT)[..., 0]  # [batch, heads, length]
    segments = inputs.segments(landmarks // 2)
    count = segments.first.shape[1]
    draw = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)).to(query.device)
    landmark = torch.cat([segments.sample(query, draw[0]), segments.sample(key, draw[1])], 2)
    filled = segments.filled.repeat(1, 2)[:, None].to(query.dtype)  # [batch, 1, landmarks]

    within = gaussian(landmark, landmark) * filled[..., None, :] * filled[..., None]
    within = within + ridge * torch.eye(2 * count, dtype=query.dtype, device=query.device)
    root = torch.where(filled > 0, within.sum(-1), 1).rsqrt()  # [batch, heads, landmarks]
    within = within * root[..., None, :] * root[..., None]
    inverse = newton_schulz(within, within.sum(-2).amax(-1)[..., None, None], steps)
    reads = gaussian(query, landmark) * (root * filled)[..., None, :]
    gathers = gaussian(landmark, key) * (root * filled)[..., None]

    if not softmax:
        return inputs.finish(reads @ (inverse @ (gathers @ inputs.value)))
    size = size.masked_fill(~inputs.token[:, None], -torch.inf)
    top = size.amax(-1, keepdim=True)
    gathers = gathers * (size - torch.where(top.isfinite(), top, 0)).exp()[..., None, :]
    mass = reads @ (inverse @ gathers.sum(-1, keepdim=True))
    output = reads @ (inverse @ (gathers @ inputs.value))
    output = output / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return inputs.finish(_inside(output, inputs.value, inputs.token))


def _inside(output: Tensor, value: Tensor, token: Tensor) -> Tensor:
    """Every component held between the least and the greatest of the values of the tokens."""
    padding = ~token[:, None, :, None]
    least = value.masked_fill(padding, torch.inf).amin(2, keepdim=True)
    greatest = value.masked_fill(padding, -torch.inf).amax(2, keepdim=True)
    return output.clamp(least, greatest)
