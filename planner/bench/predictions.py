"""What the static model predicts for every figure that a GPU run measures: docs/gpu-predictions.md.

    python -c 'from attnplan.bench.predictions import page; print(page(), end=str())'

Written down before a run, so that the run confirms or refutes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnplan.bench.rows import MIXED_DENSITY, at_density, efficiency, pairs, parse
from attnplan.bench.sweep import METHODS as SWEPT
from attnplan.bench.sweep import NARROW
from attnplan.costs.estimate import (
    BANDWIDTH,
    HOST_LAUNCH_US,
    LAUNCH_US,
    choice_ms,
    cycles_ms,
    dense_ms,
    kernel_ms,
    layer_ms,
    static_fit,
)
from attnplan.costs.gpus import GPUS, Gpu
from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.search.candidates import candidates, parse_methods

_DENSE, _WINDOW, _BLOCKS = "dense()", "window(window=1024, sinks=4)", "block_topk(top=12, local=2)"
_MIX = (_DENSE, "window(window=512, sinks=4)", _BLOCKS, "window(window=128, sinks=4)")
_KINDS = (_DENSE, *SWEPT, NARROW)
_DENSE_TOO = ("", ", dense")
METHODS = "window,block_topk,antidiagonal,centroid_t,multipole,attention_matching,performer"
"""Of the end-to-end steps of a GPU run (`tests/gpu.py`)."""
HOST_CALL_MS, HOST_SDPA_CALL_MS = 0.06, 0.015
"""Until a layer call has returned, as on an H200: of static heads 50 to 60 us."""
HOST_DECODE_MS, HOST_SDPA_MS = 0.055, 0.065
"""Of a generated token and a layer: ours without launches takes 35 to 40 us on a CPU and two
launches are 6 us each; the other was measured on an H200."""
PARAMETERS, LAYERS, GEMM_SHARE, HOST_LAYER_MS = 134.5e6, 30, 0.4, 0.4
"""Of SmolLM2-135M; share of the peak of its products, and host time of an eager layer, assumed."""

LENGTHS = (4096, 8192, 32768, 131072)
DENSITIES = (1.0, 0.5, 0.25, 0.1)
PATTERNS = ("window(window=?, sinks=4)", "block_topk(top=?, local=2)")
LONGEST = 131072


def efficiency_row(device: Gpu, pattern: str, head_dim: int, target: float) -> list[str]:
    """Efficiency by length: speed-up over the dense kernel times density, 1 at best.

    Args:
        device: to predict for.
        pattern: of all 32 heads, as `kernel_rows.at_density` takes it.
        head_dim: of 32 heads and 8 kv heads.
        target: density.
    """
    cells = []
    for length in LENGTHS:
        shape = AttentionShape(1, 32, 8, length, length, head_dim)
        approximation = at_density(pattern, shape, target)
        ms = kernel_ms([approximation] * 32, shape, device)
        ms += choice_ms([approximation] * 32, shape, device)
        eta = efficiency(dense_ms(shape, device), approximation.density(shape), ms)
        cells.append(f"{eta:.2f} ({ms:.3g} ms)")
    return [device.name, pattern.split("(")[0], str(head_dim), f"{target:.0%}", *cells]


def mixed_row(device: Gpu, head_dim: int, length: int) -> list[str]:
    """The sweep's layer of four kinds, 8 heads each, in one launch and otherwise, in ms."""
    shape = AttentionShape(1, 32, 8, length, length, head_dim)
    part, one = replace(shape, heads=8, kv_heads=2), replace(shape, heads=1, kv_heads=1)
    kinds = [at_density(m, shape, MIXED_DENSITY) if "?" in m else parse(m) for m in _KINDS]
    mixed = kernel_ms([a for a in kinds for _ in range(8)], shape, device)
    mixed += choice_ms([a for a in kinds for _ in range(8)], shape, device)
    balanced = sum(_by_kernel(a, shape, device) for a in kinds) / len(kinds)
    parts = sum(_by_kernel(a, part, device) for a in kinds)
    alone = sum(8 * max(_by_kernel(a, one, device), HOST_CALL_MS) for a in kinds)
    times = [f"{ms:.3g}" for ms in (mixed, balanced, parts, alone)]
    return [device.name, str(head_dim), f"{length:,}", *times]


