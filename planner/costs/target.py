"""Costs of a device that is not here, from the table of timings that it exported.

Of some devices without a table, times can be estimated: see `estimate.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from attnplan.costs.estimate import static_costs
from attnplan.costs.gpus import gpu
from attnplan.costs.prefill import DeviceCosts, fit_costs, is_of_this_engine, spell, tiles_on
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.models.load import LoadedModel
from attnplan.profiles.records.records import DeviceIdentity, KernelTiming
from attnplan.profiles.store.device_table import read_timings


def check_target(path: Path) -> None:
    """Raises ValueError unless this is a file, or the name of a device to estimate times of."""
    if not path.exists():
        gpu(str(path))


def target_costs(
    loaded: LoadedModel, context: int, candidates: tuple[Approximation, ...], path: Path
) -> tuple[tuple[Approximation, ...], DeviceCosts]:
    """Those candidates that there are times of on the device, and the cost model fitted to them.

    The table knows layers of attention, not whole models: what a prefill costs beside attention is
    unknown, and counts as nothing.

    Args:
        loaded: the model; its dtype and the shape of its heads must be in the table.
        context: tokens of the prefill.
        candidates: the first is dense.
        path: what `attnplan bench --export` wrote on the device, or the name of a device whose
            times are estimated.

    Raises:
        ValueError: a table of several devices, or without timings of these shapes; or no file, and
            no device that is known.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return candidates, static_costs(loaded, context, candidates, gpu(str(path)))
    tables = read_timings(path)
    if len(tables) != 1:
        names = ", ".join(device.name for device, _ in tables) or "none"
        raise ValueError(f"{path}: a target is one device, this table has {len(tables)}: {names}")
    ((device, timings),) = tables
    mine = _of_shape(loaded, context, device, timings, path)
    known, other_engine = _known(device, mine)
    heads = loaded.identity.heads
    timed = tuple(a for a in candidates if spell((a,) * heads) in known)
    if len(timed) < 2 or not timed[0].is_dense:
        raise ValueError(
            f"{path}: no timings of {'dense attention' if timed else 'methods of this version'} at "
            f"{context} tokens; export the table again with this version of attnplan"
        )
    shape = loaded.identity.prefill_shape(context)
    fit = fit_costs(known, timed, heads, tiles_on(device, timed, shape))
    dense_ms = fit.model.dense_layer_ms * loaded.identity.layers
    engines = Counter(timing.engine for timing in known.values())
    return timed, DeviceCosts(
        fit,
        dense_ms,
        device,
        engines.most_common(1)[0][0],
        is_here=False,
        other_engine=other_engine and f"{path}: {other_engine}",
    )


def _known(
    device: DeviceIdentity, timings: list[KernelTiming]
) -> tuple[dict[str, KernelTiming], str]:
    """The timings by spelling, those of this code first, and which are of other code, in words.

    Where all timings of a layer are of other code, that of the engine that timed most counts.
    """
    now = {t.approximation: t for t in timings if is_of_this_engine(device.kind, t)}
    counts = Counter(t.engine for t in timings)
    before: dict[str, KernelTiming] = {}
    for timing in sorted(timings, key=lambda t: counts[t.engine]):
        if timing.approximation not in now:
            before[timing.approximation] = timing
    if not before:
        return now, ""
    names = {name for spelled in before for name in re.findall(r"(\w+)\(", spelled)}
    whole = len(now) + len(before)
    told = (
        f"{len(before)} of {whole} timings are of another engine than this attnplan has, of layers "
        f"with {', '.join(sorted(names))}; times may differ, so time them there again with "
        "`attnplan bench --export`"
    )
    return before | now, told


def _of_shape(
    loaded: LoadedModel,
    context: int,
    device: DeviceIdentity,
    timings: list[KernelTiming],
    path: Path,
) -> list[KernelTiming]:
    shape = loaded.identity.prefill_shape(context)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    sizes = (dtype, shape.heads, shape.kv_heads, shape.head_dim, shape.queries, shape.keys)
    found = [t for t in timings if _sizes(t) == sizes]
    if not found:
        others = "; ".join(_told(other) for other in sorted({_sizes(t) for t in timings}))
        raise ValueError(
            f"{path}: {device.name} has no timings of {_told(sizes)}, only of {others}; run "
            f"`attnplan bench MODEL --context {context} --export` there"
        )
    return found


def _sizes(timing: KernelTiming) -> tuple[str, int, int, int, int, int]:
    t = timing
    return t.dtype, t.heads, t.kv_heads, t.head_dim, t.queries, t.keys


def _told(sizes: tuple[str, int, int, int, int, int]) -> str:
    dtype, heads, kv_heads, head_dim, _, keys = sizes
    return f"{heads} heads, {kv_heads} kv heads of {head_dim} in {dtype} at {keys} tokens"
