"""While a model is patched, its attention reads configuration objects that no other model has.

transformers chooses the attention of a module by a name in `module.config`, and any number of
models may share that object: a name put there for one of them would change the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_IMPLEMENTATION = "_attn_implementation_internal"


class GivenName(str):
    """The name of an attention implementation, put there by a patch: no user asked for it.

    A model that is made from the configuration of a patched one has the name, but no plan.
    """


@dataclass(frozen=True)
class OwnConfiguration:
    """A configuration that one model has for itself.

    Attributes:
        own: a copy whose attention implementation is ours.
        shared: what the model had, and has again afterwards.
        before: the attributes of the copy when it was made.
    """

    own: PreTrainedConfig
    shared: PreTrainedConfig
    before: dict[str, Any]


def separate(
    model: nn.Module, sites: Iterable[str], implementation: str
) -> tuple[OwnConfiguration, ...]:
    """Give a model its own configurations, wherever its attention or its masks are chosen by one.

    Args:
        model: changed in place: every module that held one of the shared objects holds the copy.
        sites: qualified names of the attention modules.
        implementation: the name that the copies get.
    """
    shared = _read_by(model, sites)
    own = {id(config): copy.copy(config) for config in shared}
    for config in own.values():
        _replace(vars(config), own)
        vars(config)[_IMPLEMENTATION] = GivenName(implementation)
    for module in model.modules():
        _replace(vars(module), own)
    return tuple(OwnConfiguration(own[id(c)], c, dict(vars(own[id(c)]))) for c in shared)


def join(model: nn.Module, configurations: Iterable[OwnConfiguration]) -> None:
    """Give the shared configurations back, with what was changed in the copies since."""
    back = {id(one.own): one.shared for one in configurations}
    for module in model.modules():
        _replace(vars(module), back)
    for one in configurations:
        now, shared = vars(one.own), vars(one.shared)
        for key in (now.keys() | one.before.keys()) - {_IMPLEMENTATION}:
            if key not in now:
                shared.pop(key, None)
            elif key not in one.before or now[key] is not one.before[key]:
                shared[key] = back.get(id(now[key]), now[key])


def chosen(configurations: Iterable[OwnConfiguration]) -> list[str | None]:
    """The implementations that are chosen now, by the patch or by whoever came after it."""
    return [vars(one.own)[_IMPLEMENTATION] for one in configurations]


def shared_choice(configurations: Iterable[OwnConfiguration]) -> list[str | None]:
    """The implementations that the model has without the patch."""
    return [vars(one.shared)[_IMPLEMENTATION] for one in configurations]


def choose(
    configurations: Iterable[OwnConfiguration], implementations: Iterable[str | None]
) -> None:
    """Choose implementations, one for each configuration."""
    for one, implementation in zip(configurations, implementations, strict=True):
        vars(one.own)[_IMPLEMENTATION] = implementation


def is_given(module: nn.Module) -> bool:
    """Whether a module runs ours because a patch says so, and not because a user named it."""
    config = getattr(module, "config", None)
    return isinstance(getattr(config, _IMPLEMENTATION, None), GivenName)


def _read_by(model: nn.Module, sites: Iterable[str]) -> list[PreTrainedConfig]:
    """The configurations of attention modules and of the modules around them, which make masks."""
    found: dict[int, PreTrainedConfig] = {}
    for site in sites:
        parts = site.split(".") if site else []
        for depth in range(len(parts) + 1):
            for value in vars(model.get_submodule(".".join(parts[:depth]))).values():
                if isinstance(value, PreTrainedConfig):
                    for config in (value, value.get_text_config()):
                        found[id(config)] = config
    return list(found.values())


def _replace(attributes: dict[str, Any], configurations: dict[int, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(value, PreTrainedConfig) and id(value) in configurations:
            attributes[name] = configurations[id(value)]
