"""Run an operator of attnplan.kernels.encoders inside an encoder of transformers.

    from functools import partial

    from attnplan import patch_encoder, unpatch_encoder
    from attnplan.kernels.encoders.nystromformer import nystromformer_attention

    patch_encoder(model, partial(nystromformer_attention, landmarks=64))

Every attention call of the model then runs the operator or raises: nothing falls back to dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

from attnplan.models.attention_sites import attention_calls
from attnplan.profiles.capture.capture import UNPLANNABLE
from attnplan.runtime.own_configurations import OwnConfiguration, join, separate

NAME = "attnplan_encoder"
ATTRIBUTE = "_attnplan_encoder"

Operator = Callable[..., Tensor]
"""(query, key, value, *, scale, padding) to [batch, heads, length, value_dim], as the originals."""


@dataclass(frozen=True)
class _Layer:
    """What an attention module of a patched encoder runs, and what the model has for itself."""

    operator: Operator
    configurations: tuple[OwnConfiguration, ...]


def patch_encoder(
    model: PreTrainedModel, operator: Operator | Sequence[Operator]
) -> PreTrainedModel:
    """Run `operator` in place of the attention of a bidirectional encoder from now on.

    A patched model raises ValueError where it is asked for attention dropout, attention weights or
    a mask that is more than padding.

    Args:
        model: changed in place; an earlier operator is replaced.
        operator: one for all attention layers, or one for each in their order.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not an encoder with plain bidirectional softmax attention, or it
            has another number of layers.
    """
    sites = _sites(model)
    operators = [operator] * len(sites) if callable(operator) else list(operator)
    if len(operators) != len(sites):
        raise ValueError(
            f"{len(operators)} operators for the {len(sites)} attention layers of "
            f"{type(model).__name__}"
        )
    unpatch_encoder(model)
    configurations = separate(model, sites, NAME)
    for name, chosen in zip(sites, operators, strict=True):
        setattr(model.get_submodule(name), ATTRIBUTE, _Layer(chosen, configurations))
    return model


def unpatch_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Leave the model exactly as it was before it was patched; no effect on an unpatched one."""
    layers = [m.__dict__.pop(ATTRIBUTE, None) for m in model.modules()]
    join(model, next((layer.configurations for layer in layers if layer is not None), ()))
    return model


def _sites(model: PreTrainedModel) -> list[str]:
    """The names of the attention modules of an encoder, in the order of their calls."""
    architecture = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{architecture} has a decoder; patch_encoder is for encoders alone")
    names = {id(module): name for name, module in model.named_modules()}
    sites: list[str] = []
    for module, (_, heads, _, _), kv_heads, options in attention_calls(model):
        name = names[id(module)]
        if options.get("is_causal", getattr(module, "is_causal", True)) is not False:
            raise ValueError(f"{name} of {architecture} is causal; patch_encoder is for encoders")
        for option, words in (UNPLANNABLE | {"sliding_window": "a sliding window"}).items():
            if options.get(option) is not None:
                raise ValueError(f"{architecture} uses {words} in {name}, which operators ignore")
        if kv_heads != heads:
            raise ValueError(f"{name} of {architecture} has {heads} heads but {kv_heads} kv heads")
        if name in sites:
            raise ValueError(f"{architecture} calls {name} twice; one call per layer is needed")
        sites.append(name)
    if not sites:
        raise ValueError(
            f"{architecture} does not use AttentionInterface; patch_encoder needs a model whose "
            "attention implementation can be switched"
        )
    return sites


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a patched encoder calls; see transformers' AttentionInterface.

    Args:
        module: the attention module.
        query, key: [batch, heads, length, head_dim].
        value: [batch, heads, length, value_dim].
        attention_mask: bool [batch, length], true for tokens; None for no padding.
        scaling: factor before the softmax, 1 / sqrt(head_dim) when None.
        dropout: must be 0.
        options: whatever else transformers passes to SDPA.

    Returns:
        [batch, length, heads, value_dim], and no weights.

    Raises:
        ValueError: the module has no operator, or the call asks for what operators do not do.
    """
    layer: _Layer | None = module.__dict__.get(ATTRIBUTE)
    if layer is None:
        raise ValueError(f"no operator for this {type(module).__name__}: use patch_encoder")
    if dropout > 0:
        raise ValueError(
            "the operators have no attention dropout: use model.eval(), or set the dropout of "
            "attention to 0 in the configuration"
        )
    if options.get("output_attentions"):
        raise ValueError("the operators form no attention weights, so output_attentions cannot be")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"the operators take padding only, got a mask of shape {list(attention_mask.shape)}"
        )
    padding = None if attention_mask is None else ~attention_mask.bool()
    output = layer.operator(query, key, value, scale=scaling, padding=padding)
    return output.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask of a forward pass: bool [batch, length], true for tokens; None for no padding.

    Raises:
        ValueError: the model wants more than bidirectional attention with padding.
    """
    if mask_function is not bidirectional_mask_function or q_length != kv_length:
        raise ValueError("the operators take padding only, the model wants another mask as well")
    return attention_mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
