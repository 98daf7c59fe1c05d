"""Models with something around them: wrappers, and adapters on top of their weights.

peft puts the layer that it adapts into a module with the attribute `adapter_layer_names`, as its
child `base_layer` (or `original_module`); the adapter's own weights are the other children.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

_ADAPTED = ("base_layer", "original_module")


def model_inside(model: nn.Module) -> PreTrainedModel:
    """The transformers model in wrappers such as PeftModel; itself where there are none.

    Raises:
        ValueError: there is none, or there are several.
    """
    if isinstance(model, PreTrainedModel):
        return model
    found = list(_outermost(model))
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} transformers models; give attnplan the one "
            "that it shall plan"
        )
    return found[0]


def _outermost(module: nn.Module) -> Iterator[PreTrainedModel]:
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _outermost(child)


def is_adapted(module: nn.Module) -> bool:
    """Whether adapters have been added somewhere inside."""
    return any(_base(part) is not None for part in module.modules())


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by their names, as if nothing adapted it."""
    prefixes = {n: _base(m) for n, m in model.named_modules() if _base(m) is not None}
    for name, parameter in model.named_parameters():
        parts, kept = name.split("."), True
        for depth in range(len(parts), 0, -1):
            base = prefixes.get(".".join(parts[: depth - 1]))
            if base is not None:
                kept = kept and parts[depth - 1] == base
                del parts[depth - 1]
        if kept:
            yield ".".join(parts), parameter


def _base(module: nn.Module) -> str | None:
    """The name of the child that an adapter changes; None for other modules."""
    if not hasattr(module, "adapter_layer_names"):
        return None
    return next((name for name in _ADAPTED if name in module._modules), None)
