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

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from attnplan.kernels import catalog
from attnplan.kernels.approximation import (
    Approximation,
    AttentionShape,
    Compressor,
    Inputs,
    Moments,
)
from attnplan.kernels.cluster_chunks import ClusterCompressor
from attnplan.kernels.feature_map import FeatureMap
from attnplan.kernels.layer import can_prepare
from attnplan.kernels.tile_list import BLOCK, CONTIGUOUS, FULL
from attnplan.models import LoadedModel
from attnplan.profiles.records import DeviceIdentity, KernelTiming
from attnplan.search.latency import LatencyFit
from attnplan.timing import DeviceCosts, fit_costs, rows_to_time, spell

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gpu:
    """What its maker says, and how many programs of the kernel a multiprocessor holds.

    Attributes:
        name: for people.
        multiprocessors: that are enabled.
        tflops: dense bfloat16 peak of the tensor cores.
        memory_gb_s: peak bandwidth of the memory.
        clock_mhz: boost clock that the peak is stated for.
        programs: of head_dim 64 and 128 that are resident on a multiprocessor.
    """

    name: str
    multiprocessors: int
    tflops: float
    memory_gb_s: float
    clock_mhz: float
    programs: tuple[int, int]

    @property
    def identity(self) -> DeviceIdentity:
        """Of a device that nobody timed: never that of a real one."""
        return DeviceIdentity(f"{self.name} (static estimate)", "cuda", "", 0, {})


# Sources: A100, https://glennklockwood.com/garden/processors/A100, its clock
# https://www.thundercompute.com/blog/nvidia-a100-specs-full-guide; H100, the first site's page
# H100, and the same chip in the H200, whose memory is that of
# https://openmetal.io/resources/blog/how-the-h200-is-built-for-memory-bound-ai-workloads/; B200
# and L40S (its peak there is 366), https://hmc-tech.com/gpu/nvidia-b200-vs-nvidia-l40s. These are
# not NVIDIA's own pages. Peaks are without sparsity; clocks are those that the peaks are stated
# for.
# Programs: measured on sm_90; elsewhere by shared memory, 16 KB (head_dim 64) or 32 KB (128) per
# stage, of 164 KB (A100), 228 KB (B200), 100 KB (L40S).
GPUS = {
    "a100": Gpu("NVIDIA A100 SXM 80GB", 108, 312.0, 2039.0, 1410.0, (3, 1)),
    "h100": Gpu("NVIDIA H100 SXM 80GB", 132, 989.4, 3350.0, 1830.0, (5, 2)),
    "h200": Gpu("NVIDIA H200 SXM", 132, 989.4, 4800.0, 1830.0, (5, 2)),
    "b200": Gpu("NVIDIA B200", 148, 2250.0, 7700.0, 1860.0, (5, 2)),
    "l40s": Gpu("NVIDIA L40S", 142, 362.0, 864.0, 2520.0, (2, 1)),
}
CALIBRATED = GPUS["h200"]

SHARE = (0.459, 0.507)
"""Of the peak that full tiles reach with head_dim 64 and 128, all program slots at work."""
DENSE_SHARE, DENSE_START_US = (0.461, 0.591), 20.0
"""Of the peak that the vendor's dense kernel reaches (causal, half of the pairs counted), after a
start and before an end in which not all of the device is at work: short texts are all start."""
ROW_US = 5.0
"""A row of 64 queries beside its tiles: start, queries, output. In cycles the same everywhere."""
MASKED, GATHERED, SLOT = 1.5, 2.5, 2.0
"""Cost of a tile over that of a full one. The first is measured; the others are assumed: a gather
copies row by row, a tile of slots reads weights too."""
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
CHAIN_MS = 7.0
"""Whatever else chooses keys or sums over them: chains of tensor calls that wait for each other.
With the multiply-adds at the same rate, that is half to twice what 22 layers took on the H200 whose
far fields were chains then (5 to 15 ms, `plans/h200-smollm2-8192.jsonl`); a wait for the host, it
is the same on every device."""

SAMPLED = 64
"""Query blocks whose tiles are counted; between them counts are interpolated."""


def gpu(name: str) -> Gpu:
    """A device that the model knows.

    Raises:
        ValueError: it knows no such device.
    """
    if name.lower() not in GPUS:
        raise ValueError(
            f"{name}: no file, and no device that times can be estimated for (those are "
            f"{', '.join(GPUS)}); a file is what `attnplan bench MODEL --context N --export FILE` "
            "wrote on the device"
        )
    return GPUS[name.lower()]


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
    return fit_costs(timed, candidates, shape.heads)


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
    return kernel_ms(layer, shape, device) + choice_ms(layer, shape, device)


