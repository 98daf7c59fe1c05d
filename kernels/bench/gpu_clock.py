"""Times of single calls on a GPU, by events on its own clock.

All calls are launched one after another and waited for once. Before each timed call a buffer of
several times the size of the L2 cache is overwritten: the call then reads its inputs from memory,
as in a model, and the host is ahead of the device by the time that this takes. It is overwritten as
often as the host needs, so that what is timed is the device alone, unless the call itself waits for
the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

FLUSHED = 4
"""Size of the overwritten buffer, in L2 caches."""
AHEAD = 1.5
"""Time of overwriting over the time that the host needs for a call."""
MOST = 64
"""Overwrites before a call, at most: a call for which they are too few waits for the device."""

Call = Callable[[], object]


class GpuClock:
    """Times calls on one device.

    Args:
        device: where the calls launch; they are launched with it as the current device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = FLUSHED * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)
        self._buffer.zero_()
        self._flush_ms = self._events([lambda: self._flush(8)])[0] / 8

    def cold(
        self, calls: Sequence[Call], repeats: int, host_us: Sequence[float]
    ) -> list[list[float]]:
        """Times in ms of calls that take turns, by call; caches are overwritten before each.

        Args:
            calls: what to time.
            repeats: of each.
            host_us: time in us until each of them returns to the host.
        """
        waits = [self._waits(host) for host in host_us]
        found = self._events([call for _ in range(repeats) for call in calls], waits * repeats)
        return [found[place :: len(calls)] for place in range(len(calls))]

    def warm(self, call: Call, repeats: int, host_us: float) -> list[float]:
        """Times in ms of a call right after the same call; see `cold`."""
        waits = 2 * self._waits(host_us)
        found = self._events([call, call] * repeats, [waits, 0] * repeats)
        return found[1::2]

    def host_us(self, call: Call, repeats: int) -> float:
        """Median time in us until a call returns to the host, on an idle device."""
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize(self.device)
        return statistics.median(times)

    def _events(self, calls: Sequence[Call], waits: Sequence[int] | None = None) -> list[float]:
        """Times in ms of calls, each after so many overwrites."""
        pairs = []
        with torch.cuda.device(self.device):
            for call, times in zip(calls, waits or [0] * len(calls), strict=True):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush(times)
                begin.record()
                call()
                end.record()
                pairs.append((begin, end))
            torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in pairs]

    def _flush(self, times: int) -> None:
        for _ in range(times):
            self._buffer.zero_()

    def _waits(self, host_us: float) -> int:
        """Overwrites that take longer than the host needs for a call, at least one."""
        wanted = AHEAD * host_us / 1e3 / max(self._flush_ms, 1e-3)
        return max(1, min(MOST, round(wanted + 0.5)))
