"""Where a model's attention happens: found by running it, not by knowing its architecture."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from attnplan.models.example_input import examples
from attnplan.profiles.capture.capture import UNPLANNABLE
from attnplan.profiles.capture.implementation import implementation as implementation
from attnplan.profiles.capture.implementation import implementations as implementations
from attnplan.profiles.capture.implementation import set_implementation as set_implementation


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model, as a forward pass calls it.

    Attributes:
        name: qualified module name, such as `model.layers.0.self_attn`.
        heads, kv_heads, head_dim: sizes of the call.
        sliding_window: keys the model's own sliding attention reads, None for full attention.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None


def attention_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    """The attention modules of a model, in the order in which a forward pass calls them.

    Found by a forward pass over two tokens with an attention function that takes notes, so that
    nothing has to be known about architectures.

    Raises:
        ValueError: the model does not go through AttentionInterface, or does something with its
            scores that the plan path would not honour.
    """
    modules, sites = _SITES.get(model, ((), ()))
    now = tuple(id(module) for module in model.modules())
    if now != modules:
        sites = _find_sites(model)
        _SITES[model] = now, sites
    return sites


_SITES: WeakKeyDictionary[PreTrainedModel, tuple[tuple[int, ...], tuple[AttentionSite, ...]]] = (
    WeakKeyDictionary()
)
"""Of each model: the ids of its modules, and what was found in them."""
_PROBE = "attnplan_probe"
_Call = tuple[nn.Module, tuple[int, ...], int, dict[str, Any]]
_CALLS: ContextVar[list[_Call]] = ContextVar("attention calls")


def _take_notes(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    _CALLS.get().append((module, tuple(query.shape), key.shape[1], options))
    batch, heads, queries, _ = query.shape
    return value.new_zeros(batch, queries, heads, value.shape[-1]), None


def _find_sites(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    architecture = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(f"{architecture} is no decoder-only causal language model")
    calls = attention_calls(model)
    if not calls:
        raise ValueError(
            f"{architecture} does not use AttentionInterface; attnplan needs a model whose "
            "attention implementation can be switched"
        )
    names = {id(module): name for name, module in model.named_modules()}
    sites: list[AttentionSite] = []
    seen: set[int] = set()
    for module, (_, heads, _, head_dim), kv_heads, options in calls:
        name = names[id(module)]
        for option, words in UNPLANNABLE.items():
            if options.get(option) is not None:
                raise ValueError(
                    f"{architecture} uses {words} in {name}; attnplan cannot plan it yet"
                )
        if options.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise ValueError(
                f"{name} of {architecture} is not causal; attnplan plans causal attention"
            )
        if id(module) in seen:
            raise ValueError(
                f"{architecture} calls {name} twice; attnplan needs one call per layer"
            )
        seen.add(id(module))
        sites.append(AttentionSite(name, heads, kv_heads, head_dim, options.get("sliding_window")))
    return tuple(sites)


def attention_calls(model: PreTrainedModel) -> list[_Call]:
    """What the attention function is called with, by a forward pass over a small example.

    Returns:
        For each call, the module, the shape of the queries, the number of kv heads, the options.

    Raises:
        ValueError: the model's attention cannot be switched, or it runs on no example that
            attnplan can make.
    """
    AttentionInterface.register(_PROBE, _take_notes)
    calls: list[_Call] = []
    failures: list[Exception] = []
    token = _CALLS.set(calls)
    try:
        with implementation(model, _PROBE), torch.no_grad():
            made = examples(model)
            while True:
                try:
                    example = next(made, None)
                    if example is None:
                        break
                    calls.clear()
                    model(**example)
                    return calls
                except Exception as error:  # whatever a model raises on what it cannot read
                    failures.append(error)
    finally:
        _CALLS.reset(token)
    why = " ".join(str(failures[-1]).split())[:200].rstrip(".") or type(failures[-1]).__name__
    raise ValueError(
        f"{type(model).__name__} did not run on an example of its {model.main_input_name} ({why}); "
        "attnplan cannot find its attention"
    ) from failures[-1]
