"""What a patched model calls: one attention and one mask function, registered as `attnplan`.

Every planned attention module carries a `LayerState` in its attribute `_attnplan`. A fresh prefill
whose length is in the plan runs the layer's kernel; everything else goes to transformers' own SDPA
path with the mask that SDPA would have got, and is counted with the reason.

A model loaded with `from_pretrained(..., attn_implementation="attnplan")` (after
`import attnplan.patch`) finds its plan on the first call: the file named by `config.attnplan_plan`,
or `attnplan.yaml` in the model directory. An attention module does not know its model, so this
route checks architecture and sizes but not the weights; `attnplan.load` checks all.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from attnplan.cache import LAYER, PlanLayer
from attnplan.kernels.keeper import Keeper
from attnplan.kernels.layer import LayerKernel
from attnplan.plan import Assignment, Fitted, Plan, PlanError

NAME = "attnplan"
ATTRIBUTE = "_attnplan"

PLANNED = "plan"
DENSE_LAYER = "dense layer"
CONTINUED = "continues a cache"
KEPT = "decodes what the plan keeps"
SHORT = "shorter than the plan"
LONG = "longer than the plan"
BETWEEN = "between the plan's contexts"
PADDING = "padding that is not on the left"
MASK = "mask that is more than causal and padding"
ELSEWHERE = "measured on another device or in another dtype"
REASONS = (PLANNED, DENSE_LAYER, CONTINUED, KEPT, SHORT, LONG, BETWEEN, PADDING, MASK, ELSEWHERE)


@dataclass
class ModelState:
    """A plan as a patched model runs it.

    Attributes:
        contexts: first and last length of each section, ascending; None for no upper limit.
        kernels: for each section, the kernel of each layer.
        previous: the attention implementation of every configuration before patching.
        keepers: for each layer, what each kv head keeps while decoding; empty to keep everything.
        fitted: layer to what its methods were fitted with.
        elsewhere: the model is not where the plan was measured, and runs dense.
        counts: for each layer, how many calls ran the plan, or dense for which reason.
        warned: reasons that were already told.
    """

    contexts: tuple[tuple[int, int | None], ...]
    kernels: tuple[tuple[LayerKernel, ...], ...]
    previous: list[tuple[Any, str | None]]
    keepers: tuple[tuple[Keeper, ...], ...] = ()
    fitted: Fitted = field(default_factory=dict)
    elsewhere: bool = False
    counts: list[Counter[str]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        sections: Sequence[tuple[tuple[int, int | None], Assignment]],
        fitted: Fitted,
        previous: list[tuple[Any, str | None]],
        layers: int,
        elsewhere: bool = False,
        keepers: tuple[tuple[Keeper, ...], ...] = (),
    ) -> ModelState:
        """The state for some contexts with their assignments."""
        kernels = tuple(
            tuple(LayerKernel(row, fitted.get(layer, {})) for layer, row in enumerate(assignment))
            for _, assignment in sections
        )
        counts = [Counter[str]() for _ in range(layers)]
        contexts = tuple(c for c, _ in sections)
        kept = () if elsewhere else keepers
        return cls(contexts, kernels, previous, kept, fitted, elsewhere, counts)

    def kernel(self, layer: int, length: int) -> tuple[LayerKernel | None, str]:
        """The kernel for a fresh prefill of `length` tokens, and the reason when there is none."""
        if self.elsewhere:
            return None, ELSEWHERE
        reason = SHORT
        for (low, high), kernels in zip(self.contexts, self.kernels, strict=True):
            # One token attends to itself alone: there is nothing to approximate.
            if length < low or length == 1:
                return None, reason
            if high is None or length <= high:
                kernel = kernels[layer]
                return (None, DENSE_LAYER) if kernel.is_dense else (kernel, PLANNED)
            reason = BETWEEN
        return None, LONG if self.contexts else DENSE_LAYER

    def warn(self, reason: str, message: str) -> None:
        """Say it once per patched model."""
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"attnplan: {message}; dense attention runs instead", stacklevel=3)


@dataclass
class LayerState:
    """Which layer of which patched model a module is."""

    model: ModelState
    layer: int


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    """Attention of one layer, by its plan or dense; see transformers' AttentionInterface.

    Args:
        module: the attention module.
        query: [batch, heads, queries, head_dim], after rotary embedding.
        key: [batch, kv_heads, keys, head_dim], cached keys included.
        value: [batch, kv_heads, keys, value_dim].
        attention_mask: what `mask` made, or a 4-D mask of the user's.
        scaling: factor before the softmax, 1 / sqrt(head_dim) when None.
        dropout: only for dense layers.
        options: whatever else transformers passes to SDPA.

    Returns:
        [batch, queries, heads, value_dim], and no weights.

    Raises:
        ValueError: attention weights or gradients were asked of approximate attention.
    """
    state: LayerState | None = getattr(module, ATTRIBUTE, None)
    if state is None:
        state = _adopt(module, options.get("sliding_window"))
    if attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # A fresh prefill into a static cache, whose keys after the queries are empty.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    kernel = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: PlanLayer | None = getattr(key, LAYER, None)
    if layer is not None and not layer.is_fresh:
        if state is not None:
            state.model.counts[state.layer][KEPT] += 1
        output = layer.attend(query, scale, _new_padding(attention_mask, query.shape[2]))
        return output.transpose(1, 2).contiguous(), None
    if state is not None:
        if options.get("output_attentions"):
            raise ValueError(
                "output_attentions needs attention weights, which planned attention never forms; "
                "use attnplan.unpatch(model) and the eager implementation"
            )
        kernel, start = _choose(state, query, key, attention_mask)
    padding = None if layer is None else _new_padding(attention_mask, query.shape[2])
    if kernel is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = _square(attention_mask, query.shape[2])
        dense: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        if layer is not None:
            layer.settle(query, scale, padding)
        return dense
    if dropout > 0 or (torch.is_grad_enabled() and query.requires_grad):
        raise ValueError(
            "planned attention is for inference: use model.eval() and torch.no_grad(), or "
            "attnplan.unpatch(model) before training"
        )
    output = kernel(query, key, value, scale=scale, start=start)
    if layer is not None:
        layer.settle(query, scale, padding)
    return output.transpose(1, 2).contiguous(), None


def _choose(
    state: LayerState, query: Tensor, key: Tensor, attention_mask: Tensor | None
) -> tuple[LayerKernel | None, tuple[int, ...] | None]:
    """The kernel for this call and the first valid key per row, or None for dense; counted."""
    model = state.model
    kernel: LayerKernel | None = None
    start: tuple[int, ...] | None = None
    if query.shape[2] < key.shape[2]:
        reason = CONTINUED
    else:
        kernel, reason = model.kernel(state.layer, key.shape[2])
    if reason == LONG:
        longest = model.contexts[-1][1]
        model.warn(LONG, f"{key.shape[2]} tokens, but the plan was verified up to {longest}")
    if kernel is not None and attention_mask is not None:
        if attention_mask.ndim != 2:
            kernel, reason = None, MASK
            model.warn(MASK, "the attention mask is more than causal and padding")
        else:
            start = _left_padding(attention_mask)
            if start is None:
                kernel, reason = None, PADDING
                model.warn(PADDING, "the padding is not on the left")
    model.counts[state.layer][reason] += 1
    return kernel, start


@torch.compiler.disable  # type: ignore[untyped-decorator]
def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """The mask of a forward pass: 2-D [batch, keys] where there is padding, else what SDPA gets.

    None means causal without padding. A sliding window that is no shorter than the text counts as
    causal. The 2-D mask is expanded only where a layer runs dense; several tokens that continue a
    text have one without padding too, because SDPA would take None for a fresh text.
    """
    plain = mask_function is causal_mask_function or (
        local_size is not None and kv_length <= local_size
    )
    dynamic = isinstance(q_offset, int) and kv_offset == 0 and q_offset + q_length == kv_length
    if plain and dynamic and allow_is_causal_skip:
        fresh = q_offset == 0
        if attention_mask is None or bool(attention_mask.all()):
            if fresh or q_length == 1:
                return None
            device = options.get("device")
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        if attention_mask.shape[1] == kv_length:
            # A new object: results are kept on it, and the user's own tensor may change later.
            return attention_mask.view(attention_mask.shape)
    made: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )
    return made


def _left_padding(padding: Tensor) -> tuple[int, ...] | None:
    """The first valid key of each row, None where padding is anywhere but on the left."""
    known: dict[str, Any] = padding.__dict__
    if "start" not in known:
        keys = padding.shape[1]
        start = keys - padding.sum(1)
        left = torch.arange(keys, device=padding.device) >= start[:, None]
        fits = bool((left == padding).all() & (start < keys).all())
        known["start"] = tuple(start.tolist()) if fits else None
    found: tuple[int, ...] | None = known["start"]
    return found


def _new_padding(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of the newest tokens are padding, bool [batch, tokens]; None where none is.

    Raises:
        ValueError: a mask that is more than causal and padding, which what is kept cannot follow.
    """
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            "this plan stores less than the whole KV cache and needs a causal mask with padding at "
            f"most, got one of shape {list(mask.shape)}; use attnplan.unpatch(model)"
        )
    padding = ~mask[:, mask.shape[1] - tokens :].bool()
    return padding if bool(padding.any()) else None