def _by_kernel(approximation: Approximation, shape: AttentionShape, device: Gpu) -> float:
    layer = [approximation] * shape.heads
    return kernel_ms(layer, shape, device) + choice_ms(layer, shape, device)


def far_row(device: Gpu, name: str) -> list[str]:
    """A layer of 32 heads with a far field, by length: ms, and those of dense attention."""
    cells = []
    for length in LENGTHS[1:3]:
        shape = AttentionShape(1, 32, 8, length, length, 64)
        found = next(a for a in pairs(shape) if a.far is not None and a.far.name == name)
        cells.append(f"{layer_ms([found] * 32, shape, device):.3g}")
        cells.append(f"{dense_ms(shape, device):.3g}")
    return [device.name, f"`{catalog.key(found)}`", *cells]


def decode_row(device: Gpu, length: int, head_dim: int, kept: int) -> list[str]:
    """A generated token, one layer of 32 heads and 8 kv heads in bfloat16: ms.

    Both sides wait for the host or for the memory: ours reads the rows that are kept, and
    DynamicCache copies all and reads them.
    """
    row = 8 * 2 * head_dim * 2
    moved = [n * row / (device.memory_gb_s * 1e6 * BANDWIDTH) for n in (kept, 3 * length)]
    ours = max(HOST_DECODE_MS, moved[0] + 2 * cycles_ms(LAUNCH_US, device))
    theirs = max(HOST_SDPA_MS, moved[1] + 3 * cycles_ms(LAUNCH_US, device))
    cells = [f"{length:,}", str(head_dim), f"{kept:,}", f"{ours:.2g}", f"{theirs:.2g}"]
    return [device.name, *cells]


def fit_row(device: Gpu, length: int) -> list[str]:
    """Error of the latency model on mixtures that it is not fitted to, SmolLM2-135M's layers."""
    shape = AttentionShape(1, 9, 3, length, length, 64)
    fit = static_fit(shape, candidates(shape, parse_methods(METHODS)), device, "bfloat16")
    return [device.name, f"{length:,}", str(len(fit.errors)), f"{fit.mape:.1%}"]


def prefill_row(device: Gpu, length: int) -> list[str]:
    """A prefill of SmolLM2-135M in bfloat16, dense and with windows at a quarter of the work."""
    shape = AttentionShape(1, 9, 3, length, length, 64)
    window = at_density(PATTERNS[0], shape, 0.25)
    rest = 2e3 * PARAMETERS * length / (device.tflops * 1e12 * GEMM_SHARE)
    busy = [rest + LAYERS * layer_ms([a] * 9, shape, device) for a in (catalog.DENSE, window)]
    host = [LAYERS * (HOST_LAYER_MS + more) for more in (0.0, HOST_CALL_MS - HOST_SDPA_CALL_MS)]
    dense, planned = (max(pair) for pair in zip(busy, host, strict=True))
    cells = [*(f"{ms:.3g}" for ms in (*busy, *host)), f"{dense / planned:.2f}"]
    return [device.name, f"{length:,}", *cells]


