"""What a generated token costs a layer, cache update and attention, beside transformers' own.

Timings are kept in the store; a cost model is fitted to them, of kv heads and keepers in place of
heads and approximations.

Both sides run what a model's attention modules call: the cache's `update` and the attention
function. They take turns, token by token, after the same prompt of real text, in so many layers
that their caches do not fit into that of the processor, as in a model. The time in which a past is
condensed is part of the token that it falls on.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnplan.costs.prefill import counted, this_device
from attnplan.kernels import cache_catalog
from attnplan.kernels.bench.measure import quantile, timed
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.kernels.digest import decode_digest
from attnplan.kernels.operands.inputs import Fitted
from attnplan.models.load import LoadedModel
from attnplan.profiles.capture.capture import LayerCapture, capture
from attnplan.profiles.records import records
from attnplan.profiles.store.database import Store
from attnplan.profiling.profiling import Advance, Workload, model_record, silent
from attnplan.quality.continuation import decode_ms
from attnplan.quality.prefill import original
from attnplan.runtime import attention
from attnplan.runtime.cache import convert, stored_bytes
from attnplan.runtime.running import RUNNING, Running
from attnplan.search.latency import LatencyFit, fit_latency

WARM_UP = 8
"""Tokens that are not timed."""
STEPS = 256
"""Tokens that show what condensing costs."""
MIXTURES = 8
"""Layers of several keepers that the cost model is held against."""
BEYOND = 100 << 20
"""Bytes of dense caches that no processor's own cache holds."""


@dataclass(frozen=True)
class DecodeTiming:
    """One layer and one token, in ms.

    Attributes:
        kept: the keepers of the layer, spelled.
        median_ms, q25_ms, q75_ms: of a token under the plan.
        mean_ms: the same with what condensing costs now and then.
        dense_median_ms, dense_mean_ms: of transformers' DynamicCache and SDPA, in the same run.
        share: bytes of the cache afterwards over those of the dense one, from tensor storage.
        layers: that took part.
        steps: tokens of each side.
    """

    kept: str
    median_ms: float
    q25_ms: float
    q75_ms: float
    mean_ms: float
    dense_median_ms: float
    dense_mean_ms: float
    share: float
    layers: int
    steps: int


def spell(row: Sequence[Keeper]) -> str:
    """The kv heads of a layer, whatever their order: '2 x recent(...) | 1 x full()'."""
    return counted(cache_catalog.key(keeper) for keeper in row)


