"""Linear attention with elu + 1 features, around the head's mean query and key.

    e^{y.x} ~ <f(y), f(x)>     f(x) = (elu(x) + 1) / sqrt(head_dim), entry by entry

which is 1 where both are at their means, and positive everywhere.

Source: Katharopoulos et al., https://arxiv.org/abs/2006.16236, section 3.2. Unlike there, queries
and keys are not trained for it, but centred and balanced, and the mean query weighs the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.approximation import Inputs
from attnplan.kernels.feature_map import FeatureMap, Side


@dataclass(frozen=True)
class Linear(FeatureMap):
    """Sum over far keys by one positive feature per balanced direction."""

    name: ClassVar[str] = "linear"

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        return (torch.nn.functional.elu(rows) + 1) * rows.shape[-1] ** -0.5

    def count(self, head_dim: int) -> int:
        return head_dim

    def feature_macs(self, head_dim: int) -> float:
        return float(head_dim)
