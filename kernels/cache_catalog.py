"""The keepers that attnplan knows, and how a plan spells one.

A keeper is added by one file in `kernels/cache_policies` and its name here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnplan.kernels.cache_policies.clusters import Clusters
from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.cache_policies.observed import Observed
from attnplan.kernels.cache_policies.pages import Pages
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.kernels.operands.inputs import Moments
from attnplan.kernels.spelling import build

KEEPERS: dict[str, type[Keeper]] = {
    cls.name: cls for cls in (Full, Recent, Observed, Clusters, Pages)
}
FULL = Full()


def choices(context: int) -> Iterator[Keeper]:
    """Every keeper worth trying for texts of `context` tokens; the full one comes first."""
    for keeper in KEEPERS.values():
        yield from keeper.choices(context)


def fit(moments: Moments) -> dict[str, Tensor]:
    """What all keepers fit to one layer, 'name.tensor' to tensor."""
    fitted: dict[str, Tensor] = {}
    for keeper in KEEPERS.values():
        fitted |= keeper.fit(moments)
    return fitted


@cache
def fitted_names(head_dim: int, keeper: type[Keeper] | None = None) -> frozenset[str]:
    """What one keeper, or all together, fit: found by fitting one head of white noise."""
    mean, gram = torch.zeros(1, head_dim), torch.eye(head_dim)[None]
    noise = Moments(mean, gram, mean, gram)
    return frozenset(fit(noise) if keeper is None else keeper.fit(noise))


def to_dict(keeper: Keeper) -> dict[str, Any]:
    """The spelling of plan files: {'keep': {'name': ..., knobs}}."""
    return {"keep": {"name": keeper.name, **asdict(keeper)}}  # type: ignore[call-overload]


def from_dict(spelled: Mapping[str, Any]) -> Keeper:
    """The inverse of `to_dict`.

    Raises:
        ValueError: an unknown keeper or knob, or a bad value; the message names what is known.
    """
    told = spelled.get("keep")
    if set(spelled) != {"keep"} or not isinstance(told, Mapping) or told.get("name") is None:
        raise ValueError(f"a keeper is spelled {{keep: {{name: ..., knobs}}}}, got {spelled!r}")
    return build(KEEPERS, told, "keeper")


def key(keeper: Keeper) -> str:
    """One canonical line: `recent(window=256, sinks=4)`."""
    knobs = asdict(keeper)  # type: ignore[call-overload]
    return f"{keeper.name}({', '.join(f'{k}={v}' for k, v in knobs.items())})"
