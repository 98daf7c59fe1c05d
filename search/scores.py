"""What every candidate would cost every head: output error and Fisher cost on captured tensors.

For a candidate's output change d at one head and position, and the gradient g of the model's own
sampled loss there, E[(g . d)^2] is the candidate's Fisher cost: half of its sum over all heads
predicts the KL divergence per token from the original model. Both are measured on query blocks
spread evenly over the text, with the engine that will run the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnplan.kernels.catalog import DENSE
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.dispatch import attend
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.tile_list import BLOCK


@dataclass(frozen=True)
class Observed:
    """One layer on one calibration text: what scoring compares with.

    The exact output is computed again from `inputs`, at their precision: a change is then the
    candidate's alone, also where tensors were stored in bfloat16.

    Attributes:
        inputs: the exact call; the other tensors are on its device.
        gradient: [1, heads, queries, value_dim], of the sampled loss at the exact output; None
            without a backward pass.
        projection: float32 [heads], sensitivity to use without a gradient.
    """

    inputs: Inputs
    gradient: Tensor | None
    projection: Tensor | None = None


@dataclass(frozen=True)
class CandidateScores:
    """Scores of one layer on one text, [heads, candidates]; nan where not offered.

    Attributes:
        fisher: mean over positions of (g . d)^2, in nats per token (times two); inf where an
            output is not finite, so that the head is not offered the candidate.
        relative_error: ||d|| / ||o|| over the sampled positions.
        positions: how many positions were sampled.
    """

    fisher: NDArray[np.float64]
    relative_error: NDArray[np.float64]
    positions: int


def sampled_blocks(queries: int, count: int, seed: int) -> Tensor:
    """Indices of about `count` query blocks, one in each of `count` equal parts of the text."""
    blocks = -(-queries // BLOCK)
    if count >= blocks:
        return torch.arange(blocks)
    generator = np.random.default_rng(seed)
    edges = np.linspace(0, blocks, count + 1)
    picked = np.floor(edges[:-1] + generator.random(count) * np.diff(edges)).astype(np.int64)
    return torch.from_numpy(np.unique(np.clip(picked, 0, blocks - 1)))


def score_layer(
    observed: Observed,
    candidates: Sequence[Approximation],
    offered: NDArray[np.bool_],
    blocks: Tensor,
) -> CandidateScores:
    """Score candidates on one layer.

    Without a gradient the Fisher cost is replaced by the squared output change, weighted by the
    head's block of the output projection: comparable between heads, but not a KL divergence.

    Args:
        observed: the layer.
        candidates: what to try; dense ones score zero without being run.
        offered: bool [heads, candidates], which heads to try them on.
        blocks: query blocks to compare on.
    """
    inputs = observed.inputs
    heads = len(inputs.head)
    rows = inputs.positions(blocks).flatten()
    real = rows >= 0
    rows = rows[real] - inputs.offset
    exact = _output(DENSE, inputs, blocks)[0][:, real].float()  # [heads, rows, value_dim]
    norm = exact.square().sum((1, 2)).double()
    fisher = np.full((heads, len(candidates)), np.nan)
    error = np.full((heads, len(candidates)), np.nan)
    for c, candidate in enumerate(candidates):
        wanted = tuple(np.flatnonzero(offered[:, c]).tolist())
        if candidate.is_dense:
            fisher[list(wanted), c] = error[list(wanted), c] = 0.0
        elif wanted:
            some = inputs.heads(wanted)
            change = _output(candidate, some, blocks)[0][:, real].float() - exact[list(wanted)]
            cost = _cost(observed, list(wanted), rows, change)
            fisher[list(wanted), c] = cost.nan_to_num(nan=math.inf).cpu().numpy()
            squares = change.square().sum((1, 2)).double()
            relative = (squares / norm[list(wanted)]).sqrt()
            error[list(wanted), c] = relative.nan_to_num(nan=math.inf).cpu().numpy()
    return CandidateScores(fisher, error, len(rows))


def _output(candidate: Approximation, inputs: Inputs, blocks: Tensor) -> Tensor:
    """The candidate's output for some query blocks, [batch, heads, 64 * blocks, value_dim]."""
    tiles, slots = candidate.tiles(inputs, blocks)
    output, _ = attend(
        inputs.rows(blocks),
        inputs.key,
        inputs.value,
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles,
        slots=slots,
        part=candidate.part(inputs, blocks),
    )
    return output


def _cost(observed: Observed, heads: list[int], rows: Tensor, change: Tensor) -> Tensor:
    """Fisher cost per head, float64 [heads]."""
    if observed.gradient is not None:
        gradient = observed.gradient[0, heads][:, rows].float()
        return (gradient * change).sum(-1).double().square().mean(-1)
    if observed.projection is None:
        raise ValueError("scoring needs a gradient, or the norm of the output projection")
    weight = observed.projection[heads].double().square()
    return change.double().square().sum(-1).mean(-1) * weight
