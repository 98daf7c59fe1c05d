"""Timings: what they are held against, and a GPU's clock on a stand-in for the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import attention
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from attnplan.kernels import catalog
from attnplan.kernels.bench import dense_backends, measure
from attnplan.kernels.bench.dense_backends import DenseBackend, dense_attention
from attnplan.kernels.bench.gpu_clock import GpuClock
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.selectors.window import Window

CPU = torch.device("cpu")
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def inputs() -> Inputs:
    return attention.text(200, dtype=torch.float32)


class Device:
    """A device that needs as long for a call as the test says: it stands still otherwise."""

    def __init__(self) -> None:
        self.ms = 0.0
        self.waits = 0

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        found = SimpleNamespace()

        def record() -> None:
            found.at = self.ms

        found.record = record
        found.elapsed_time = lambda other: other.at - found.at
        return found

    def synchronize(self, device: object = None) -> None:
        self.waits += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    properties = SimpleNamespace(L2_cache_size=16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    yield device


def call(device: Device, times: Iterator[float]) -> object:
    def run() -> None:
        device.ms += next(times)

    return run


def test_cold_calls_take_turns_and_are_waited_for_once(device: Device) -> None:
    clock = GpuClock(CPU)
    order: list[str] = []

    def run() -> None:
        order.append("run")
        device.ms += 3.0

    def base() -> None:
        order.append("base")
        device.ms += 2.0

    before = device.waits
    assert clock.cold([run, base], 4, [20.0, 20.0]) == [[3.0] * 4, [2.0] * 4]
    assert order == ["run", "base"] * 4
    assert device.waits == before + 1


def test_caches_are_overwritten_before_each_cold_call_alone(device: Device) -> None:
    clock = GpuClock(CPU)
    seen: list[int] = []
    clock._flush = lambda times: seen.append(times)  # type: ignore[method-assign]
    clock.cold([lambda: None, lambda: None], 2, [20.0, 20.0])
    assert len(seen) == 4 and min(seen) >= 1
    seen.clear()
    clock.warm(lambda: None, 2, 20.0)
    assert seen[1::2] == [0, 0] and min(seen[::2]) >= 2


def test_a_warm_time_is_that_of_the_second_call(device: Device) -> None:
    clock = GpuClock(CPU)
    times = itertools.cycle([5.0, 1.0])
    assert clock.warm(call(device, times), 3, 20.0) == [1.0] * 3  # type: ignore[arg-type]


def test_the_host_is_ahead_of_the_device(device: Device) -> None:
    clock = GpuClock(CPU)
    clock._flush_ms = 0.05
    assert clock._waits(1.0) == 1
    assert clock._waits(200.0) * clock._flush_ms >= 0.3
    assert clock._waits(1e9) == 64


def test_the_fastest_backend_that_runs_is_the_baseline(
    device: Device, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(name: str, ms: float) -> DenseBackend:
        def attend(_: Inputs) -> Tensor:
            if ms < 0:
                raise RuntimeError("no available kernel")
            device.ms += ms
            return _.query

        return DenseBackend(name, attend)

    def candidates(flex: bool) -> list[list[DenseBackend]]:
        return [
            [needs("slow", 3.0)],
            [needs("broken", -1.0), needs("expanded", 2.0)],
            [needs("never", -1.0)],
            [needs("flex", 1.0)] if flex else [],
        ]

    monkeypatch.setattr(dense_backends, "_candidates", candidates)
    assert dense_backends._fastest(inputs, flex=False).name == "expanded"
    assert dense_backends._fastest(inputs, flex=True).name == "flex"
    monkeypatch.setattr(dense_backends, "_candidates", lambda flex: [[needs("never", -1.0)]])
    assert dense_backends._fastest(inputs, flex=False).name == "sdpa"


@UNCOMPILED
def test_every_way_to_be_dense_is_dense_attention(inputs: Inputs) -> None:
    exact = dense_attention(inputs)
    # what runs on a CPU too: torch's fused kernel of CPUs, with keys of its own for every head
    flash = dense_backends.FUSED["flash"]
    torch.testing.assert_close(dense_backends._expanded(flash, inputs), exact)
    flex = dense_backends._flex(dense_backends._flex_attention)
    torch.testing.assert_close(flex(inputs), exact)


@UNCOMPILED
@pytest.mark.parametrize("length", [128, 300, 512])
def test_causal_blocks_are_causal(length: int) -> None:
    mask = dense_backends.causal_blocks(length, CPU)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 16, generator=generator) for _ in range(3))
    made = flex_attention(query, key, value, block_mask=mask)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(made, exact)
    blocks = -(-length // 128)
    assert int(mask.full_kv_num_blocks.sum()) == blocks * (blocks - 1) // 2


def test_a_call_on_a_gpu_is_timed_beside_the_fastest_backend(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dense(_: object) -> None:
        device.ms += 2.0

    backend = DenseBackend("cudnn", dense)  # type: ignore[arg-type]
    monkeypatch.setattr(measure, "best_dense", lambda inputs, flex: backend)
    monkeypatch.setattr(measure, "GpuClock", lambda _: GpuClock(CPU))
    inputs: Any = SimpleNamespace(query=SimpleNamespace(device=torch.device("cuda:0")))
    # of all calls, the cold ones take 3 ms and the warm ones, each after another, 1 ms
    clock = itertools.count()
    timing = measure.measure_call(
        lambda: setattr(device, "ms", device.ms + (3.0 if next(clock) < COLD else 1.0)),
        inputs,
        repeats=60,
    )
    assert (timing.median_ms, timing.dense_ms, timing.dense_backend) == (3.0, 2.0, "cudnn")
    assert (timing.warm_ms, timing.repeats) == (1.0, 60)
    assert timing.host_us is not None and 0 < timing.host_us < 1e5


COLD = 1 + 1 + 10 + 60
"""Calls that warm up, that tell how long a pair takes, of the host, and of the cold caches."""


def test_on_a_cpu_the_baseline_is_the_choice_of_torch(inputs: Inputs) -> None:
    narrow = catalog.Approximation(Window(32))
    timing = measure.measure_layer(inputs, [narrow] * 4, repeats=3)
    assert (timing.dense_backend, timing.repeats) == ("sdpa", 3)
    assert timing.q25_ms <= timing.median_ms <= timing.q75_ms
    assert timing.warm_ms is None and timing.host_us is None


def test_dense_layers_run_as_in_a_model_unless_forced(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    engine = measure.LayerKernel.__call__

    def counted(self: object, *args: Tensor, **more: object) -> Tensor:
        calls.append(True)
        return engine(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(measure.LayerKernel, "__call__", counted)
    measure.measure_layer(inputs, [catalog.DENSE] * 4, repeats=1)
    assert not calls
    measure.measure_layer(inputs, [catalog.DENSE] * 4, repeats=1, force=True)
    assert calls


def test_a_kernel_that_answers_wrongly_is_not_timed(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = measure.LayerKernel.__call__

    def wrong(self: object, *args: Tensor, **more: object) -> Tensor:
        return engine(self, *args, **more) * 1.01  # type: ignore[arg-type]

    monkeypatch.setattr(measure.LayerKernel, "__call__", wrong)
    mixed = [catalog.DENSE, *[catalog.Approximation(Window(32))] * 3]
    with pytest.raises(ValueError, match="do not give what dense attention gives"):
        measure.measure_layer(inputs, mixed, repeats=1)
    measure.measure_layer(inputs, mixed, repeats=1, check=False)
