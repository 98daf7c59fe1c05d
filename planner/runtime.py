"""What a patched model calls: one attention and one mask function, registered as `attnplan`.

Every planned attention module carries a `LayerState` in its attribute `_attnplan`. A fresh prefill
whose length is in the plan runs the layer's kernel; everything else goes to transformers' own SDPA
path with the mask that SDPA would have got, and is counted with the reason.

A module without a state is one that plans are not about, such as the cross-attention of a patched
model, or belongs to a model that was given the name `attnplan` and waits for its plan: see
attnplan.adoption.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from attnplan.cache import LAYER, PlanLayer
from attnplan.kernels.keeper import Keeper
from attnplan.kernels.layer import LayerKernel
from attnplan.own_configurations import OwnConfiguration, is_given
from attnplan.plan import Assignment, Fitted, Plan, PlanError
from attnplan.profiles.capture import UNPLANNABLE
from attnplan.weight_marks import Place, WeightMark, place_of

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
CHANGED = "other weights than the plan was made for"
REASONS = (PLANNED, DENSE_LAYER, CONTINUED, KEPT, SHORT, LONG, BETWEEN, PADDING, MASK, ELSEWHERE)


@dataclass
class ModelState:
    """A plan as a patched model runs it.

    Attributes:
        contexts: first and last length of each section, ascending; None for no upper limit.
        kernels: for each section, the kernel of each layer.
        keepers: for each layer, what each kv head keeps while decoding; empty to keep everything.
        fitted: layer to what its methods were fitted with.
        elsewhere: the model is not where the plan was measured, and runs dense.
        home: where attention computes when the model is where the plan was measured; None for
            anywhere.
        plan: what the model was patched with; None for a mere assignment.
        configurations: what the model has for itself while it is patched.
        counts: for each layer, how many calls ran the plan, or dense for which reason.
        warned: reasons that were already told.
    """

    contexts: tuple[tuple[int, int | None], ...]
    kernels: tuple[tuple[LayerKernel, ...], ...]
    keepers: tuple[tuple[Keeper, ...], ...] = ()
    fitted: Fitted = field(default_factory=dict)
    elsewhere: bool = False
    home: Place | None = None
    plan: Plan | None = None
    configurations: tuple[OwnConfiguration, ...] = ()
    counts: list[Counter[str]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        sections: Sequence[tuple[tuple[int, int | None], Assignment]],
        fitted: Fitted,
        layers: int,
        keepers: tuple[tuple[Keeper, ...], ...] = (),
    ) -> ModelState:
        """The state for some contexts with their assignments."""
        kernels = tuple(
            tuple(LayerKernel(row, fitted.get(layer, {})) for layer, row in enumerate(assignment))
            for _, assignment in sections
        )
        counts = [Counter[str]() for _ in range(layers)]
        contexts = tuple(c for c, _ in sections)
        return cls(contexts, kernels, keepers, fitted, counts=counts)

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

    def is_away(self, module: nn.Module) -> bool:
        """Whether a module is elsewhere than its plan was measured; told once."""
        place = None if self.home is None else place_of(module)
        if self.home is None or place is None or place == self.home:
            return False
        assert self.plan is not None
        target = self.plan.target
        self.warn(
            ELSEWHERE,
            f"the plan was made for {target.kind} in {target.dtype}, this model is on {place[0]} "
            f"in {place[1]}",
            "dense attention runs instead, unless force=True",
        )
        return True

    def warn(self, reason: str, message: str, then: str = "dense attention runs instead") -> None:
        """Say it once per patched model."""
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"attnplan: {message}; {then}", stacklevel=3)


@dataclass
class LayerState:
    """Which layer of which patched model a module is.

    Attributes:
        model, layer: the plan, and the layer's number in it.
        block: the module around the attention: the whole layer; None where weights do not matter.
        mark: the weights of the block that the plan was checked against.
        at_home: devices and dtypes of a call that was where the plan was measured.
    """

    model: ModelState
    layer: int
    block: nn.Module | None = None
    mark: WeightMark | None = None
    at_home: tuple[torch.device, torch.dtype, torch.dtype] | None = None

    def __post_init__(self) -> None:
        self.mark = None if self.block is None else WeightMark.of(self.block)

    def look(self, module: nn.Module, query: Tensor, value: Tensor) -> LayerState:
        """What runs where the module is now: this, or the same counters with dense attention."""
        here = query.device, query.dtype, value.dtype
        if self.model.home is None or here == self.at_home:
            return self
        if not self.model.is_away(module):
            self.at_home = here
            return self
        return LayerState(replace(self.model, elsewhere=True, keepers=()), self.layer)

    def look_at_weights(self) -> None:
        """Say it once where the weights are no longer those that the plan was checked against.

        Single tokens that continue a text are not worth the look; only the first layer, which
        speaks for the others, has its contents sampled each time.
        """
        if self.block is None or self.mark is None:
            return
        if self.mark.is_current(self.block, thorough=self.layer == 0):
            return
        before, self.mark = self.mark, WeightMark.of(self.block)
        if not before.is_same(self.mark):
            changed = "the weights have changed since the plan was checked against them"
            self.model.warn(CHANGED, ADAPTED if self.mark.is_adapted else changed, VERIFY)


ADAPTED = "adapters are on top of the weights that the plan was verified with"
VERIFY = "it runs all the same: verify it again with `attnplan evaluate`"


def refuse_tracing() -> None:
    """Raises ValueError where attention is recorded as a program instead of being run.

    What runs depends on the length of the text, and the kernels are not torch's: the program would
    be another model.
    """
    if _is_traced():
        raise ValueError(REFUSED_TRACING)


def _is_traced() -> bool:
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return traced or torch.compiler.is_exporting()


REFUSED_TRACING = (
    "attnplan: a planned model cannot be exported or traced, because what runs depends on the "
    "length of the text; use attnplan.unpatch(model) first, or torch.compile"
)


@torch.compiler.disable(reason=REFUSED_TRACING)  # type: ignore[untyped-decorator]
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
        ValueError: attention weights or gradients were asked of approximate attention, or the model
            is being exported.
    """
    state: LayerState | None = getattr(module, ATTRIBUTE, None) or _adopted(module)
    if state is None:
        return _unplanned(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    refuse_tracing()
    if query.shape[2] > 1 and not query.requires_grad:
        state.look_at_weights()
    state = state.look(module, query, value)
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


@torch.compiler.disable(reason=REFUSED_TRACING)  # type: ignore[untyped-decorator]
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
    text have one without padding too, because SDPA would take None for a fresh text. A mask with
    more rules that hide and show nothing, such as those for the images of a text without images, is
    the 2-D one.
    """
    fits = local_size is None or kv_length <= local_size
    plain = mask_function is causal_mask_function or (local_size is not None and fits)
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
    comparable = dynamic and fits and mask_function is not bidirectional_mask_function
    if made is None or not comparable or _is_traced():
        return made
    padding = attention_mask
    if padding is None:
        padding = torch.ones(batch_size, kv_length, dtype=torch.bool, device=made.device)
    padding = padding.view(padding.shape)
    if padding.shape[1] != kv_length or not torch.equal(_square(padding, q_length), made):
        return made
    return padding


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


def _adopted(module: nn.Module) -> LayerState | None:
    """The state of a module whose model was given our name on the way, now that it has its plan."""
    if is_given(module):
        return None
    from attnplan.adoption import adopt_around

    adopt_around(module)
    state: LayerState | None = getattr(module, ATTRIBUTE, None)
    return state


def _unplanned(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a module that no plan is about: what SDPA computes; see `attention`."""
    for option in UNPLANNABLE:
        if option != "position_bias" and options.get(option) is not None:
            raise ValueError(
                f"{type(module).__name__} in this patched model uses {UNPLANNABLE[option]}, which "
                "SDPA would ignore; use attnplan.unpatch(model)"
            )
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = _square(attention_mask, query.shape[2])
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return found


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
