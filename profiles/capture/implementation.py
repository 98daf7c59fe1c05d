"""Switch the attention implementation of a model, and back to exactly what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    """Switch the attention implementation inside the `with` block, and back exactly afterwards."""
    before = implementations(model)
    try:
        set_implementation(model, name)
        yield
    finally:
        for config, previous in before:
            config._attn_implementation_internal = previous


def implementations(model: Any) -> list[tuple[Any, str | None]]:
    """Every configuration inside a model, with the implementation that it names."""
    found: dict[int, Any] = {}
    queue: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while queue:
        config = queue.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            queue.extend(getattr(config, key, None) for key in config.sub_configs)
    return [(config, config._attn_implementation_internal) for config in found.values()]


def set_implementation(model: Any, name: str) -> None:
    """Raises ValueError where the model's attention cannot be switched."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} does not use AttentionInterface; attnplan needs a model whose "
            "attention implementation can be switched"
        )
