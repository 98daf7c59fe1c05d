"""Clusters weighted for the queries to come (`centroid-T`).

Far keys are cut into chunks of `chunk`; each chunk is clustered into `slots` pseudo-keys. With a
calibrated mean query m, e^{q.k} = e^{(q-m).k} e^{m.k}: the second factor W = e^{m.k} is a weight
that no longer depends on the query. Clusters are formed by a few Lloyd steps on S_q^1/2 k
(distances as queries see them) with weights W^1/2, and a cluster becomes the slot

    k~ = sum W k / sum W    value = sum W v    mass = sum W    log-weight b = -m.k~

which reproduces its keys exactly as they coincide.

Sources: Hooper et al., Multipole Attention, https://arxiv.org/abs/2506.13059 (clusters as far
field); the absorption of the mean query and the metric are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnplan.kernels.compressors._clustered_chunks import ClusterCompressor
from attnplan.kernels.numerics import query_draws
from attnplan.kernels.numerics.balance import root
from attnplan.kernels.operands.inputs import Moments

STEPS = 3


@dataclass(frozen=True)
class CentroidT(ClusterCompressor):
    """Replace every far chunk of `chunk` keys by `slots` weighted cluster centres."""

    name: ClassVar[str] = "centroid_t"
    predictor: ClassVar[str] = "cluster_inertia"
    windows: ClassVar[tuple[int, ...]] = (32, 128, 512)
    settings: ClassVar[tuple[tuple[int, int], ...]] = (
        *((64, 2), (64, 4), (64, 8)),
        *((128, 4), (256, 16)),
    )
    settings_behind: ClassVar[tuple[tuple[int, int], ...]] = ((64, 2), (64, 8))
    settings_beside_keys: ClassVar[tuple[tuple[int, int], ...]] = ((64, 1),)
    settings_opened: ClassVar[tuple[tuple[int, int, int], ...]] = (
        *((64, 2, 64), (64, 4, 128)),
        *((128, 8, 128), (256, 8, 128)),
    )
    mean_name: ClassVar[str | None] = "centroid_t.query_mean"
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": 64, "slots": 1, "references": 8},
        {"chunk": 64, "slots": 3, "references": 16},
    )
    matched: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": 256, "slots": 16, "references": 16},
    )

    steps: ClassVar[int] = STEPS
    uniform: ClassVar[float] = 0.5
    by_root: ClassVar[bool] = True
    metric_name: ClassVar[str | None] = "centroid_t.metric"

    chunk: int = 256

    def build_macs(self, head_dim: int) -> float:
        if self.slots == 1:  # all keys are one cluster
            return float(self.chunk * head_dim * 3)
        metric = head_dim + 1  # keys to the query metric, and their weights
        step = 2 * self.slots  # distances and means
        return float(self.chunk * head_dim * (metric + step * STEPS + self.slots + 2))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return {
            "centroid_t.query_mean": moments.query_mean.float(),
            "centroid_t.metric": root(moments.query_gram.double()).float(),
        } | query_draws.fit(moments)
