"""Whether a checkpoint is the model that was made from it: what transformers only warns of.

What a checkpoint lacks, transformers fills with random numbers, and goes on. Every figure measured
on such a model would be wrong, so it is an error here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

SHOWN = 3
"""Names of weights that a sentence lists."""


def check_loaded(model: nn.Module, name: str, info: Mapping[str, Any]) -> None:
    """Raises ValueError where weights of the model did not come from its checkpoint.

    Weights that the model has no use for are told by a warning, unless they belong to layers of it:
    then the checkpoint is of another architecture, and the model computes something else.

    Args:
        model: as loaded.
        name: what the user called it.
        info: what `from_pretrained(..., output_loading_info=True)` said: missing_keys,
            unexpected_keys, mismatched_keys (name, stored shape, shape of the model), error_msgs.
    """
    kind = type(model).__name__
    if info["mismatched_keys"]:
        key, stored, wanted = sorted(info["mismatched_keys"])[0]
        count = len(info["mismatched_keys"])
        raise ValueError(
            f"cannot load {name}: {count} of its weights have other shapes than {kind} of its "
            f"config.json, such as {key} ({list(stored)}, not {list(wanted)})"
        )
    if info["missing_keys"]:
        raise ValueError(
            f"cannot load {name}: its checkpoint lacks {_listed(info['missing_keys'])}, which "
            f"{kind} needs and transformers would fill with random numbers"
        )
    if info["error_msgs"]:
        raise ValueError(f"cannot load {name}: {' '.join(str(info['error_msgs'][0]).split())}")
    unused = info["unexpected_keys"]
    foreign = {key for key in unused if _of_a_layer(model, key)}
    if foreign:
        raise ValueError(
            f"cannot load {name}: its checkpoint has {_listed(foreign)} that {kind} would ignore, "
            "so config.json describes another model"
        )
    if unused:
        warnings.warn(
            f"{name}: {kind} makes no use of {_listed(unused)} of its checkpoint", stacklevel=4
        )


def check_no_adapter(name: str, folder: Path) -> None:
    """Raises ValueError where a folder holds an adapter, which transformers may load or ignore."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter (adapter_config.json): merge it into its model "
            "(PeftModel.merge_and_unload), save that, and name its folder"
        )


def _of_a_layer(model: nn.Module, key: str) -> bool:
    """Whether a stored weight belongs to a module of the model that computes without it.

    So does a bias of a projection that has none here, or a norm within an attention module; more
    layers than the model has, and heads for other tasks, do not.
    """
    modules = dict(model.named_modules())
    owner, _, _ = key.rpartition(".")
    if owner in modules:
        return not any(True for _ in modules[owner].children())
    parent, _, _ = owner.rpartition(".")
    inside = modules.get(parent)
    if inside is None or isinstance(inside, nn.ModuleList) or parent.count(".") < 2:
        return False
    return any(True for _ in inside.children())


def _listed(keys: Collection[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    weights = "weight" if len(names) == 1 else "weights"
    return f"{len(names)} {weights} ({', '.join(names[:SHOWN])}{more})"
