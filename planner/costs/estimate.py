"""What attention would cost on a GPU of which no timings exist: a model with a few constants.

    layer = launches + choosing keys + max(work, bytes / bandwidth)

`work` is how long the device is busy when the rows of a layer, longest first, go one by one to the
next free program slot: a row costs a constant and so much for every tile that it reads. A layer
whose heads are all dense goes to the vendor's kernel, at a share of the peak rate.

The constants were fitted to timings of one H200, `plans/h200-kernels.jsonl` (bfloat16, causal, 32
heads, 8 kv heads). Layers that choose nothing, or blocks, of 1,024 to 32,768 tokens are reproduced
within 10 %; at 131,072 they take up to 26 % longer than is said here. For other devices peak rates,
clocks and bandwidths are published ones, and the shares of them that kernels reach are assumed to
be those of the H200. Nothing here was measured on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan.costs.gpus import (
    GPUS,
    PRICES,
    Gpu,
    makespan,
    noise,
    programs_of,
    tile_work,
    tiles_of,
)
from attnplan.costs.prefill import DeviceCosts, fit_costs, rows_to_time, spell
from attnplan.kernels.compressors._clustered_chunks import ClusterCompressor
from attnplan.kernels.compressors._feature_map import FeatureMap
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.layer.layer_attention import can_prepare
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.models.load import LoadedModel
from attnplan.profiles.records.records import KernelTiming
from attnplan.search.latency import LatencyFit

CALIBRATED = GPUS["h200"]

SHARE = (0.459, 0.507)
"""Of the peak that full tiles reach with head_dim 64 and 128, all program slots at work."""
DENSE_SHARE, DENSE_START_US = (0.461, 0.591), 20.0
"""Of the peak that the vendor's dense kernel reaches (causal, half of the pairs counted), after a
start and before an end in which not all of the device is at work: short texts are all start."""
ROW_US = 5.0
"""A row of 64 queries beside its tiles: start, queries, output. In cycles the same everywhere."""
LAUNCH_US, HOST_LAUNCH_US = 3.0, 13.0
"""Of the device, and of the host, which is the slower one where little is to do: a tensor call of a
far field took 13 us on the H200 (22 layers of 43 to 685 calls)."""
BANDWIDTH = 4250.0 / CALIBRATED.memory_gb_s
"""Share of the peak bandwidth that a copy reaches."""
BLOCK_LAUNCHES, BLOCK_MACS = 6, 2.0e12
"""Choosing blocks by the score kernel: launches, and multiply-adds per second on an H200."""
TORCH_CALLS, TORCH_MACS = 30, 0.5e12
"""Choosing blocks by scores that torch computes: calls, and multiply-adds per second; assumed."""
CLUSTER_LAUNCHES, SUM_LAUNCHES, SLOT_CALLS = 3, 6, 6
"""Clustering by the kernel, sums of exponential features by kernels, and all slots besides."""
MATCHING_CALLS = 30
"""Scaling slots to the masses that reference queries find, assumed."""
GENERAL_MS, GROUP_CALLS = 4.4, 150
"""Whatever else chooses keys: the tile list of the layer, in which the host waits for the device
(the least of 22 layers that were made so on the H200, but for its calls), and the tensor calls of
every method, assumed."""


def static_costs(
    loaded: LoadedModel, context: int, candidates: tuple[Approximation, ...], device: Gpu
) -> DeviceCosts:
    """The cost model of a layer, fitted to estimated times in the place of measured ones.

    Args:
        loaded: the model.
        context: tokens of the prefill.
        candidates: the first is dense.
        device: to plan for.

    Raises:
        ValueError: the model computes in float32.
    """
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    if dtype == "float32":
        raise ValueError(
            f"times on {device.name} are estimated for 16-bit models: add --dtype bfloat16"
        )
    fit = static_fit(loaded.identity.prefill_shape(context), candidates, device, dtype)
    dense_ms = fit.model.dense_layer_ms * loaded.identity.layers
    return DeviceCosts(
        fit, dense_ms, device.identity, "static estimate", is_here=False, is_estimate=True
    )


def static_fit(
    shape: AttentionShape, candidates: tuple[Approximation, ...], device: Gpu, dtype: str
) -> LatencyFit:
    """The cost model of one layer, fitted as to a device's own timings."""
    rows = rows_to_time(candidates, shape.heads, seed=0)
    timed = {spell(row): _timing(row, shape, device, dtype) for row in rows}
    return fit_costs(timed, candidates, shape.heads, tile_work(candidates, shape, device))


def _timing(
    layer: Sequence[Approximation], shape: AttentionShape, device: Gpu, dtype: str
) -> KernelTiming:
    ms = layer_ms(layer, shape, device)
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.queries, shape.keys)
    return KernelTiming("static estimate", dtype, *sizes, spell(layer), ms, ms, ms, repeats=0)


def layer_ms(layer: Sequence[Approximation], shape: AttentionShape, device: Gpu) -> float:
    """Attention of one layer, the choice of keys included; one approximation per head."""
    if all(a.is_dense for a in layer):
        return dense_ms(shape, device)
    ready = [can_prepare([a]) for a in layer]
    sides = [
        [a for a, is_ready in zip(layer, ready, strict=True) if is_ready == side]
        for side in (True, False)
    ]
    return sum(
        kernel_ms(side, shape, device) + choice_ms(side, shape, device) for side in sides if side
    )


