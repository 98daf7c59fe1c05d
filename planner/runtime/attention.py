"""What a patched model calls: one attention and one mask function, registered as `attnplan`.

Every planned attention module carries a `LayerState` in its attribute `_attnplan`. A fresh prefill
whose length is in the plan runs the layer's kernel; everything else goes to transformers' own SDPA
path with the mask that SDPA would have got, and is counted with the reason.

A module without a state is one that plans are not about, such as the cross-attention of a patched
model, or belongs to a model that was given the name `attnplan` and waits for its plan: see
attnplan.runtime.adoption.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.kernels.kv_cache import visible
from attnplan.kernels.kv_cache.ragged_cache import Context, Standing
from attnplan.kernels.kv_cache.visible import Visible
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.plan.plan import Assignment, Fitted, Plan, PlanError
from attnplan.profiles.capture.capture import UNPLANNABLE
from attnplan.runtime.cache import PlanLayer
from attnplan.runtime.own_configurations import OwnConfiguration, is_given
from attnplan.runtime.running import RUNNING
from attnplan.runtime.weight_marks import Place, WeightMark, place_of

NAME = "attnplan"
ATTRIBUTE = "_attnplan"

PLANNED = "plan"
DENSE_LAYER = "dense layer"
CONTINUED = "continues a cache"
KEPT = "decodes what the plan keeps"
SHORT = "shorter than the plan"
LONG = "longer than the plan"
BETWEEN = "between the plan's contexts"
PADDING = "padding inside the text"
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
        kept_context: first and last length of the texts that the keepers are for.
        fitted: layer to what its methods were fitted with.
        elsewhere: the model is not where the plan was measured, and runs dense.
        home: where attention computes when the model is where the plan was measured; None for
            anywhere.
        plan: what the model was patched with; None for a mere assignment.
        configurations: what the model has for itself while it is patched.
        counts: for each layer, how many calls ran the plan, or dense for which reason.
        warned: reasons that were already told.
        proved: what was shown of the model before it ran this plan.
    """

    contexts: tuple[tuple[int, int | None], ...]
    kernels: tuple[tuple[LayerKernel, ...], ...]
    keepers: tuple[tuple[Keeper, ...], ...] = ()
    kept_context: Context = (1, None)
    fitted: Fitted = field(default_factory=dict)
    elsewhere: bool = False
    home: Place | None = None
    plan: Plan | None = None
    configurations: tuple[OwnConfiguration, ...] = ()
    counts: list[Counter[str]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    proved: frozenset[object] = frozenset()

    @classmethod
    def of(
        cls,
        sections: Sequence[tuple[tuple[int, int | None], Assignment]],
        fitted: Fitted,
        layers: int,
        keepers: tuple[tuple[Keeper, ...], ...] = (),
        kept_context: Context = (1, None),
    ) -> ModelState:
        """The state for some contexts with their assignments."""
        kernels = tuple(
            tuple(LayerKernel(row, fitted.get(layer, {})) for layer, row in enumerate(assignment))
            for _, assignment in sections
        )
        counts = [Counter[str]() for _ in range(layers)]
        contexts = tuple(c for c, _ in sections)
        return cls(contexts, kernels, keepers, kept_context, fitted, counts=counts)

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
        """Say once per patched model why something else runs."""
        self.say(reason, f"{message}; {then}")

    def say(self, topic: str, message: str) -> None:
        """Say it once per patched model."""
        if topic not in self.warned:
            self.warned.add(topic)
            warnings.warn(f"attnplan: {message}", stacklevel=4)


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
        ValueError: attention weights or gradients were asked of approximate attention, the model is
            being exported, or the mask or the keys are not what a plan that stores less can follow;
            nothing is stored then.
    """
    state: LayerState | None = getattr(module, ATTRIBUTE, None) or _adopted(module)
    if state is None:
        return _unplanned(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    refuse_tracing()
    if query.shape[2] > 1 and not query.requires_grad:
        state.look_at_weights()
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions needs attention weights, which planned attention never forms; "
            "use attnplan.unpatch(model) and the eager implementation"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, seen = None, None
    if state.model.keepers:
        layer = _stored_layer(state, module, key)
    if layer is not None:
        seen = _followed(state, layer, attention_mask)
        if not layer.is_fresh:
            _check_inference(query, dropout)
            return _continued(state, layer, query, scale, seen), None
    state = state.look(module, query, value)
    if layer is None and attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # A fresh prefill into a static cache, whose keys after the queries are empty.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    parts = _choose(state, query, key, attention_mask)
    if parts is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = _square(attention_mask, query.shape[2])
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    else:
        _check_inference(query, dropout)

        def dense(*tensors: Tensor) -> Tensor:
            made, _ = sdpa_attention_forward(module, *tensors, None, scaling=scaling, **options)
            return made.transpose(1, 2)

        output = _by_rows(parts, (query, key, value), scale, dense)
        output = output.transpose(1, 2).contiguous()
    if layer is not None:
        layer.settle(query, scale, seen)
        _standings(state, layer)
    return output, None


def _check_inference(query: Tensor, dropout: float) -> None:
    """Raises ValueError where gradients or dropout are asked of attention that has none."""
    if dropout > 0 or (torch.is_grad_enabled() and query.requires_grad):
        raise ValueError(
            "planned attention is for inference: use model.eval() and torch.no_grad(), or "
            "attnplan.unpatch(model) before training"
        )


def _stored_layer(state: LayerState, module: nn.Module, key: Tensor) -> PlanLayer | None:
    """The cache layer that follows the plan here; None where nothing is cached or it is kept whole.

    Raises:
        ValueError: attention reads other keys than that layer was given.
    """
    running = RUNNING.get()
    if running is None or running.plan is not state.model:
        return None
    layer = running.layer(int(module.layer_idx))  # type: ignore[arg-type]
    if type(layer) is not PlanLayer:
        return None
    given = None if layer.pending is None else layer.pending[0]
    if given is not key:
        layer.pending = None
        what = "none" if given is None else f"keys {list(given.shape)}"
        raise ValueError(
            f"layer {state.layer} gives its cache {what} and attention keys {list(key.shape)}, "
            "so what attention reads cannot be stored by a plan; plan no decode for this model"
        )
    return layer


def _followed(state: LayerState, layer: PlanLayer, mask: Tensor | None) -> Visible | None:
    """What the mask hides, after a look at what all layers have stored under earlier masks.

    Raises:
        ValueError: a mask that what is stored cannot follow; no layer has taken tokens yet.
    """
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            "this plan stores less than the whole KV cache and needs a causal mask with padding at "
            f"most, got one of shape {list(mask.shape)}; use attnplan.unpatch(model)"
        )
    seen = None if mask is None else _visible(mask)
    running = RUNNING.get()
    if running is not None and not running.is_checked:
        for other in running.layers:
            store = other.store if type(other) is PlanLayer else None
            refusal = None if store is None else store.refusal(seen)
            if refusal is not None:
                raise ValueError(
                    f"layer {other.index}: the attention mask {refusal}; give it as it was, start "
                    "with a new cache, or use attnplan.unpatch(model)"
                )
        running.is_checked = True
    return seen


def _continued(
    state: LayerState, layer: PlanLayer, query: Tensor, scale: float, seen: Visible | None
) -> Tensor:
    """Attention of tokens that continue a text, over what the plan keeps of it; counted."""
    output = layer.attend(query, scale, seen)
    for reason in _standings(state, layer):
        state.model.counts[state.layer][reason] += 1
    return output.transpose(1, 2).contiguous()


_KEPT = {
    Standing.WITHIN: KEPT,
    Standing.OUTGROWN: KEPT,
    Standing.SHORT: SHORT,
    Standing.LONG: LONG,
}


def _standings(state: LayerState, layer: PlanLayer) -> set[str]:
    """What is counted for a call that decodes; says what is not within the plan's context."""
    store = layer.store
    assert store is not None
    found = store.standings
    last = store.context[1]
    if Standing.LONG in found:
        state.model.say(
            "kept long",
            f"a text of more than {last} tokens, but what this plan keeps was verified up to there;"
            " all of it is kept",
        )
    if Standing.OUTGROWN in found:
        state.model.say(
            "outgrown",
            f"a text has grown to {store.seen} tokens, but what this plan keeps was verified up to "
            f"{last}; it goes on as before, because what is condensed cannot come back",
        )
    return {_KEPT[standing] for standing in found}


@dataclass(frozen=True)
class _Part:
    """Rows of a batch with text in the same places.

    Attributes:
        rows: None for all.
        first, last: where it begins and ends.
        kernel: None for dense attention.
    """

    rows: tuple[int, ...] | None
    first: int
    last: int
    kernel: LayerKernel | None


def _choose(
    state: LayerState, query: Tensor, key: Tensor, attention_mask: Tensor | None
) -> list[_Part] | None:
    """Who runs which rows of this call, or None for dense attention of all; counted."""
    model, keys = state.model, key.shape[2]
    if query.shape[2] < keys:
        parts, reasons = None, {CONTINUED}
    elif attention_mask is not None and attention_mask.ndim != 2:
        kernel, reason = model.kernel(state.layer, keys)
        if kernel is not None:
            reason = MASK
            model.warn(MASK, "the attention mask is more than causal and padding")
        parts, reasons = None, {reason}
    else:
        seen = None if attention_mask is None else _visible(attention_mask)
        parts, reasons = _split(state, key.shape[0], keys, seen)
    if LONG in reasons:
        longest = model.contexts[-1][1]
        model.warn(LONG, f"{keys} tokens, but the plan was verified up to {longest}")
    for reason in reasons:
        model.counts[state.layer][reason] += 1
    return parts


def _split(
    state: LayerState, batch: int, keys: int, seen: Visible | None
) -> tuple[list[_Part] | None, set[str]]:
    """Parts by where texts begin and end, each with the kernel for its own length; the reasons."""
    model = state.model
    if seen is None:
        kernel, reason = model.kernel(state.layer, keys)
        return (None if kernel is None else [_Part(None, 0, keys, kernel)]), {reason}
    parts, reasons = [], set()
    for pattern, rows in visible.alike(seen.patterns, range(batch)).items():
        places = list(visible.spans(pattern))
        kernel, reason = model.kernel(state.layer, visible.count(pattern))
        if len(places) > 1 and kernel is not None:
            model.warn(PADDING, "there is padding inside a text")
            return None, {PADDING}
        reasons.add(reason)
        for first, last in places:
            parts.append(_Part(tuple(rows), first, last, kernel))
    return (parts if any(part.kernel for part in parts) else None), reasons


def _by_rows(
    parts: list[_Part],
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    dense: Callable[..., Tensor],
) -> Tensor:
    """Attention of each part alone, [batch, heads, queries, value_dim]; zero for padding."""
    query, _, value = tensors
    first = parts[0]
    if first.rows is None and first.kernel is not None:
        return first.kernel(*tensors, scale=scale)
    output = query.new_zeros(*query.shape[:3], value.shape[3])
    for part in parts:
        rows = torch.tensor(part.rows, device=query.device)
        query, key, value = (t[rows, :, part.first : part.last] for t in tensors)
        if part.kernel is None:
            made = dense(query, key, value)
        else:
            made = part.kernel(query, key, value, scale=scale)
        output[rows, :, part.first : part.last] = made
    return output


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


def _visible(mask: Tensor) -> Visible | None:
    """What a 2-D mask hides; read once per forward pass."""
    known: dict[str, Any] = mask.__dict__
    if "visible" not in known:
        known["visible"] = visible.read(mask)
    found: Visible | None = known["visible"]
    return found


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
    from attnplan.runtime.adoption import adopt_around

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
