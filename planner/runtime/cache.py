"""A KV cache that stores what the plan keeps: layers for transformers' DynamicCache.

`PlanLayer` takes the place of a `DynamicLayer` inside an ordinary `DynamicCache`. To transformers
it reports how many tokens it has seen; what it holds is a `RaggedStore`, which may be far less.
While a model runs its plan (see `running.py`), `update` hands the new keys and values on alone,
and the attention function finds the layer by the module's index. Whoever else updates it gets all
rows back, if all were kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attnplan.kernels.contracts.cache_policy import Keeper, is_whole
from attnplan.kernels.kv_cache.ragged_cache import Context, RaggedStore
from attnplan.kernels.kv_cache.visible import Visible
from attnplan.kernels.operands.inputs import Fitted
from attnplan.runtime.running import RUNNING

Kept = tuple[tuple[Keeper, ...], Fitted]
"""The keepers of a layer, one per kv head, and its calibrated data."""


class PlanLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of one layer.

    Args:
        keepers: one per kv head.
        fitted: calibrated data of the layer.
        context: lengths of text that the keepers are for; see `RaggedStore`.
        index: of the layer in its cache.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        keepers: tuple[Keeper, ...],
        fitted: Fitted,
        context: Context = (1, None),
        index: int = 0,
    ) -> None:
        super().__init__()
        self.keepers = keepers
        self.fitted = fitted
        self.context = context
        self.index = index
        self.store: RaggedStore | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        """Keys and values that attention has yet to be computed for; nothing is stored before."""
        self._recording = False

    @property
    def record_past(self) -> bool:
        """Whether the tokens since the last `crop` can be taken back."""
        return self._recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._recording = value
        if self.store is not None:
            self.store.recording = value

    @property
    def is_fresh(self) -> bool:
        """The tokens of the running forward pass are the first."""
        return self.store is None

    @property
    def is_plain(self) -> bool:
        """It holds what an ordinary cache holds, because it was filled without a plan."""
        return self.keys is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held."""
        if self.keys is not None and self.values is not None:
            storages = {t.untyped_storage().data_ptr(): t for t in (self.keys, self.values)}
            return sum(t.untyped_storage().nbytes() for t in storages.values())
        return 0 if self.store is None else self.store.nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens, and give them back.

        Raises:
            ValueError: no plan runs, and some of the past is no longer there.
        """
        running = RUNNING.get()
        if running is None or running.layer(self.index) is not self:
            self._give_back()
            return super().update(key_states, value_states, *args, **kwargs)
        self.device, self.dtype = key_states.device, key_states.dtype
        self.pending = (key_states, value_states)
        return self.pending

    def _give_back(self) -> None:
        """Become an ordinary layer, with all tokens so far."""
        self.pending = None
        if self.store is None:
            return
        try:
            keys, values = self.store.whole()
        except ValueError as error:
            raise ValueError(
                f"layer {self.index}: this cache was filled under a plan that does not run here, "
                f"and {error}; patch the model again, or start with a new cache"
            ) from None
        self.keys, self.values, self.store = keys, values, None
        self.is_initialized = True

    def attend(self, query: Tensor, scale: float, seen: Visible | None) -> Tensor:
        """Attention of tokens that continue a text, [batch, heads, tokens, value_dim]."""
        if seen is None and self.store is not None and self.pending is not None:
            found = self.store.step(query, *self.pending)
            if found is not None:
                self.pending = None
                return found
        store = self._append(scale, seen)
        output = store.attend(query)
        store.settle(query)
        return output

    def settle(self, query: Tensor, scale: float, seen: Visible | None) -> None:
        """Store the first tokens, to which attention has been computed without the store."""
        self._append(scale, seen).settle(query)

    def _append(self, scale: float, seen: Visible | None) -> RaggedStore:
        assert self.pending is not None
        store = self.store
        if store is None:
            store = RaggedStore(self.keepers, scale=scale, fitted=self.fitted, context=self.context)
            store.recording = self._recording
        (key, value), self.pending = self.pending, None
        store.append(key.detach(), value.detach(), seen)
        self.store, self.is_initialized = store, True
        return store

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        if self.store is not None:
            return self.store.seen
        return int(super().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        tokens = int(tokens_to_remove)
        if self.store is None:
            super().crop(tokens)
            return
        if tokens > 0:
            raise ValueError(f"crop takes minus the tokens to remove, got {tokens}")
        self.store.crop(-tokens)

    def reset(self) -> None:
        self.store = self.pending = None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            every = torch.arange(self.store.batch)
            self.store.select(every.repeat_interleave(repeats))
        else:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store.select(indices)
        else:
            super().batch_select_indices(indices)

    def offload(self) -> None:
        raise ValueError(REFUSED.format("an offloaded cache"))

    def prefetch(self) -> None:
        self.offload()


REFUSED = (
    "this plan stores less than the whole KV cache, which {} cannot: use the default cache, or "
    "attnplan.unpatch(model)"
)


def convert(cache: Any, layers: Mapping[int, Kept], context: Context = (1, None)) -> None:
    """Let an empty cache follow a plan.

    Args:
        cache: what transformers is about to fill; None where nothing is cached.
        layers: index in the cache to keepers and calibrated data.
        context: lengths of text that the keepers are for.

    Raises:
        ValueError: a cache that cannot store less, or that was filled otherwise.
    """
    if cache is None:
        return
    if type(cache) is not DynamicCache:
        raise ValueError(REFUSED.format(f"a {type(cache).__name__}"))
    if getattr(cache, "offloading", False):
        raise ValueError(REFUSED.format("an offloaded cache"))
    seen = set()
    for index, kept in layers.items():
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if type(layer) is not PlanLayer or layer.keepers is not kept[0]:
            layer = cache.layers[index] = _converted(layer, kept, context, index)
        seen.add(layer.get_seq_length())
    seen.add(cache.get_seq_length())
    if len(seen) > 1:
        raise ValueError(
            f"the layers of this cache hold {' and '.join(map(str, sorted(seen)))} tokens, because "
            "an earlier call broke off halfway: start with a new cache"
        )


def _converted(layer: Any, kept: Kept, context: Context, index: int) -> Any:
    """The layer of a plan in the place of an empty one, or one that is right already."""
    keepers, fitted = kept
    if type(layer) is DynamicSlidingWindowLayer and all(map(is_whole, keepers)):
        return layer
    if type(layer) is PlanLayer and layer.store is not None:
        if (layer.keepers, layer.context) != (keepers, context) or not _equal(layer.fitted, fitted):
            raise ValueError(REFUSED.format("a cache that was filled under another plan"))
        layer.keepers, layer.fitted = keepers, fitted
        return layer
    if layer.is_initialized:
        raise ValueError(REFUSED.format("a cache that was filled without it"))
    if type(layer) not in (DynamicLayer, PlanLayer):
        raise ValueError(REFUSED.format(f"a cache with a {type(layer).__name__} for layer {index}"))
    planned = PlanLayer(keepers, fitted, context, index)
    planned.record_past = getattr(layer, "record_past", False)
    return planned


def _equal(one: Fitted, other: Fitted) -> bool:
    """Whether calibrated data is the same."""
    return one is other or (
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    )


def stored_bytes(cache: Any) -> int:
    """Bytes that a cache holds, counted from tensor storage."""
    total, seen = 0, set()
    for layer in cache.layers:
        if isinstance(layer, PlanLayer):
            total += layer.nbytes
            continue
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
    return total
