"""What this device needs for every approximation: measured once, kept in the store, fitted.

A layer of real queries, keys and values is timed under every candidate for all heads, and under
random mixtures, always in turn with dense attention. The cost model of a layer is fitted to these
timings and its error is measured on the mixtures that it was not fitted to.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch

from attnplan.costs.gpus import TileWork, named, tile_work
from attnplan.kernels import catalog
from attnplan.kernels.bench.measure import Timing, device_name, measure_layer
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.digest import layer_digest
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.models.load import LoadedModel
from attnplan.profiles.capture.capture import capture
from attnplan.profiles.records import records
from attnplan.profiles.store.database import Store
from attnplan.profiling.profiling import Advance, Workload, fitted_tensors, model_record, silent
from attnplan.quality.prefill import dense_prefill_ms
from attnplan.search.latency import LatencyFit, fit_latency

MIXTURES = 12
"""Random mixtures timed per shape: the held-out rows of the cost model."""
SEPARATOR = " | "


@dataclass(frozen=True)
class DeviceCosts:
    """The fitted cost model and what it was fitted to.

    Attributes:
        fit: cost model in milliseconds of this device, with its error on held-out mixtures.
        dense_prefill_ms: median of the whole dense prefill.
        device: whose costs these are.
        engine: digest of the code that was timed.
        is_here: the device is this one, so that predictions can be held against measurements.
        is_estimate: nobody timed the device: `fit` is to the figures of a static model.
        other_engine: which timings are of other code than this, in a sentence; empty if none.
    """

    fit: LatencyFit
    dense_prefill_ms: float
    device: records.DeviceIdentity
    engine: str = ""
    is_here: bool = True
    is_estimate: bool = False
    other_engine: str = ""

    @property
    def error(self) -> float | None:
        """Mean relative error on layers that were not fitted to.

        None where nobody timed the device, or no such layer.
        """
        known = len(self.fit.errors) and not self.is_estimate
        return self.fit.mape if known else None

    @property
    def told_error(self) -> str:
        """The same in words."""
        if self.error is None:
            return "cost model: error unknown, there are no timings of mixtures to hold it against"
        return f"cost model: {self.error:.1%} mean error on mixtures it was not fitted to"


def this_device(device: torch.device) -> records.DeviceIdentity:
    """Identity of the device and of everything that its timings depend on."""
    driver = ""
    if device.type == "cuda":
        driver = f"cuda {torch.version.cuda}"
    versions = {name: version(name) for name in ("torch", "triton", "transformers")}
    versions["python"] = platform.python_version()
    return records.DeviceIdentity(
        name=device_name(device),
        kind=device.type,
        driver=driver,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        versions=versions,
    )


def engine_of(device: str, approximations: Iterable[Approximation]) -> str:
    """Digest of the code that runs some approximations in a layer.

    Args:
        device: 'cpu' or 'cuda'.
        approximations: those of its heads.
    """
    parts = {part for a in approximations for part in (a.near, a.far)}
    return layer_digest(device, {type(part) for part in parts if part is not None})


def is_of_this_engine(device: str, timing: records.KernelTiming) -> bool:
    """Whether a timing is of the code that would run its layer now."""
    methods = catalog.methods_in(timing.approximation)
    return methods is not None and timing.engine == layer_digest(device, methods)


def candidate_name(approximation: Approximation) -> str:
    """What the search calls a candidate: its canonical line, or 'dense'."""
    return "dense" if approximation.is_dense else catalog.key(approximation)


def spell(assignment: Sequence[Approximation]) -> str:
    """The heads of a layer, whatever their order: '3 x window(...) | 6 x dense()'."""
    return counted(catalog.key(a) for a in assignment)


def counted(names: Iterable[str]) -> str:
    """How often each name occurs, whatever the order."""
    return SEPARATOR.join(f"{n} x {name}" for name, n in sorted(Counter(names).items()))


def parse(spelled: str, names: Sequence[str]) -> list[int] | None:
    """Heads per candidate of what `spell` wrote; None where it names another candidate."""
    counts = [0] * len(names)
    for part in spelled.split(SEPARATOR):
        number, name = part.split(" x ", 1)
        if name not in names:
            return None
        counts[names.index(name)] += int(number)
    return counts


def measure_device(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    run: records.ProfileRun,
    candidates: tuple[Approximation, ...],
    *,
    repeats: int = 3,
    advance: Advance = silent,
) -> DeviceCosts:
    """Time what is not timed yet on this device at this shape, and fit the cost model."""
    model, identity = loaded.model, loaded.identity
    device = this_device(model.device)
    heads = identity.heads
    wanted = rows_to_time(candidates, heads, work.seed)
    known = {t.approximation: t for t in timings(loaded, work, store, device)}
    missing = [row for row in wanted if spell(row) not in known]
    if missing:
        inputs = _inputs(loaded, work, fitted_tensors(store, run.id))
        for number, row in enumerate(missing):
            advance(f"timing {number + 1} of {len(missing)}")
            timing = measure_layer(inputs, row, repeats=repeats)
            store.save_timings(device, [_record(loaded, inputs, row, timing)])
        known = {t.approximation: t for t in timings(loaded, work, store, device)}
    prefill = _dense_prefill(loaded, work, store, device, repeats)

    shape = identity.prefill_shape(work.context)
    fit = fit_costs(known, candidates, heads, tiles_on(device, candidates, shape))
    rest_ms = max(prefill - identity.layers * fit.model.dense_layer_ms, 0.0)
    fit = replace(fit, model=replace(fit.model, rest_ms=rest_ms))
    return DeviceCosts(fit, prefill, device, engine_of(device.kind, candidates))


def tiles_on(
    device: records.DeviceIdentity, candidates: tuple[Approximation, ...], shape: AttentionShape
) -> TileWork | None:
    """How the rows of a layer fill a device, if it is a GPU that is known."""
    gpu = named(device) if device.kind == "cuda" else None
    return None if gpu is None else tile_work(candidates, shape, gpu)


def fit_costs(
    known: Mapping[str, records.KernelTiming],
    candidates: tuple[Approximation, ...],
    heads: int,
    tiles: TileWork | None = None,
) -> LatencyFit:
    """The cost model of a layer from timings by spelling, without what is not attention.

    Args:
        known: timings of layers.
        candidates: the first is dense.
        heads: of a layer.
        tiles: on a GPU, how its rows fill the device; None where heads only add up.
    """
    names = [catalog.key(a) for a in candidates]
    spelled = [name for name in known if parse(name, names)]
    rows = [parse(name, names) for name in spelled]
    uniform = {spell((a,) * heads) for a in candidates} | {
        spell(row) for row in _beside_static(candidates, heads)
    }
    return fit_latency(
        np.array(rows),
        np.array([known[name].median_ms for name in spelled]),
        rest_ms=0.0,
        names=[candidate_name(a) for a in candidates],
        dynamic=[not a.static for a in candidates],
        method=_methods(candidates),
        # with few heads, a mixture may turn out to be of one candidate, which must stay in the fit
        holdout=np.array([name not in uniform for name in spelled]),
        tiles=None if tiles is None else (tiles.work, tiles.path),
    )


def rows_to_time(
    candidates: tuple[Approximation, ...], heads: int, seed: int
) -> list[tuple[Approximation, ...]]:
    """The layers that a cost model is fitted to: of one candidate, of almost one, and mixed."""
    return [
        *((a,) * heads for a in candidates),
        *_beside_static(candidates, heads),
        *_mixtures(candidates, heads, seed),
    ]


def _methods(candidates: tuple[Approximation, ...]) -> list[int]:
    """For each candidate, the first of those that select or compress together with it."""
    first: dict[str, int] = {}
    return [first.setdefault(a.together, c) for c, a in enumerate(candidates)]


def _beside_static(
    candidates: tuple[Approximation, ...], heads: int
) -> list[tuple[Approximation, ...]]:
    """One head of every dynamic candidate beside cheap static ones: what a method costs once.

    And a single cheap one beside dense heads, which the kernel then has to compute.
    """
    static = [a for a in candidates if a.static and not a.is_dense]
    if heads < 2 or not static:
        return []
    dense = [(*[a] * (heads - 1), static[0]) for a in candidates if a.is_dense]
    return dense + [(a, *[static[0]] * (heads - 1)) for a in candidates if not a.static]


def _mixtures(
    candidates: tuple[Approximation, ...], heads: int, seed: int
) -> list[tuple[Approximation, ...]]:
    """Random assignments of a layer, of two to four candidates each."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(MIXTURES):
        size = min(int(generator.integers(2, 5)), len(candidates))
        kinds = generator.choice(len(candidates), size=size, replace=False)
        found.append(tuple(candidates[c] for c in generator.choice(kinds, size=heads)))
    return found


