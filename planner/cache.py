"""A KV cache that stores what the plan keeps: layers for transformers' DynamicCache.

`PlanLayer` takes the place of a `DynamicLayer` inside an ordinary `DynamicCache`. To transformers
it reports how many tokens it has seen; what it holds is a `LayerStore`, which may be far less. The
keys that it hands to the attention function carry it as an attribute, so that the function finds
what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from attnplan.kernels.approximation import Fitted
from attnplan.kernels.keeper import Keeper
from attnplan.kernels.layer_store import LayerStore

LAYER = "_attnplan_layer"
"""Attribute of keys: the `PlanLayer` that they come from."""


class PlanLayer(DynamicLayer):  # type: ignore[misc]
    """The cache of one layer.

    Args:
        keepers: one per kv head.
        fitted: calibrated data of the layer.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, keepers: tuple[Keeper, ...], fitted: Fitted) -> None:
        super().__init__()
        self.keepers = keepers
        self.fitted = fitted
        self.store: LayerStore | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._seen = 0
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
    def nbytes(self) -> int:
        """Bytes of the tensors that are held."""
        return 0 if self.store is None else self.store.nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens, and give them back, marked."""
        self.device, self.dtype = key_states.device, key_states.dtype
        self.is_initialized = True
        self._pending = (key_states, value_states)
        self._seen += key_states.shape[-2]
        marked = key_states.view(key_states.shape)
        setattr(marked, LAYER, self)
        return marked, value_states

    def attend(self, query: Tensor, scale: float, padding: Tensor | None) -> Tensor:
        """Attention of tokens that continue a text, [batch, heads, tokens, value_dim]."""
        store = self._append(scale, padding)
        output = store.attend(query)
        store.settle(query)
        return output

    def settle(self, query: Tensor, scale: float, padding: Tensor | None) -> None:
        """Store the first tokens, to which attention has been computed without the store."""
        self._append(scale, padding).settle(query)

    def _append(self, scale: float, padding: Tensor | None) -> LayerStore:
        assert self._pending is not None
        if self.store is None:
            self.store = LayerStore(self.keepers, scale=scale, fitted=self.fitted)
            self.store.recording = self._recording
        (key, value), self._pending = self._pending, None
        self.store.append(key, value, padding)
        return self.store

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        tokens = int(tokens_to_remove)
        if tokens > 0:
            raise ValueError(f"crop takes minus the tokens to remove, got {tokens}")
        if self.store is not None:
            self.store.crop(-tokens)
            self._seen += tokens

    def reset(self) -> None:
        self.store = self._pending = None
        self._seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            batch = self.store.stored[0].key.shape[0]
            self.store.select(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store.select(indices)

    def offload(self) -> None:
        raise ValueError(REFUSED.format("an offloaded cache"))

    def prefetch(self) -> None:
        self.offload()


REFUSED = (
    "this plan stores less than the whole KV cache, which {} cannot: use the default cache, or "
    "attnplan.unpatch(model)"
)


def convert(cache: Any, layers: Mapping[int, tuple[tuple[Keeper, ...], Fitted]]) -> None:
    """Let an empty cache follow a plan.

    Args:
        cache: what transformers is about to fill; None where nothing is cached.
        layers: index in the cache to keepers and calibrated data.

    Raises:
        ValueError: a cache that cannot store less, or that was filled without the plan.
    """
    if cache is None:
        return
    if type(cache) is not DynamicCache:
        raise ValueError(REFUSED.format(f"a {type(cache).__name__}"))
    if getattr(cache, "offloading", False):
        raise ValueError(REFUSED.format("an offloaded cache"))
    for index, (keepers, fitted) in layers.items():
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if isinstance(layer, PlanLayer):
            continue
        if layer.is_initialized:
            raise ValueError(REFUSED.format("a cache that was filled without it"))
        planned = PlanLayer(keepers, fitted)
        planned.record_past = getattr(layer, "record_past", False)
        cache.layers[index] = planned


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
