"""GPUs that are known, and how their program slots are filled by the rows of a layer.

A row of 64 queries is a program of the kernel; so many of them are resident on a multiprocessor.
The rows of a layer, longest first, go one by one to the next free slot.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK, CONTIGUOUS, FULL, SLOTS
from attnplan.profiles.records.records import DeviceIdentity

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
MASKED, GATHERED, SLOT = 1.5, 2.5, 2.0
"""Cost of a tile over that of a full one. The first is measured; the others are assumed: a gather
copies row by row, a tile of slots reads weights too."""
PRICES = np.array([1.0, MASKED, GATHERED, SLOT])
ROW_TILES = 2.0
"""What a row costs beside its tiles, in full tiles: 5 us on an H200, where a tile takes 2 to 4."""
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


def named(device: DeviceIdentity) -> Gpu | None:
    """The known GPU whose model is in a device's name."""
    words = device.name.upper().replace("-", " ").split()
    return next((g for name, g in GPUS.items() if name.upper() in words), None)


def programs_of(head_dim: int, device: Gpu) -> int:
    """Programs of the kernel that are resident on a multiprocessor."""
    return 1 if head_dim > 128 else device.programs[head_dim > 64]


@dataclass(frozen=True, eq=False)
class TileWork:
    """What the rows of one head cost, by candidate, in tiles of a program slot.

    Attributes:
        work: float64 [candidates], all rows over the slots of the device: heads add up.
        path: float64 [candidates], the longest row: no layer is done before it.
    """

    work: Floats
    path: Floats


def tile_work(candidates: Sequence[Approximation], shape: AttentionShape, device: Gpu) -> TileWork:
    """The work of a head and its longest row, from the tiles that candidates read."""
    slots = device.multiprocessors * programs_of(shape.head_dim, device)
    rows = [
        ROW_TILES + tiles_of(a, shape.queries, shape.keys, shape.head_dim) @ PRICES
        for a in candidates
    ]
    work = np.array([shape.batch * row.sum() / slots for row in rows])
    return TileWork(work, np.array([row.max() for row in rows]))


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
    inputs = noise(queries, keys, head_dim)
    tiles, _ = approximation.tiles(inputs, sampled)
    kind, _, mask = tiles.tiles.unbind(1)
    others = torch.where(kind == SLOTS, 3, 2)  # keys that leave their slots are gathered too
    loop = torch.where(kind == CONTIGUOUS, (mask != FULL).int(), others)
    row = torch.repeat_interleave(torch.arange(tiles.rows), tiles.offsets.long().diff())
    counts = torch.bincount(row * 4 + loop, minlength=4 * tiles.rows).view(-1, 4).numpy()
    at = np.arange(blocks)
    columns = [np.interp(at, sampled.numpy(), column) for column in counts.T.astype(np.float64)]
    return np.stack(columns, axis=1)


@lru_cache(maxsize=4)
def noise(queries: int, keys: int, head_dim: int) -> Inputs:
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
