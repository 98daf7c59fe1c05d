"""The pseudo-inverse by third-order Newton-Schulz steps.

    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

A step multiplies the part of A Z that belongs to a small singular value by 13/4: after `steps`
steps, singular values below 3.25^(-steps/2) of the largest are left out rather than inverted. The
number of steps is therefore a filter: more of them are not better on an ill-conditioned matrix.

Source: Xiong et al., Nyströmformer, https://arxiv.org/abs/2102.03902.
"""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(matrix: Tensor, bound: Tensor, steps: int) -> Tensor:
    """An approximate pseudo-inverse, [..., n, n].

    Args:
        matrix: [..., n, n].
        bound: at least the square of its largest singular value [..., 1, 1]; the first Z is the
            transpose over this.
        steps: 0 or more.

    Raises:
        ValueError: a negative number of steps.
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    inverse = matrix.mT / bound.clamp(min=torch.finfo(matrix.dtype).tiny)
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        product = matrix @ inverse
        inner = 15 * unit - product @ (7 * unit - product)
        inverse = inverse @ (13 * unit - product @ inner) / 4
    return inverse
