"""Sketched fourth powers: a positive polynomial kernel of high degree with few features.

With a = [1, y/2] and c = [1, x/2], (1 + y.x/4)^4 = (a.c)^4 stands for e^{y.x}. A sketch of
degree two,

    g(a) = (S a) * (T a) / sqrt(sketch)     S, T random signs     E <g(a), g(c)> = (a.c)^2

is multiplied with itself: <g(a), g(c)>^2 has the `sketch`^2 products of two entries of g as
features, is never negative, and exact where `sketch` holds all products of two columns of a.

Source: Kacham et al., PolySketchFormer, https://arxiv.org/abs/2310.01655 (self-tensored sketches).
Unlike there, the kernel is not trained: a one is added to the vectors so that it follows the
exponential, nothing is added to the mass, and the sketch is of signs, which keep the ones exact, in
the `rank` strongest balanced directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnplan.kernels.compressors._feature_map import (
    FeatureMap,
    Side,
    products,
    random_signs,
    with_constant,
)
from attnplan.kernels.operands.indexing import alike
from attnplan.kernels.operands.inputs import Inputs


@dataclass(frozen=True)
class PolySketch(FeatureMap):
    """Sum over far keys by the products of `sketch` features of degree two."""

    name: ClassVar[str] = "polysketch"
    settings: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"rank": 4, "sketch": 15},  # all products
        {"rank": 8, "sketch": 15},
        {"rank": 16, "sketch": 15},
        {"chunk": 64, "rank": 8, "sketch": 9},
    )
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ({"chunk": 64, "rank": 4, "sketch": 3},)

    rank: int = 16
    sketch: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1 direction, got {self.rank}")
        if self.sketch < 1:
            raise ValueError(f"sketch must be at least 1 feature, got {self.sketch}")

    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        low = with_constant(rows[..., : self.rank] / 2)
        columns = low.shape[-1]
        if self.sketch >= columns * (columns + 1) // 2:
            return products(products(low))
        first, second = alike(random_signs(2, columns, self.sketch, 0), low)
        return products((low @ first) * (low @ second) * self.sketch**-0.5)

    def directions(self, head_dim: int) -> int:
        return min(self.rank, head_dim)

    def count(self, head_dim: int) -> int:
        width = self._width(head_dim)
        return width * (width + 1) // 2

    def feature_macs(self, head_dim: int) -> float:
        columns = min(self.rank, head_dim) + 1
        return float(2 * columns * self._width(head_dim) + self.count(head_dim))

    def _width(self, head_dim: int) -> int:
        columns = min(self.rank, head_dim) + 1
        return min(self.sketch, columns * (columns + 1) // 2)