def dense_ms(shape: AttentionShape, device: Gpu) -> float:
    """The vendor's dense kernel."""
    macs = shape.dense_macs * shape.heads * shape.batch
    busy = 2e3 * macs / (device.tflops * 1e12 * _by_head_dim(DENSE_SHARE, shape.head_dim))
    start = min(cycles_ms(DENSE_START_US, device), busy)
    return cycles_ms(LAUNCH_US, device) + start + max(busy, _bytes_ms(shape, device))


def kernel_ms(layer: Sequence[Approximation], shape: AttentionShape, device: Gpu) -> float:
    """The attention kernel for given tiles."""
    programs = programs_of(shape.head_dim, device)
    slots = device.multiprocessors * programs
    prices = _tile_us(shape.head_dim, device) * PRICES
    start = 1e3 * cycles_ms(ROW_US, device)
    heads = [tiles_of(a, shape.queries, shape.keys, shape.head_dim) for a in layer]
    rows = np.concatenate(heads * shape.batch)
    longest_first = rows.sum(1).argsort(kind="stable")[::-1]
    costs = start + rows[longest_first] @ prices
    busy = makespan(costs.tolist(), slots) / 1e3
    return cycles_ms(LAUNCH_US, device) + max(busy, _bytes_ms(shape, device))


def choice_ms(layer: Sequence[Approximation], shape: AttentionShape, device: Gpu) -> float:
    """Choosing keys and making slots; heads that choose together share what is paid once."""
    is_prepared = can_prepare(layer)
    ms = 0.0 if is_prepared else GENERAL_MS
    groups: dict[str, list[Approximation]] = {}
    for a in layer:
        if not a.static:
            groups.setdefault(a.together, []).append(a)
    for members in groups.values():
        macs = shape.batch * sum(a.cost(shape).selection for a in members)
        once, rate = GROUP_CALLS * HOST_LAUNCH_US / 1e3, TORCH_MACS
        far = members[0].far
        if is_prepared and far is not None:
            calls, rate = _far_calls(far, shape.head_dim)
            once = calls * HOST_LAUNCH_US / 1e3
        elif is_prepared and "layer_scores" in vars(type(members[0].near)):
            once, rate = cycles_ms(BLOCK_LAUNCHES * LAUNCH_US, device), BLOCK_MACS
        elif is_prepared:
            once = TORCH_CALLS * HOST_LAUNCH_US / 1e3
        ms += once + 1e3 * macs / (rate * _general_speed(device))
    return ms


@cache
def _far_calls(far: Compressor, head_dim: int) -> tuple[int, float]:
    """What the host starts to make a far field, counted, and the rate of multiply-adds in it."""
    if isinstance(far, ClusterCompressor) and far.separable and head_dim <= 128:
        matching = MATCHING_CALLS if far.references else 0
        return CLUSTER_LAUNCHES + SLOT_CALLS + matching, BLOCK_MACS
    if isinstance(far, FeatureMap) and far.logarithmic:
        return SUM_LAUNCHES, BLOCK_MACS
    inputs = noise(4 * far.chunk, 4 * far.chunk, head_dim)
    # float64 is left to tensor calls, as on a device; float32 may be compiled for the CPU
    query, key, value = (t.double() for t in (inputs.query, inputs.key, inputs.value))
    inputs = replace(inputs, query=query, key=key, value=value)
    blocks = inputs.all_blocks
    floor = far.floor(inputs, blocks, 0)[:, None]
    chunks = int(far.chunks_before(inputs, floor).max())
    with torch.no_grad(), _Calls() as counted:
        slots = far.compress(inputs, chunks, (0,))
        far.part(inputs, blocks, floor, (0,), chunks)
    return counted.calls + (0 if slots is None else SLOT_CALLS), TORCH_MACS


class _Calls(TorchDispatchMode):
    """Counts tensor calls that start something on a device: all but views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def _tile_us(head_dim: int, device: Gpu) -> float:
    """A full tile in one of the program slots of a multiprocessor, all of them at work."""
    operations = 4 * BLOCK * BLOCK * head_dim
    rate = device.tflops * 1e6 * _by_head_dim(SHARE, head_dim) / device.multiprocessors
    return operations * programs_of(head_dim, device) / rate


def _by_head_dim(values: tuple[float, float], head_dim: int) -> float:
    return float(np.interp(head_dim, (64, 128), values))


def cycles_ms(us: float, device: Gpu) -> float:
    """What takes `us` at the clock of the H200, and as many cycles here."""
    return us * CALIBRATED.clock_mhz / device.clock_mhz / 1e3


def _bytes_ms(shape: AttentionShape, device: Gpu) -> float:
    """Queries, keys, values and outputs, in 16 bits, moved once."""
    rows = 2 * shape.heads * shape.queries + 2 * shape.kv_heads * shape.keys
    return 2e3 * shape.batch * rows * shape.head_dim / (device.memory_gb_s * 1e9 * BANDWIDTH)


def _general_speed(device: Gpu) -> float:
    """Of what runs outside tensor cores, over the H200: the slower of arithmetic and memory."""
    cycles = device.multiprocessors * device.clock_mhz
    arithmetic = cycles / (CALIBRATED.multiprocessors * CALIBRATED.clock_mhz)
    return min(arithmetic, device.memory_gb_s / CALIBRATED.memory_gb_s)