def _square(padding: Tensor, queries: int) -> Tensor:
    """The 4-D mask that SDPA would have got for the last tokens; made once per forward pass."""
    known: dict[str, Any] = padding.__dict__
    if "square" not in known:
        batch, keys = padding.shape
        known["square"] = sdpa_mask(
            batch_size=batch,
            q_length=queries,
            kv_length=keys,
            q_offset=keys - queries,
            attention_mask=padding,
            allow_is_causal_skip=False,
            device=padding.device,
        )
    square: Tensor = known["square"]
    return square


_ADOPTED: weakref.WeakValueDictionary[int, ModelState] = weakref.WeakValueDictionary()
"""By the id of the configuration, which the state keeps alive; the modules keep the state alive."""


def _adopt(module: nn.Module, sliding_window: int | None) -> LayerState | None:
    """The plan of a model that was loaded with attn_implementation="attnplan".

    Returns:
        None for modules that plans are not about: those that are not causal, or have no layer.

    Raises:
        PlanError: no plan, or one that does not fit.
    """
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int) or getattr(module, "is_causal", True) is False:
        return None
    config: Any = module.config
    state = _ADOPTED.get(id(config))
    if state is None:
        state = _ADOPTED[id(config)] = _state_of_config(config)
    check_sliding(state.contexts, state.kernels, {layer: sliding_window})
    adopted = LayerState(state, layer)
    setattr(module, ATTRIBUTE, adopted)
    return adopted