def _inputs(
    loaded: LoadedModel, work: Workload, fitted: dict[int, dict[str, torch.Tensor]]
) -> Inputs:
    """Real queries, keys and values of the middle layer."""
    model = loaded.model
    captured = capture(
        model, work.tokens.tokens[0], gradients=False, seed=work.seed, store_dtype=model.dtype
    )
    layer = captured.layers[len(captured.layers) // 2]
    device = model.device
    return Inputs.of_layer(
        layer.query.to(device),
        layer.key.to(device),
        layer.value.to(device),
        scale=layer.scale,
        fitted=fitted[layer.layer],
    )


def timings(
    loaded: LoadedModel, work: Workload, store: Store, device: records.DeviceIdentity
) -> list[records.KernelTiming]:
    """What is stored of a device at this shape, timed with the code as it is now."""
    shape = loaded.identity.prefill_shape(work.context)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return [
        t
        for t in store.load_timings(device)
        if is_of_this_engine(device.kind, t)
        and (t.dtype, t.heads, t.kv_heads, t.head_dim, t.queries, t.keys)
        == (dtype, shape.heads, shape.kv_heads, shape.head_dim, shape.queries, shape.keys)
    ]


def _record(
    loaded: LoadedModel, inputs: Inputs, row: Sequence[Approximation], timing: Timing
) -> records.KernelTiming:
    shape = inputs.shape
    return records.KernelTiming(
        engine=engine_of(inputs.query.device.type, row),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        queries=shape.queries,
        keys=shape.keys,
        approximation=spell(row),
        median_ms=timing.median_ms,
        q25_ms=timing.q25_ms,
        q75_ms=timing.q75_ms,
        repeats=timing.repeats,
    )


def _dense_prefill(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    device: records.DeviceIdentity,
    repeats: int,
) -> float:
    """Median time of the whole dense prefill, measured once."""
    key = records.MeasurementKey(
        model=model_record(loaded),
        kind="dense prefill",
        subject="dense",
        conditions={
            "device": device.digest,
            "context": work.context,
            "dtype": str(loaded.model.dtype),
        },
    )
    values = store.load_measurement(key)
    if values is None:
        values = {"median_ms": dense_prefill_ms(loaded.model, work.tokens.tokens[0], repeats)}
        store.save_measurement(key, values)
    return float(values["median_ms"])