def dense_ms(shape: AttentionShape, device: Gpu) -> float:
    """The vendor's dense kernel."""
    macs = shape.dense_macs * shape.heads * shape.batch
    busy = 2e3 * macs / (device.tflops * 1e12 * _by_head_dim(DENSE_SHARE, shape.head_dim))
    start = min(cycles_ms(DENSE_START_US, device), busy)
    return cycles_ms(LAUNCH_US, device) + start + max(busy, _bytes_ms(shape, device))


def kernel_ms(layer: Sequence[Approximation], shape: AttentionShape, device: Gpu) -> float:
    """The attention kernel for given tiles."""
    programs = _programs(shape.head_dim, device)
    slots = device.multiprocessors * programs
    prices = _tile_us(shape.head_dim, device) * np.array([1.0, MASKED, GATHERED, SLOT])
    start = 1e3 * cycles_ms(ROW_US, device)
    heads = [tiles_of(a, shape.queries, shape.keys, shape.head_dim) for a in layer]
    rows = np.concatenate(heads * shape.batch)
    longest_first = rows.sum(1).argsort(kind="stable")[::-1]
    costs = start + rows[longest_first] @ prices
    busy = makespan(costs.tolist(), slots) / 1e3
    return cycles_ms(LAUNCH_US, device) + max(busy, _bytes_ms(shape, device))


def choice_ms(layer: Sequence[Approximation], shape: AttentionShape, device: Gpu) -> float:
    """Choosing keys and making slots; heads that choose together share what is paid once."""
    ms = 0.0
    is_prepared = can_prepare(layer)
    groups: dict[str, list[Approximation]] = {}
    for a in layer:
        if not a.static:
            groups.setdefault(a.together, []).append(a)
    for members in groups.values():
        macs = shape.batch * sum(a.cost(shape).selection for a in members)
        once, rate = CHAIN_MS, TORCH_MACS
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
        return CLUSTER_LAUNCHES + SLOT_CALLS, BLOCK_MACS
    if isinstance(far, FeatureMap) and far.logarithmic:
        return SUM_LAUNCHES, BLOCK_MACS
    inputs = _noise(4 * far.chunk, 4 * far.chunk, head_dim)
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


def makespan(costs: Sequence[float], slots: int) -> float:
    """When the last of some rows is done, each begun in order by the slot that is free first."""
    free = [0.0] * min(slots, max(len(costs), 1))
    last = 0.0
    for cost in costs:
        done = free[0] + cost
        heapq.heapreplace(free, done)
        last = max(last, done)
    return last


@lru_cache(maxsize=4096)
def tiles_of(approximation: Approximation, queries: int, keys: int, head_dim: int) -> Floats:
    """Full, masked, gathered and slot tiles of every query block of one head, [blocks, 4].

    Where they depend on the content, they are those of white noise: keys that differ from query to
    query, so that blocks of queries share few of them.
    """
    blocks = -(-queries // BLOCK)
    sampled = torch.linspace(0, blocks - 1, min(blocks, SAMPLED)).round().long()
    inputs = _noise(queries, keys, head_dim)
    tiles, _ = approximation.tiles(inputs, sampled)
    kind, _, mask = tiles.tiles.unbind(1)
    loop = torch.where(kind == CONTIGUOUS, (mask != FULL).int(), kind + 1)
    row = torch.repeat_interleave(torch.arange(tiles.rows), tiles.offsets.long().diff())
    counts = torch.bincount(row * 4 + loop, minlength=4 * tiles.rows).view(-1, 4).numpy()
    at = np.arange(blocks)
    columns = [np.interp(at, sampled.numpy(), column) for column in counts.T.astype(np.float64)]
    return np.stack(columns, axis=1)


@lru_cache(maxsize=4)
def _noise(queries: int, keys: int, head_dim: int) -> Inputs:
    """One head of white noise and what methods fit to it."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, queries, head_dim, generator=generator)
    key, value = (torch.randn(1, 1, keys, head_dim, generator=generator) for _ in range(2))
    scale = head_dim**-0.5
    return Inputs.of_layer(query, key, value, scale=scale, fitted=_fitted(head_dim))


@cache
def _fitted(head_dim: int) -> dict[str, torch.Tensor]:
    mean, gram = torch.zeros(1, head_dim), torch.eye(head_dim)[None]
    return catalog.fit(Moments(mean, gram, mean, gram))


def _programs(head_dim: int, device: Gpu) -> int:
    return 1 if head_dim > 128 else device.programs[head_dim > 64]


def _tile_us(head_dim: int, device: Gpu) -> float:
    """A full tile in one of the program slots of a multiprocessor, all of them at work."""
    operations = 4 * BLOCK * BLOCK * head_dim
    rate = device.tflops * 1e6 * _by_head_dim(SHARE, head_dim) / device.multiprocessors
    return operations * _programs(head_dim, device) / rate


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
