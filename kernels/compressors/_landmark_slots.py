"""Slots that stand in for keys in the feature space of the exponential kernel.

In balanced, centred coordinates x the weight of key j for query y is e^{s y.x_j} = <f(y), f(x_j)>.
Writing f(x_j) as a combination of landmarks, sum_c a_cj f(x_c), makes every landmark a slot

    w_c = sum_j W_j a_cj       u_c = sum_j W_j a_cj v_j

With g(x, x') = e^{-s|x-x'|^2/2} the best combination (Nystrom) is

    a_cj = e^{s(|x_j|^2 - |x_c|^2)/2} (g_CC^-1 g_Cj)_c

in which nothing overflows but the norms, and these are carried in the log-weights. With a rank, x
are coordinates along so many of the strongest directions: cheaper, and keys count as alike that
differ where hardly any query looks. The mass of a
slot may come out negative; such slots are left out, so that the mass of a query stays positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import Chunks, Summary
from attnplan.kernels.operands.inputs import Inputs


def points(rows: Tensor, chunks: Chunks, inputs: Inputs, rank: int = 0) -> Tensor:
    """Keys in balanced coordinates, the scale of the scores in them, [..., chunk, directions].

    Args:
        rows: keys [..., chunk, head_dim].
        chunks, inputs: whose they are.
        rank: along so many of the strongest directions; 0 for head_dim coordinates of no order.
    """
    mean = inputs.fitted_heads("balanced.key_mean", chunks.head).to(rows.dtype)
    key_map = inputs.fitted_heads("balanced.key_map", chunks.head).to(rows.dtype)
    if rank:
        strongest = inputs.fitted_heads("balanced.directions", chunks.head)[..., :rank]
        key_map = key_map @ strongest.to(rows.dtype)
    return (rows - mean[:, None, None]) @ key_map[:, None] * chunks.scale**0.5


def log_shares(chunks: Chunks, x: Tensor) -> tuple[Tensor, Tensor]:
    """log(W_j e^{|x_j|^2/2}) below its largest [..., chunk], -inf for keys that are left out.

    Returns:
        These, and the largest [..., 1], 0 where all are left out.
    """
    share = chunks.weight.log() + x.square().sum(-1) / 2
    top = share.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    return share - top, top


def lifted(
    chunks: Chunks, x: Tensor, landmarks: Tensor, at: Tensor, coefficients: Tensor
) -> Summary:
    """Slots from landmarks and the coefficients g_CC^-1 g_Cj.

    Args:
        chunks: the keys.
        x: their balanced coordinates.
        landmarks: keys of the landmarks [..., slots, head_dim].
        at: their balanced coordinates.
        coefficients: [..., slots, chunk].
    """
    log_share, top = log_shares(chunks, x)
    share = coefficients * log_share.exp()[..., None, :]
    mass = share.sum(-1)
    kept = mass > 0
    value = torch.where(kept[..., None], share @ chunks.value, 0.0)
    log_scale = torch.where(kept, top - at.square().sum(-1) / 2, 0.0)
    return Summary(landmarks, torch.where(kept, mass, 0.0), value, log_scale)
