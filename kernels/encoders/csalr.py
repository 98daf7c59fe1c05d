"""CSALR: a landmark attention, and coefficients with which every token combines its rows.

    o_i = sum over c of C_ic O_c      O = softmax(Q~ K^T) V      C = softmax(t Q L^T)

Q~ are the means of runs of queries. The coefficients C compare each query with the landmarks L: the
same means of queries, or means of keys. Rows of C sum to 1 and no weight is negative; there is no
matrix to invert, at the price of smoothing twice.

Source: Chen et al., IJCAI 2020 (for images of persons), by its abstract: a landmark attention map, a
map of combination coefficients, and landmarks by average pooling.

Deviations: the choice of L and the sharpness t are ours, since the paper learns its projections. Runs
hold tokens only and differ in length by at most one.
"""  # noqa: E501

from __future__ import annotations

from typing import Literal

from torch import Tensor

from attnplan.kernels.encoders.encoder_inputs import EncoderInputs, masked_softmax


def csalr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: int,
    sharpness: float = 1.0,
    compare: Literal["queries", "keys"] = "queries",
    scale: float | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention, [batch, heads, length, value_dim]; zero where there is padding.

    Float64 stays float64; all else is computed in float32.

    Args:
        query, key: [batch, heads, length, head_dim].
        value: [batch, heads, length, value_dim].
        landmarks: runs of tokens; no more than there are tokens are made.
        sharpness: inverse temperature of the coefficients: their scores are `sharpness` times
            `scale` times the dot products.
        compare: which means the coefficients compare a query with.
        scale: factor before the softmax, 1 / sqrt(head_dim) when None.
        padding: bool [batch, length], true for padding; None for none.

    Raises:
        ValueError: the sizes, dtypes or knobs do not fit.
    """
    if not sharpness > 0:
        raise ValueError(f"sharpness must be positive, got {sharpness}")
    if compare not in ("queries", "keys"):
        raise ValueError(f"compare must be 'queries' or 'keys', got {compare!r}")
    inputs = EncoderInputs.of(query, key, value, scale=scale, padding=padding)
    segments = inputs.segments(landmarks)
    mean_query = segments.mean(inputs.query)
    there = inputs.token[:, None, None]
    gathers = masked_softmax(mean_query @ inputs.key.mT * inputs.scale, there)
    landmark = mean_query if compare == "queries" else segments.mean(inputs.key)
    scores = inputs.query @ landmark.mT * (inputs.scale * sharpness)
    combines = masked_softmax(scores, segments.filled[:, None, None])
    return inputs.finish(combines @ (gathers @ inputs.value))