def _state_of_config(config: Any) -> ModelState:
    path = getattr(config, "attnplan_plan", None) or Path(config._name_or_path) / "attnplan.yaml"
    if not Path(path).is_file():
        raise PlanError(
            f"there is no plan at {path}: put attnplan.yaml into the model directory, set "
            "config.attnplan_plan, or use attnplan.load"
        )
    plan = Plan.load(path)
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    sizes = {
        "architecture": (config.architectures or [plan.model.architecture])[0],
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": kv_heads,
    }
    for name, size in sizes.items():
        if getattr(plan.model, name) != size:
            raise PlanError(
                f"{path} is for {plan.model.name} with {name} {getattr(plan.model, name)}; this "
                f"model has {size}"
            )
    if plan.decode:
        raise PlanError(
            f"{path} stores less than the whole KV cache, which needs the model: use attnplan.load"
        )
    sections = [(section.context, section.layers) for section in plan.prefill]
    return ModelState.of(sections, plan.fitted, [(config, "sdpa")], plan.model.layers)


def check_sliding(
    contexts: Sequence[tuple[int, int | None]],
    kernels: Sequence[Sequence[LayerKernel]],
    windows: Mapping[int, int | None],
) -> None:
    """Raises PlanError where a layer with a sliding window of its own would run something else.

    Args:
        contexts, kernels: as in `ModelState`.
        windows: layer to the window of the model's own sliding attention.
    """
    for layer, window in windows.items():
        for (_, high), row in zip(contexts, kernels, strict=True):
            if window is not None and (high is None or high > window) and not row[layer].is_dense:
                raise PlanError(
                    f"layer {layer} has a sliding window of {window} keys in the model itself; "
                    "a plan must leave it dense beyond that length"
                )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