def some_layers(captured: Sequence[LayerCapture]) -> list[LayerCapture]:
    """Layers at equal distances, so many that their dense caches exceed `BEYOND`, or all."""
    first = captured[0]
    size = (first.key.numel() + first.value.numel()) * first.key.element_size()
    count = min(len(captured), -(-BEYOND // size))
    return [captured[(2 * i + 1) * len(captured) // (2 * count)] for i in range(count)]


def measure_decoding(
    layers: Sequence[LayerCapture],
    row: Sequence[Keeper],
    fitted: Mapping[int, Fitted],
    *,
    steps: int = STEPS,
) -> DecodeTiming:
    """Time tokens that follow a prompt, under some keepers and dense in turn.

    Args:
        layers: of one text, which is the prompt; its last tokens follow it once more.
        row: one keeper for each kv head, the same in all layers.
        fitted: calibrated data by layer.
        steps: timed tokens of each side.
    """
    sides = _Side(layers, tuple(row), fitted), _Side(layers, None, fitted)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + steps):
        for side, found in zip(sides, times, strict=True):
            found.append(timed(side.step(number)) / len(layers))
    kept, base = (sorted(found[WARM_UP:]) for found in times)
    held, held_dense = (stored_bytes(side.cache) for side in sides)
    return DecodeTiming(
        kept=spell(row),
        median_ms=quantile(kept, 0.5),
        q25_ms=quantile(kept, 0.25),
        q75_ms=quantile(kept, 0.75),
        mean_ms=statistics.fmean(kept),
        dense_median_ms=quantile(base, 0.5),
        dense_mean_ms=statistics.fmean(base),
        share=held / held_dense,
        layers=len(layers),
        steps=steps,
    )


@dataclass(frozen=True)
class HostTiming:
    """What the host does for one layer and one token, in us of one CPU thread.

    Attributes:
        kept: the keepers of the layer, spelled.
        median_us, q25_us, q75_us: until a call under the plan has returned; it starts work on a
            GPU and does not wait for it, and does the work itself on a CPU.
        dense_median_us: of transformers' DynamicCache and SDPA, in the same run.
        over_us: median of the differences, token by token.
        steps: tokens of each side.
    """

    kept: str
    median_us: float
    q25_us: float
    q75_us: float
    dense_median_us: float
    over_us: float
    steps: int


def measure_host(
    layers: Sequence[LayerCapture], row: Sequence[Keeper], *, steps: int = STEPS
) -> HostTiming:
    """Time what a layer call costs the host; use a short prompt, which leaves little else on a CPU.

    Args:
        layers, steps: as in `measure_decoding`.
        row: one keeper for each kv head; none for a plan that leaves the cache as it is.
    """
    sides = _Side(layers, tuple(row), {}), _Side(layers, None, {})
    times: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(WARM_UP + steps):
            for side, found in zip(sides, times, strict=True):
                run = side.step(number)
                if layers[0].query.is_cuda:
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                run()
                found.append((time.perf_counter() - begin) / len(layers) * 1e6)
    finally:
        torch.set_num_threads(threads)
    kept, base = (found[WARM_UP:] for found in times)
    return HostTiming(
        kept=spell(row),
        median_us=statistics.median(kept),
        q25_us=quantile(sorted(kept), 0.25),
        q75_us=quantile(sorted(kept), 0.75),
        dense_median_us=statistics.median(base),
        over_us=statistics.median(a - b for a, b in zip(kept, base, strict=True)),
        steps=steps,
    )


def time_keepers(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    fitted: Mapping[int, Fitted],
    rows: Sequence[Sequence[Keeper]],
    *,
    steps: int = STEPS,
    advance: Advance = silent,
) -> list[DecodeTiming]:
    """Time layers after the first text of a workload, or read back what is stored.

    Args:
        loaded: the model, not patched.
        work: texts; the first is the prompt.
        store: where timings are kept.
        fitted: calibrated data by layer.
        rows: for each layer to time, one keeper per kv head.
        steps: timed tokens of each side.
        advance: called before each layer.
    """
    layers: list[LayerCapture] = []
    found = []
    for number, row in enumerate(rows):
        advance(f"{number + 1} of {len(rows)}")
        key = _key(loaded, work, "decode timing", spell(row), steps=steps)
        values = store.load_measurement(key)
        if values is None:
            if not layers:
                model, text = loaded.model, work.tokens.tokens[0]
                captured = capture(
                    model, text, gradients=False, seed=work.seed, store_dtype=model.dtype
                )
                layers = [_on(layer, model.device) for layer in some_layers(captured.layers)]
            values = asdict(measure_decoding(layers, row, fitted, steps=steps))
            store.save_measurement(key, values)
        found.append(DecodeTiming(**values))
    return found


def _on(layer: LayerCapture, device: torch.device) -> LayerCapture:
    query, key, value = (t.to(device) for t in (layer.query, layer.key, layer.value))
    return replace(layer, query=query, key=key, value=value)


def dense_token_ms(loaded: LoadedModel, work: Workload, store: Store) -> float:
    """Median time of one token of the whole model without a plan, measured once."""
    key = _key(loaded, work, "dense decode", "dense")
    values = store.load_measurement(key)
    if values is None:
        values = {"median_ms": decode_ms(loaded.model, original, work.tokens.tokens[0])[1]}
        store.save_measurement(key, values)
    return float(values["median_ms"])


def _key(
    loaded: LoadedModel, work: Workload, kind: str, subject: str, **more: Any
) -> records.MeasurementKey:
    device = this_device(loaded.model.device)
    conditions = {
        "device": device.digest,
        "engine": decode_digest(device.kind, cache_catalog.KEEPERS.values()),
        "context": work.context,
        "dtype": str(loaded.model.dtype),
        **more,
    }
    return records.MeasurementKey(model_record(loaded), kind, subject, conditions)


def decode_costs(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    fitted: Mapping[int, Fitted],
    candidates: Sequence[Keeper],
    *,
    steps: int = STEPS // 2,
    advance: Advance = silent,
) -> LatencyFit:
    """The cost model of one generated token, in ms of this device.

    Args:
        candidates: keepers, of which the first keeps and reads everything.
        loaded, work, store, fitted, steps, advance: see `time_keepers`.
    """
    kv_heads = loaded.identity.kv_heads
    generator = np.random.default_rng(work.seed)
    rows = [(keeper,) * kv_heads for keeper in candidates]
    if kv_heads > 1:
        mixed = generator.integers(len(candidates), size=(MIXTURES, kv_heads)).tolist()
        rows += [tuple(candidates[c] for c in row) for row in mixed]
    timings = time_keepers(loaded, work, store, fitted, rows, steps=steps, advance=advance)
    # clocks drift: what is kept is the ratio to the baseline beside it, times a common baseline
    dense_ms = statistics.median(timing.dense_mean_ms for timing in timings)
    ms = np.array([timing.mean_ms / timing.dense_mean_ms * dense_ms for timing in timings])
    counts = np.array([[row.count(keeper) for keeper in candidates] for row in rows])
    token_ms = dense_token_ms(loaded, work, store)
    return fit_latency(
        counts,
        ms,
        rest_ms=max(token_ms - loaded.identity.layers * dense_ms, 0.0),
        names=[cache_catalog.key(keeper) for keeper in candidates],
        dynamic=[number > 0 for number in range(len(candidates))],
        holdout=np.array([len(set(row)) > 1 for row in rows]),
    )


class _Side:
    """A cache after the prompt, and what attention modules would call for each token more.

    Under keepers, under a plan that has none (no row), or without a plan (None).
    """

    def __init__(
        self,
        layers: Sequence[LayerCapture],
        row: tuple[Keeper, ...] | None,
        fitted: Mapping[int, Fitted],
    ) -> None:
        self.layers = layers
        self.cache: Any = DynamicCache()
        self.attention: Callable[..., Any] = sdpa_attention_forward
        group = layers[0].query.shape[1] // layers[0].key.shape[1]
        self.modules: list[Any] = [
            SimpleNamespace(is_causal=True, num_key_value_groups=group, layer_idx=i)
            for i in range(len(layers))
        ]
        self.running: Running | None = None
        if row:
            kept = {i: (row, fitted.get(layer.layer, {})) for i, layer in enumerate(layers)}
            convert(self.cache, kept)
        if row is not None:
            rows = (row,) * len(layers) if row else ()
            state = attention.ModelState.of([], {}, len(layers), rows)
            for i, module in enumerate(self.modules):
                setattr(module, attention.ATTRIBUTE, attention.LayerState(state, i))
            self.attention = attention.attention
            self.running = Running(state, weakref.ref(self.cache))
        token = RUNNING.set(self.running)
        for i, layer in enumerate(layers):
            self.cache.update(layer.key, layer.value, i)
            if row:
                self.cache.layers[i].settle(layer.query, layer.scale, None)
        RUNNING.reset(token)

    def step(self, number: int) -> Callable[[], None]:
        """The calls for one token more."""
        length = self.layers[0].key.shape[2]
        at = length - 1 - number % length
        tokens = [
            [t[:, :, at : at + 1].contiguous() for t in (layer.query, layer.key, layer.value)]
            for layer in self.layers
        ]

        @torch.no_grad()
        def run() -> None:
            token = RUNNING.set(self.running)
            for i, (query, key, value) in enumerate(tokens):
                keys, values = self.cache.update(key, value, i)
                scale = self.layers[i].scale
                self.attention(self.modules[i], query, keys, values, None, scaling=scale)
            RUNNING.reset(token)

        return run
