"""Whether a plan's fitted data is what its methods read: there, of their sizes, and finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.fitted import Sizes, layout
from attnplan.plan.identity import ModelIdentity
from attnplan.plan.located_yaml import PlanError

if TYPE_CHECKING:
    from attnplan.plan.plan import Plan


def check_fitted(plan: Plan) -> None:
    """Raises PlanError where fitted data that a method reads is missing, or is something else."""
    for layer, data in plan.fitted.items():
        for name, tensor in data.items():
            _check_numbers(f"fitted data {name!r} of layer {layer}", tensor)
    model = plan.model
    for place, layer, method, sizes in _needs(plan):
        for name, wanted in sorted(sizes.items()):
            found = plan.fitted.get(layer, {}).get(name)
            told = f"{place}.layers.{layer}: {method} needs fitted data {name!r}"
            if found is None:
                raise PlanError(f"{told}, which the plan does not have")
            shape = wanted.of(model.heads, model.kv_heads)
            if tuple(found.shape) != shape:
                raise PlanError(f"{told} of shape {list(shape)}, got {list(found.shape)}")


def _needs(plan: Plan) -> Iterator[tuple[str, int, str, Mapping[str, Sizes]]]:
    """Place of a section, layer, method and what it reads, for each that reads something."""
    of_approximation = {
        a: (catalog.key(a), _of_approximation(a, plan.model))
        for a in dict.fromkeys(plan.methods.values())
    }
    for i, section in enumerate(plan.prefill):
        for layer, row in enumerate(section.layers):
            for approximation in dict.fromkeys(row):
                yield f"phases.prefill[{i}]", layer, *of_approximation[approximation]
    of_keeper = {
        keeper: (cache_catalog.key(keeper), layout(type(keeper), plan.model.head_dim))
        for keeper in dict.fromkeys(keeper for row in plan.keepers for keeper in row)
    }
    for layer, kept in enumerate(plan.keepers):
        for keeper in dict.fromkeys(kept):
            yield "phases.decode[0]", layer, *of_keeper[keeper]


def _of_approximation(approximation: Approximation, model: ModelIdentity) -> Mapping[str, Sizes]:
    """What its settings read."""
    parts = [approximation.near] + ([approximation.far] if approximation.far else [])
    found: dict[str, Sizes] = {}
    for part in parts:
        fitted = layout(type(part), model.head_dim)
        found |= {name: fitted[name] for name in part.reads(frozenset(fitted))}
    return found


def _check_numbers(told: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise PlanError(f"{told} must be floating-point numbers, got {kind}")
    if not tensor.numel() or not bool(tensor.float().isfinite().all()):
        raise PlanError(f"{told} must be finite numbers{'' if tensor.numel() else ', got none'}")
