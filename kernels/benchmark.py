"""Timing approximations on this device, index building included, against the best dense kernel.

Clocks of shared machines drift, so nothing is timed alone: every timing alternates with the dense
baseline, and what is kept is the median ratio times the baseline's own median. A kernel that
answers wrongly is not timed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplan.kernels.approximation import Approximation, Inputs
from attnplan.kernels.layer import LayerKernel


@dataclass(frozen=True)
class Timing:
    """How long something takes beside dense attention.

    Attributes:
        median_ms, q25_ms, q75_ms: of the ratio to the dense baseline, times its median.
        dense_ms: median of the baseline in the same interleaved run.
        repeats: pairs of runs.
    """

    median_ms: float
    q25_ms: float
    q75_ms: float
    dense_ms: float
    repeats: int


def dense_attention(inputs: Inputs) -> Tensor:
    """The dense baseline: torch's fused causal attention, with its choice of backend."""
    return torch.nn.functional.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=True,
        scale=inputs.scale,
        enable_gqa=inputs.group > 1,
    )


def measure_layer(
    inputs: Inputs,
    assignment: Sequence[Approximation],
    *,
    repeats: int = 5,
    check: bool = True,
) -> Timing:
    """Time one layer's attention under an assignment, interleaved with the dense baseline.

    Args:
        inputs: all heads of a layer, a whole prompt (queries == keys), tensors of real text.
        assignment: one approximation per head.
        repeats: pairs of timed runs, after one pair of warm-up runs.
        check: compare an all-dense head's output with the baseline first.

    Raises:
        ValueError: the kernel's dense heads do not give what dense attention gives.
    """
    kernel = LayerKernel(tuple(assignment), inputs.fitted)

    def run() -> Tensor:
        return kernel(
            inputs.query, inputs.key, inputs.value, scale=inputs.scale, start=inputs.start
        )

    if kernel.is_dense:
        return interleaved(
            lambda: dense_attention(inputs), lambda: dense_attention(inputs), repeats
        )
    output, exact = run(), dense_attention(inputs)
    if check:
        _check(output, exact, assignment)
    return interleaved(run, lambda: dense_attention(inputs), repeats)


def interleaved(
    run: Callable[[], object],
    baseline: Callable[[], object],
    repeats: int,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Timing:
    """Time `run` and `baseline` in turn, after one warm-up run of each.

    `run` is called inside `context()`, whose entering and leaving are not timed.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    with context():
        run()
    baseline()
    times, bases = [], []
    for _ in range(repeats):
        bases.append(timed(baseline))
        with context():
            times.append(timed(run))
    dense_ms = statistics.median(bases)
    ratios = sorted(t / b for t, b in zip(times, bases, strict=True))
    low, middle, high = (quantile(ratios, q) * dense_ms for q in (0.25, 0.5, 0.75))
    return Timing(middle, low, high, dense_ms, repeats)


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of `run`, after one call that warms up."""
    run()
    return statistics.median(timed(run) for _ in range(repeats))


def timed(run: Callable[[], object]) -> float:
    """Time of one call in ms, with all that it starts on a GPU."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else None
    if synchronize is not None:
        synchronize()
    begin = time.perf_counter()
    run()
    if synchronize is not None:
        synchronize()
    return (time.perf_counter() - begin) * 1e3


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation in a sorted sequence."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _check(output: Tensor, exact: Tensor, assignment: Sequence[Approximation]) -> None:
    if not bool(output.isfinite().all()):
        raise ValueError(f"the engine gave numbers that are not finite for {assignment[0]}")
    heads = [h for h, a in enumerate(assignment) if a.is_dense]
    if heads:
        wrong = (output[:, heads].float() - exact[:, heads].float()).norm()
        if float(wrong / exact[:, heads].float().norm()) > 4 * torch.finfo(output.dtype).eps ** 0.5:
            raise ValueError("the engine's dense heads do not give what dense attention gives")
