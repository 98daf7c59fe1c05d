"""`attnplan bench`: timings of a model's heads, of what is kept, and of kernels alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from attnplan.cli.console import Stages, errors, leave, print_table, quiet_libraries
from attnplan.cli.inputs import check_apart, workload
from attnplan.cli.options import (
    CAPTURES,
    DATABASE,
    Data,
    Database,
    Device,
    Dtype,
    Json,
    Repeats,
    Seed,
    Trust,
)
from attnplan.cli.printing import print_json

LENGTHS = {"cpu": "1024,4096", "cuda": "4096,8192,32768,131072"}
"""Of a sweep over kernels, by kind of device."""


def bench(
    model: Annotated[str | None, typer.Argument(help="As in `search`.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens; may be repeated.")] = None,
    db: Database = DATABASE,
    decode: Annotated[
        bool, typer.Option("--decode", help="Time generated tokens after so many instead.")
    ] = False,
    export: Annotated[Path | None, typer.Option(help="Write this store's timings here.")] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Add the timings of this file first.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    data: Data = "builtin",
    seed: Seed = 0,
    repeats: Repeats = 5,
    trust_remote_code: Trust = False,
    methods: Annotated[
        str | None, typer.Option(help="Of MODEL: only these, as window,centroid_t; else all.")
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Sweep over the kernels alone; needs no model.")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(help="Of --kernels: tokens; by default what suits the device.")
    ] = None,
    head_dims: Annotated[str, typer.Option(help="Of --kernels.")] = "64,128",
    parts: Annotated[
        str, typer.Option(help="Of --kernels: which questions.")
    ] = "errors,layers,mixed,crossover,far,decode,host",
    inputs: Annotated[
        Path | None, typer.Option(help="Of --kernels: safetensors of real queries, keys, values.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of --kernels: start no row after so many.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Of --kernels: JSON lines; rows that it holds are kept.")
    ] = None,
    flex: Annotated[
        bool, typer.Option("--flex", help="Of --kernels: compiled FlexAttention competes too.")
    ] = False,
    json_: Json = False,
) -> None:
    """Time every approximation on this device, beside dense attention, into the store.

    With --decode, time what kv heads may keep while decoding, cache update included, beside
    transformers' DynamicCache with SDPA. With --kernels, check and time attention kernels without
    a model and without the store.
    """
    from attnplan.profiles.store.database import Store
    from attnplan.profiles.store.device_table import check_table, export_timings, import_timings

    if kernels:
        others = (model, methods, export, import_)
        if decode or any(other is not None for other in others):
            raise ValueError(
                "--kernels goes without MODEL, --decode, --methods, --export and --import"
            )
        from attnplan.models.load import check_device

        check_device(device)
        _bench_kernels(
            {
                "device": device,
                "lengths": _numbers("--lengths", lengths or LENGTHS[device.split(":")[0]]),
                "head_dims": _numbers("--head-dims", head_dims),
                "parts": tuple(parts.split(",")),
                "inputs": inputs,
                "seconds": seconds,
                "repeats": repeats,
                "flex": flex,
            },
            dtype,
            out,
            as_json=json_,
        )
        return
    if model is None and export is None and import_ is None:
        raise ValueError(
            "nothing to do: name a MODEL to time, or use --kernels, --export or --import"
        )
    if export is not None:
        check_table(export)
        check_apart(db, {"--export": export})
    with Store(db) as store:
        if import_ is not None:
            errors().print(f"{import_timings(store, import_)} timings read from {import_}")
        if model is not None:
            if decode and methods is not None:
                raise ValueError("--methods are those of the prefill, which --decode does not time")
            measure = _bench_decode if decode else partial(_bench, methods=methods)
            for length in context or [2048]:
                loaded, work = workload(
                    model, data, length, 1, seed, device, dtype, trust_remote_code
                )
                measure(loaded, work, store, repeats)
        if export is not None:
            errors().print(f"{export_timings(store, export)} timings written to {export}")


def _bench(loaded: Any, work: Any, store: Any, repeats: int, methods: str | None) -> None:
    from attnplan.costs.prefill import measure_device
    from attnplan.profiling.profiling import captures, profile
    from attnplan.report.explain import timing_rows
    from attnplan.search.candidates import candidates, parse_methods

    only = None if methods is None else parse_methods(methods)
    context = work.context
    shape = loaded.identity.prefill_shape(context)
    with captures(loaded, work, CAPTURES) as files, Stages() as progress:
        progress.stage("Profiling", 2)
        run = profile(loaded, work, store, files, progress.advance)
        progress.stage(f"Timing at {context}", None)
        costs = measure_device(
            loaded,
            work,
            store,
            run,
            candidates(shape, only),
            repeats=repeats,
            advance=progress.advance,
        )
    headers, rows = timing_rows(store, loaded, costs, shape)
    print_table(f"{costs.device.name}, {context} tokens", headers, rows)
    print(costs.told_error)


def _bench_decode(loaded: Any, work: Any, store: Any, repeats: int) -> None:
    from attnplan.costs.decode import STEPS, time_keepers
    from attnplan.costs.prefill import this_device
    from attnplan.kernels import cache_catalog
    from attnplan.profiling.profiling import captures, fitted_tensors, profile
    from attnplan.report.explain import DECODE_HEADERS, decode_rows

    rows = [(k,) * loaded.identity.kv_heads for k in cache_catalog.choices(work.context)]
    with captures(loaded, work, CAPTURES) as files, Stages() as progress:
        progress.stage("Profiling", 2)
        run = profile(loaded, work, store, files, progress.advance)
        progress.stage(f"Timing tokens after {work.context}", len(rows))
        timings = time_keepers(
            loaded,
            work,
            store,
            fitted_tensors(store, run.id),
            rows,
            steps=STEPS * repeats // 5,
            advance=progress.advance,
        )
    title = f"{this_device(loaded.model.device).name}, a token after {work.context}, one layer"
    print_table(title, DECODE_HEADERS, decode_rows(timings))


def _bench_kernels(asked: dict[str, Any], dtype: str, out: Path | None, *, as_json: bool) -> None:
    """Sweep over the kernels; exit code 1 where one of them is wrong."""
    from dataclasses import asdict

    from attnplan.bench.sweep import Sweep, sweep
    from attnplan.models.load import check_device, parse_dtype
    from attnplan.report.kernel_tables import tables

    quiet_libraries()
    check_device(asked["device"])
    parsed = parse_dtype(dtype)
    settings = Sweep(**asked, dtype=None if isinstance(parsed, str) else parsed)
    with Stages() as progress:
        progress.stage("Kernels", None)
        outcome = sweep(settings, out, advance=progress.advance)
    if as_json:
        rows = [asdict(row) for row in outcome.rows]
        print_json({**outcome.conditions, "rows": rows, "left_out": outcome.left_out})
    else:
        where = outcome.conditions
        driver = f", driver {where['driver']}" if where["driver"] else ""
        print(f"{where['device']}{driver}, torch {where['torch']}, triton {where['triton']}")
        print(f"engine {where['engine']}, inputs: {where['inputs']}")
        for title, headers, cells in tables(outcome):
            print_table(title, headers, cells)
        for label in outcome.left_out:
            print(f"left out for want of time: {label}")
    if outcome.wrong:
        named = [f"{row.name}, {row.dtype} of {row.head_dim}" for row in outcome.wrong]
        leave(f"wrong numbers: {'; '.join(named)}", 1)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes whole numbers between commas, got {text!r}") from None
