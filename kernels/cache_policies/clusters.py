"""Keep the keys that recent queries attend to, and weighted clusters of all the others.

With m the calibrated mean query of the group, e^{s q.k} = e^{s (q-m).k} e^{s m.k}: the second
factor W is a weight that no longer depends on the query. What is not kept as it is, is clustered by
Lloyd steps on S_q^1/2 k (distances as queries see them); a cluster becomes the pseudo-key

    k~ = sum W k / sum W    value = sum W v / sum W    log-mass b = log sum W - s m.k~

which reproduces its keys exactly as they coincide. Old pseudo-keys are clustered again like keys of
their mass.

Sources: Hooper et al., Multipole Attention, https://arxiv.org/abs/2506.13059 (clusters for what is
not read exactly); the absorption of the mean query, the metric and the repeated clustering are
ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.cache_policies.observed import Observed
from attnplan.kernels.contracts.cache_policy import Past
from attnplan.kernels.numerics.balance import root
from attnplan.kernels.numerics.clustering import gathered, nearest, pick, take
from attnplan.kernels.operands.inputs import Moments

STEPS = 3


@dataclass(frozen=True)
class Clusters(Observed):
    """Keep `keys` attended keys and `clusters` pseudo-keys beside the sinks and the window."""

    name: ClassVar[str] = "clusters"
    family: ClassVar[str] = "hybrid"
    merges: ClassVar[bool] = True

    clusters: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 1:
            raise ValueError(f"clusters must be at least 1, got {self.clusters}")

    @property
    def more(self) -> int:
        return self.keys + self.clusters

    @property
    def chosen(self) -> int:
        return self.keys

    @classmethod
    def of(cls, rows: int) -> Self | None:
        window, clusters = max(32, rows // 4), rows // 4
        keys = rows - window - clusters - cls.sinks
        made = cls(window=window, keys=keys, clusters=clusters) if keys >= 32 else None
        return made

    def merged(self, old: Past) -> Past:
        heads = list(old.kv_heads)
        mean, metric = (
            old.fitted[f"clusters.{name}"][heads].to(old.key.device, torch.float32)
            for name in ("query_mean", "metric")
        )
        key, value = old.key.float(), old.value.float()
        log_weight = old.bias + (key * mean[:, None]).sum(-1) * old.scale
        shift = log_weight.amax(-1, keepdim=True)
        shift = torch.where(shift.isfinite(), shift, 0.0)
        weight = (log_weight - shift).exp()
        points = torch.where(weight[..., None] > 0, key @ metric, 0)
        seed, _ = pick(weight, self.clusters, 0.5)
        # clustering again what was clustered before is nearly done from the start
        steps = STEPS if old.rows > 2 * self.more else 1
        cluster = nearest(points, weight.sqrt(), take(points, seed), steps)
        is_row = weight[..., None] > 0
        heavy = torch.where(is_row, torch.cat([key, value], -1), 0) * weight[..., None]
        sums = gathered(heavy, cluster, self.clusters)
        mass = gathered(weight[..., None], cluster, self.clusters)
        centre, pooled = (sums / mass.clamp(min=torch.finfo(mass.dtype).tiny)).split(
            [key.shape[3], value.shape[3]], -1
        )
        mass = mass[..., 0]
        bias = mass.log() + shift - (centre * mean[:, None]).sum(-1) * old.scale
        paid = gathered(old.attention[..., None] * is_row, cluster, self.clusters)
        return old.replaced(
            centre.to(old.key.dtype), pooled.to(old.value.dtype), bias, paid[..., 0]
        )

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        kv_heads = moments.key_mean.shape[0]
        mean = moments.query_mean.float().unflatten(0, (kv_heads, -1)).mean(1)
        gram = moments.query_gram.double().unflatten(0, (kv_heads, -1)).mean(1)
        return {"clusters.query_mean": mean, "clusters.metric": root(gram).float()}
