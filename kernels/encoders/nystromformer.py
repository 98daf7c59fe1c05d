"""Nyströmformer: attention through segment means, for encoders.

    softmax(Q K^T) V  ~  F Z (B V)      F = softmax(Q K~^T)   A = softmax(Q~ K~^T)   B = softmax(Q~ K^T)

Q~ and K~ are the means of runs of queries and keys; Z is the pseudo-inverse of A by a few
Newton-Schulz steps. Rows of F Z B sum only roughly to 1, and a few weights are negative.

Source: Xiong et al., Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention,
https://arxiv.org/abs/2102.03902.

Deviations: no convolution of the values, which is trained. Runs hold tokens only and differ in length
by at most one, where the paper pads with zeros. Z starts from the norms of each batch row and head;
public code takes the largest of the whole batch.
"""  # noqa: E501

from __future__ import annotations

from torch import Tensor

from attnplan.kernels.encoders.encoder_inputs import EncoderInputs, masked_softmax
from attnplan.kernels.encoders.newton_schulz import newton_schulz


def nystromformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: int,
    steps: int = 6,
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention, [batch, heads, length, value_dim]; zero where there is padding.

    Float64 stays float64; all else is computed in float32.

    Args:
        query, key: [batch, heads, length, head_dim].
        value: [batch, heads, length, value_dim].
        landmarks: runs of tokens; no more than there are tokens are made.
        steps: Newton-Schulz steps. 2 to 8: fewer smooth more (see attnplan.kernels.encoders.newton_schulz).
        scale: factor before the softmax, 1 / sqrt(head_dim) when None.
        padding: bool [batch, length], true for padding; None for none.

    Raises:
        ValueError: the sizes, dtypes or knobs do not fit.
    """  # noqa: E501
    inputs = EncoderInputs.of(query, key, value, scale=scale, padding=padding)
    segments = inputs.segments(landmarks)
    mean_query, mean_key = segments.mean(inputs.query), segments.mean(inputs.key)
    filled = segments.filled[:, None, None]
    reads = masked_softmax(inputs.query @ mean_key.mT * inputs.scale, filled)
    middle = masked_softmax(mean_query @ mean_key.mT * inputs.scale, filled)
    middle = middle.masked_fill(~filled.mT, 0)
    gathers = masked_softmax(mean_query @ inputs.key.mT * inputs.scale, inputs.token[:, None, None])
    bound = middle.sum(-1).amax(-1) * middle.sum(-2).amax(-1)
    inverse = newton_schulz(middle, bound[..., None, None], steps)
    return inputs.finish(reads @ (inverse @ (gathers @ inputs.value)))
