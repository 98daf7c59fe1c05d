"""Timing approximations on this device, index building included, against the best dense kernel.

Clocks of shared machines drift, so nothing is timed alone: every timing alternates with the dense
baseline, and what is kept is the median ratio times the baseline's own median. A kernel that
answers wrongly is not timed. Layers on a GPU are timed by its own clock (`gpu_clock`), what the
host does beside it apart; whole models everywhere by the host's.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnplan.kernels.bench.dense_backends import OWN_CHOICE, best_dense, dense_attention
from attnplan.kernels.bench.gpu_clock import GpuClock
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands.inputs import Inputs

MOST_REPEATS = 50
REPEATED_MS = 500.0
"""On a GPU, pairs of runs are repeated for about so long, at most so often."""
SLOW_MS = 100.0
"""A pair of runs for which the host hardly counts."""


@dataclass(frozen=True)
class Timing:
    """How long something takes beside dense attention.

    Attributes:
        median_ms, q25_ms, q75_ms: of the ratio to the dense baseline, times its median; on a GPU
            with cold caches.
        dense_ms: median of the baseline in the same interleaved run.
        repeats: pairs of runs.
        dense_backend: which dense kernel the baseline is; 'sdpa' is torch's own choice.
        warm_ms: median right after the same call; None where caches are as they are.
        host_us: median until a call returns to the host, on an idle device; None on a CPU.
    """

    median_ms: float
    q25_ms: float
    q75_ms: float
    dense_ms: float
    repeats: int
    dense_backend: str = OWN_CHOICE
    warm_ms: float | None = None
    host_us: float | None = None


class WrongKernel(ValueError):
    """A kernel does not compute what it should, so it is not timed."""


def measure_layer(
    inputs: Inputs,
    assignment: Sequence[Approximation],
    *,
    repeats: int = 5,
    check: bool = True,
    force: bool = False,
    flex: bool = False,
) -> Timing:
    """Time one layer's attention under an assignment, interleaved with the best dense kernel.

    A layer whose heads are all dense is timed as models run it, by torch's own choice of backend.

    Args:
        inputs: all heads of a layer, a whole prompt (queries == keys), tensors of real text.
        assignment: one approximation per head.
        repeats: pairs of timed runs, at least, after runs that warm up.
        check: compare an all-dense head's output with the baseline first.
        force: time the engine also where all heads are dense.
        flex: let compiled FlexAttention compete as the baseline; compiling takes long.

    Raises:
        WrongKernel: the kernel's dense heads do not give what dense attention gives.
    """
    kernel = LayerKernel(tuple(assignment), inputs.fitted)
    if kernel.is_dense and not force:
        return measure_call(lambda: dense_attention(inputs), inputs, repeats=repeats, flex=flex)
    kernel.is_dense = False

    def run() -> Tensor:
        return kernel(
            inputs.query, inputs.key, inputs.value, scale=inputs.scale, start=inputs.start
        )

    if check:
        _check(run(), best_dense(inputs, flex=flex).attention(inputs), assignment)
    return measure_call(run, inputs, repeats=repeats, flex=flex)


def measure_call(
    run: Callable[[], object], inputs: Inputs, *, repeats: int = 5, flex: bool = False
) -> Timing:
    """Time anything, interleaved with the best dense kernel on some inputs.

    Args:
        run: what to time, on the device of `inputs`.
        inputs: what the baseline is given.
        repeats, flex: see `measure_layer`.
    """
    backend = best_dense(inputs, flex=flex)
    device = inputs.query.device

    def baseline() -> Tensor:
        return backend.attention(inputs)

    if device.type != "cuda":
        return interleaved(run, baseline, repeats)
    for call in (run, baseline):
        call()
    pair_ms = timed(run) + timed(baseline)
    repeats = max(repeats, min(MOST_REPEATS, int(REPEATED_MS / pair_ms)))
    few = 2 if pair_ms > SLOW_MS else 10
    clock = GpuClock(device)
    host_us = [clock.host_us(call, few) for call in (run, baseline)]
    times, bases = clock.cold([run, baseline], repeats, host_us)
    return replace(
        _of_pairs(times, bases),
        dense_backend=backend.name,
        warm_ms=statistics.median(clock.warm(run, few, host_us[0])),
        host_us=host_us[0],
    )


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
    return _of_pairs(times, bases)


def _of_pairs(times: Sequence[float], bases: Sequence[float]) -> Timing:
    """What pairs of runs, in ms, say together."""
    dense_ms = statistics.median(bases)
    ratios = sorted(t / b for t, b in zip(times, bases, strict=True))
    low, middle, high = (quantile(ratios, q) * dense_ms for q in (0.25, 0.5, 0.75))
    return Timing(middle, low, high, dense_ms, len(ratios))


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
        raise WrongKernel(f"the engine gave numbers that are not finite for {assignment[0]}")
    heads = [h for h, a in enumerate(assignment) if a.is_dense]
    if heads:
        wrong = (output[:, heads].float() - exact[:, heads].float()).norm()
        # two roundings of each; a baseline in float32 may multiply in TF32
        allowed = max(4 * torch.finfo(output.dtype).eps, 2e-3)
        if float(wrong / exact[:, heads].float().norm()) > allowed:
            raise WrongKernel("the engine's dense heads do not give what dense attention gives")