def crossover(device: Gpu, approximation: Approximation, head_dim: int) -> int | None:
    """The shortest text, in multiples of 64, from which a layer is faster than dense.

    None where that is longer than 131,072 tokens.
    """

    def is_faster(blocks: int) -> bool:
        shape = AttentionShape(1, 32, 8, blocks * BLOCK, blocks * BLOCK, head_dim)
        layer = [approximation] * 32
        return layer_ms(layer, shape, device) < dense_ms(shape, device)

    low, high = 1, LONGEST // BLOCK
    if not is_faster(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_faster(middle) else (middle + 1, high)
    return low * BLOCK


def page() -> str:
    """docs/gpu-predictions.md."""
    devices = [GPUS["h100"], GPUS["h200"]]
    etas = [
        efficiency_row(device, pattern, head_dim, target)
        for device in devices
        for head_dim in (64, 128)
        for pattern in PATTERNS
        for target in DENSITIES
    ]
    mixed = [
        mixed_row(device, head_dim, length)
        for device in devices
        for head_dim in (64, 128)
        for length in (8192, 32768)
    ]
    names = [a.far.name for a in pairs(AttentionShape(1, 32, 8, 8192, 8192, 64)) if a.far]
    fars = [far_row(device, name) for device in devices for name in names]
    tokens = [
        decode_row(device, 8192, head_dim, kept)
        for device in devices
        for head_dim in (64, 128)
        for kept in (8192, 1024)
    ]
    fits = [fit_row(device, length) for device in devices for length in (4096, 8192)]
    prefills = [prefill_row(device, length) for device in devices for length in (4096, 8192)]
    fixed = (_WINDOW, _MIX[1], _BLOCKS, _MIX[3])
    crossovers = []
    for device in devices:
        for line in fixed:
            first = [crossover(device, parse(line), head_dim) for head_dim in (64, 128)]
            shown = [f"above {LONGEST:,}" if n is None else f"{n:,}" for n in first]
            crossovers.append([device.name, f"`{line}`", *shown])
    lengths = [f"{length:,} tokens" for length in LENGTHS]
    return "\n\n".join(
        [
            "# What a static model predicts on GPUs",
            "Nothing on this page was measured. It is printed by `python -c 'from "
            "attnplan.bench.predictions import page; print(page(), end=str())'`: the "
            "estimates that `attnplan search --target h100` plans with, for bfloat16, causal, "
            "batch 1, 32 heads "
            "and 8 kv heads. The constants of the model reproduce timings of one H200 at 1,024 to "
            "32,768 tokens (`docs/gpu-h200.md`) within 12 %; at 131,072, where caches are too "
            "small, layers take up to 26 % longer than it says. The H100 is an extrapolation. The "
            "model knows nothing of caches, of clocks under load, or of the time that the host "
            "takes to start a kernel.",
            "## Efficiency",
            "Dense time times density over time, and the time of a layer: 1 means that time falls "
            "as work does. Dense is the vendor's kernel. Heads of block top-k pay for the choice.",
            _table(["device", "method", "head_dim", "density", *lengths], etas),
            "## A layer of several kinds",
            "Eight heads each of " + ", ".join(f"`{line}`" for line in _KINDS) + f" (? for a "
            f"density of {MIXED_DENSITY:.0%}), ms. Balanced: the mean of whole layers of each "
            "kind, what one launch takes if nothing is lost by mixing. Its parts, and single "
            f"heads, are launches of their own; the host takes {HOST_CALL_MS:g} ms for each.",
            _table(
                [
                    *("device", "head_dim", "tokens"),
                    *("one launch", "balanced", "sum of parts", "head by head"),
                ],
                mixed,
            ),
            "## Far fields",
            "32 heads of 64, 8 kv heads, ms; dense beside it. What is not computed by kernels is a "
            f"chain of tensor calls, {HOST_LAUNCH_US:g} us of the host each: counted, not timed.",
            _table(
                ["device", "pair", *(f"{n:,} tokens{m}" for n in LENGTHS[1:3] for m in _DENSE_TOO)],
                fars,
            ),
            "## A generated token",
            "One layer, ms. The host is the limit on both sides.",
            _table(["device", "tokens", "head_dim", "rows kept", "plan", "dense"], tokens),
            "## Latency model",
            "Fitted to the estimates of single methods (" + METHODS.replace(",", ", ") + "), and "
            "held against those of mixtures: what the form of the model costs. Timings of a real "
            "device scatter besides.",
            _table(["device", "tokens", "mixtures", "mean error"], fits),
            "## Prefill of SmolLM2-135M",
            f"Eager, ms: the device, and the host at {HOST_LAYER_MS:g} ms per layer; the slower "
            "one counts. The plan has windows at a quarter of the work in all heads. A model this "
            "small keeps an H100 waiting, so there is next to nothing to gain at these lengths.",
            _table(
                [
                    *("device", "tokens", "device, dense", "device, plan"),
                    *("host, dense", "host, plan", "speed-up"),
                ],
                prefills,
            ),
            "## Errors",
            "Against the reference in float64 over the same keys, relative to its norm: 1e-3 to "
            "2e-3 in bfloat16, 1.5e-4 to 3e-4 in float16, below 2e-6 in float32: roundings of "
            "weights and of the output, which the interpreter shows as well.",
            "## Crossover",
            "The shortest text from which a layer whose heads are all of one method is faster than "
            "dense.",
            _table(["device", "method", "head_dim 64", "head_dim 128"], crossovers) + "\n",
        ]
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
