"""The command line: profile, bench, search, evaluate, compare, query, show, validate, doctor, demo.

Every command parses, calls the library and prints. Results go to standard output, progress and
errors to standard error. Exit codes: 0 done, 1 a budget that cannot be met, 2 bad input.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from attnplan.cli.console import ERRORS, Stages, leave, one_sentence, print_table, quiet_libraries

app = typer.Typer(
    help="Find, for every head of a transformer, the cheapest attention it can live with.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Model = Annotated[
    str, typer.Argument(help="Hugging Face id, local directory, .gguf file, or smollm2-135m.")
]
Data = Annotated[str, typer.Option(help="A text file, or 'builtin'.")]
Context = Annotated[int, typer.Option(help="Tokens per sequence.")]
Sequences = Annotated[int, typer.Option(help="Number of sequences.")]
Database = Annotated[str, typer.Option("--db", help="SQLAlchemy URL of the store.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as stored).")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Repeats = Annotated[int, typer.Option(min=1, help="Pairs of timed runs.")]

DATABASE = "sqlite:///attnplan.db"
CAPTURES = Path(".attnplan")
DEMO = "smollm2-135m"
LENGTHS = {"cpu": "1024,4096", "cuda": "4096,8192,32768,131072"}
"""Of a sweep over kernels, by kind of device."""


def main() -> None:
    """The console script."""
    with one_sentence():
        app()


@app.command()
def profile(
    model: Model,
    data: Data = "builtin",
    context: Context = 2048,
    sequences: Sequences = 3,
    db: Database = DATABASE,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Measure what every attention head of a model does, into the store."""
    from attnplan.profiles.store.database import Store
    from attnplan.profiling.profiling import captures
    from attnplan.profiling.profiling import profile as run_profile

    loaded, work = _workload(
        model, data, context, sequences, seed, device, dtype, trust_remote_code
    )
    with (
        Store(db) as store,
        captures(loaded, work, CAPTURES, keep=True) as files,
        Stages() as progress,
    ):
        progress.stage("Profiling", work.texts + 1)
        run = run_profile(loaded, work, store, files, progress.advance)
        heads = store.head_profiles(run.id, arrays=False)
    _print_profile(run.id, heads)


@app.command()
def search(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where the plan is written.")],
    max_density: Annotated[
        float | None, typer.Option(help="Share of dense multiply-adds, selection included.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Prefill time: 0.6x of dense, or 25ms.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="KV cache: 0.5x of dense, or 512MiB.")
    ] = None,
    max_decode: Annotated[
        str | None, typer.Option(help="Of one generated token: 0.8x of dense, or 25ms.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Nats per token.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Perplexity over dense.")] = None,
    minimize: Annotated[str | None, typer.Option(help="kl, latency or memory.")] = None,
    trials: Annotated[int, typer.Option(min=0, help="Trials of the Optuna study.")] = 16,
    swaps: Annotated[int, typer.Option(min=0, help="Swaps that refinement may measure.")] = 8,
    methods: Annotated[
        str | None, typer.Option(help="Only these methods, as window,loki; else all.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            help="Plan for the device of this table, which `bench --export` wrote there; or, by "
            "estimated times, for a100, h100, h200, b200 or l40s."
        ),
    ] = None,
    context: Context = 2048,
    sequences: Sequences = 3,
    data: Data = "builtin",
    holdout: Annotated[
        Path | None, typer.Option(help="A text file to verify on; else a held-out part of data.")
    ] = None,
    db: Database = DATABASE,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    repeats: Repeats = 3,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Find the best plan within a budget, prove it by measurement, and write it."""
    from attnplan.costs.target import check_target
    from attnplan.pipeline.search_cache import check_room
    from attnplan.pipeline.search_prefill import Request
    from attnplan.pipeline.search_prefill import plan as run_plan
    from attnplan.plan.output import check_plan, data_file
    from attnplan.profiles.store.database import Store
    from attnplan.profiles.text.calibration import load_sequences
    from attnplan.profiling.profiling import captures
    from attnplan.search.budget import Budget, parse_latency, parse_memory
    from attnplan.search.candidates import parse_methods

    if target is not None:
        check_target(target)
    only = None if methods is None else parse_methods(methods)
    budget = Budget(
        max_density=max_density,
        max_latency=None if max_latency is None else parse_latency(max_latency),
        max_memory=None if max_memory is None else parse_memory(max_memory),
        max_decode=None if max_decode is None else parse_latency(max_decode),
        max_kl=max_kl,
        max_ppl_ratio=max_ppl_ratio,
        minimize=minimize,  # type: ignore[arg-type]
    )
    if minimize == "memory":
        raise ValueError(
            "memory can be limited but not minimized yet: use --max-memory 0.5x (or fewer) and "
            "compare the continuation KL"
        )
    if out.is_dir() or out.suffix == ".safetensors":
        raise ValueError(f"{out}: --out names the YAML file of the plan")
    generates = budget.max_memory is not None or budget.max_decode is not None
    if generates:
        if target is not None:
            raise ValueError(
                "--target plans the prefill alone: leave out --max-memory and --max-decode, whose "
                "costs are measured here"
            )
        if max_density is None and max_latency is None:
            for option, value in (("--max-ppl-ratio", max_ppl_ratio), ("--minimize", minimize)):
                if value not in (None, "kl"):
                    raise ValueError(
                        f"{option} {value} is about the prefill, which stays dense under a budget "
                        "for memory or decoding alone: limit it with --max-density or "
                        "--max-latency, or the continuation with --max-kl"
                    )
    check_plan(out)
    _check_apart(db, {"--out": out, "the plan's data": data_file(out)})
    loaded, work = _workload(
        model, data, context, sequences, seed, device, dtype, trust_remote_code
    )
    if generates:
        check_room(loaded.identity, context)
    held_out = load_sequences(
        loaded.tokenizer,
        data if holdout is None else holdout,
        context=context,
        sequences=sequences,
        split="holdout" if holdout is None else "all",
    )
    if generates:
        _search_memory(
            loaded, work, held_out, budget, db, out, trials, swaps, repeats, seed, only, json_
        )
        return
    request = Request(budget, trials, swaps, repeats, seed, only, target)
    with Store(db) as store, captures(loaded, work, CAPTURES) as files, Stages() as progress:
        outcome = run_plan(loaded, work, held_out, store, db, files, request, progress)
        if outcome.plan is not None:
            _write(loaded, outcome, work, held_out, budget, store, out)
    _print_outcome(outcome, budget, out, as_json=json_)
    if outcome.plan is None:
        missed = "; ".join(outcome.attempts[-1].misses)
        leave(f"no plan within the budget held up to measurement; the last one missed: {missed}", 1)


@app.command()
def evaluate(
    model: Model,
    plan: Annotated[Path | None, typer.Option(help="A plan; without, the model as it is.")] = None,
    data: Data = "builtin",
    context: Context = 2048,
    sequences: Sequences = 3,
    offset: Annotated[int, typer.Option(help="Tokens of the text to skip.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="By default the plan's, else auto.")] = None,
    seed: Seed = 0,
    repeats: Repeats = 5,
    force: Annotated[
        bool, typer.Option(help="Run the plan on another device or dtype than its own.")
    ] = False,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Measure a plan's quality and speed against the model without it."""
    from attnplan.models.load import check_context, load_model
    from attnplan.pipeline.assess import assess
    from attnplan.plan.plan import Plan
    from attnplan.profiles.text.calibration import load_sequences

    quiet_libraries()
    loaded_plan = None if plan is None else Plan.load(plan)
    if dtype is None:
        dtype = "auto" if loaded_plan is None else loaded_plan.target.dtype
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    check_context(loaded.identity, context)
    split = "holdout" if data == "builtin" else "all"
    tokens = load_sequences(
        loaded.tokenizer, data, context=context, sequences=sequences, split=split, offset=offset
    )
    with Stages() as progress:
        progress.stage("Evaluating", sequences + 3)
        found = assess(
            loaded,
            loaded_plan,
            tokens.tokens,
            seed=seed,
            repeats=repeats,
            force=force,
            advance=progress.advance,
        )
    if json_:
        _print_json(found)
    else:
        notes = found.pop("notes")
        rows = [[key, _cell(value)] for key, value in found.items()]
        print_table("", ("measured", "value"), rows)
        for note in notes:
            print(note)


@app.command()
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
        _check_apart(db, {"--export": export})
    with Store(db) as store:
        if import_ is not None:
            ERRORS.print(f"{import_timings(store, import_)} timings read from {import_}")
        if model is not None:
            if decode and methods is not None:
                raise ValueError("--methods are those of the prefill, which --decode does not time")
            measure = _bench_decode if decode else partial(_bench, methods=methods)
            for length in context or [2048]:
                loaded, work = _workload(
                    model, data, length, 1, seed, device, dtype, trust_remote_code
                )
                measure(loaded, work, store, repeats)
        if export is not None:
            ERRORS.print(f"{export_timings(store, export)} timings written to {export}")


@app.command()
def compare(
    model: Model,
    density: Annotated[
        float, typer.Option(help="Share of dense multiply-adds that a method may take.")
    ] = 0.25,
    context: Context = 2048,
    sequences: Sequences = 3,
    data: Data = "builtin",
    db: Database = DATABASE,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    repeats: Repeats = 3,
    trust_remote_code: Trust = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write it here: .md for a table, .html for a page.")
    ] = None,
    json_: Json = False,
) -> None:
    """Compare all methods of the catalog on a model's heads, at equal cost."""
    from dataclasses import asdict

    from attnplan.bench.league import HEADERS, league, lines
    from attnplan.profiles.store.database import Store
    from attnplan.profiling.profiling import captures
    from attnplan.report import league_page

    if out is not None:
        league_page.check(out)
        _check_apart(db, {"--out": out})
    loaded, work = _workload(
        model, data, context, sequences, seed, device, dtype, trust_remote_code
    )
    with Store(db) as store, captures(loaded, work, CAPTURES) as files, Stages() as progress:
        entries = league(loaded, work, store, files, density, repeats=repeats, progress=progress)
    if out is not None:
        title = f"{model}: all methods at {context} tokens, density at most {density:g}"
        command = (
            f"attnplan compare {model} --context {context} --density {density:g} "
            f"--sequences {sequences} --repeats {repeats} --out {out}"
        )
        league_page.write(out, entries, title, command)
    if json_:
        _print_json({"density": density, "entries": [asdict(entry) for entry in entries]})
    else:
        print_table(f"{context} tokens, density at most {density}", HEADERS, lines(entries))


@app.command()
def query(
    view: Annotated[str, typer.Argument(help="heads, spectra, timings, scores, plans or runs.")],
    where: Annotated[
        str | None, typer.Option(help="Such as 'sink_mass > 0.5 and k_rank95 < 16'.")
    ] = None,
    order_by: Annotated[str | None, typer.Option(help="Columns, each with asc or desc.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows.")] = None,
    format_: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",
    db: Database = DATABASE,
) -> None:
    """Ask the store about heads, spectra, timings, scores, plans or runs."""
    from attnplan.profiles.store.database import Store
    from attnplan.profiles.store.queries import VIEWS, run_query

    if format_ not in ("table", "json", "csv"):
        raise ValueError(f"unknown format {format_!r}; known: table, json, csv")
    with Store(db, create=False) as store:
        table = run_query(store, view, where, order_by, limit)
    if format_ == "json":
        print(table.to_json())
    elif format_ == "csv":
        print(table.to_csv(), end="")
    else:
        brief = [name for name in table.columns if name in VIEWS[view].brief]
        places = [table.columns.index(name) for name in brief]
        rows = [[_cell(row[place]) for place in places] for row in table.rows]
        print_table("", brief, rows)


@app.command()
def show(
    plan: Annotated[Path, typer.Argument(help="A plan.")],
    layer: Annotated[int | None, typer.Option(help="With --head: why this head.")] = None,
    head: Annotated[int | None, typer.Option(help="With --layer: why this head.")] = None,
    db: Database = DATABASE,
) -> None:
    """Show a plan, or why one head got its method."""
    from attnplan.plan.plan import Plan
    from attnplan.profiles.store.database import Store
    from attnplan.report.explain import explain_head, plan_rows

    loaded = Plan.load(plan)
    if (layer is None) != (head is None):
        raise ValueError("give both --layer and --head, or neither")
    if layer is None or head is None:
        print(loaded.summary())
        for title, headers, rows in plan_rows(loaded):
            print_table(title, headers, rows)
        return
    with Store(db, create=False) as store:
        for title, headers, rows in explain_head(loaded, store, layer, head):
            print_table(title, headers, rows)


@app.command()
def validate(
    plan: Annotated[Path, typer.Argument(help="A plan.")],
    model: Annotated[str | None, typer.Option(help="Also check that the plan is for it.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Check a plan file, and that it belongs to a model."""
    from attnplan.plan.plan import Plan, PlanError

    loaded = Plan.load(plan)
    if model is not None:
        from attnplan.models.load import load_model

        quiet_libraries()
        found = load_model(model, trust_remote_code=trust_remote_code).identity
        difference = found.difference(loaded.model)
        if difference is not None:
            raise PlanError(f"{plan}: the plan is for {loaded.model.name}: {difference}")
    print(f"{plan} is valid: {loaded.summary()}")


@app.command()
def doctor() -> None:
    """Say what this machine can run."""
    from attnplan.report.explain import machine_rows

    print_table("", ("what", "here"), machine_rows())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the plan is written.")] = Path(
        "smollm2-135m.yaml"
    ),
    max_density: Annotated[float, typer.Option(help="As in `search`.")] = 0.25,
    context: Context = 2048,
    db: Database = DATABASE,
) -> None:
    """Run the whole job on SmolLM2-135M and compare the plan with dense and the baselines."""
    # less effort than a search of one's own: a newcomer waits for it
    search(
        DEMO,
        out,
        max_density=max_density,
        trials=6,
        swaps=3,
        context=context,
        sequences=2,
        repeats=2,
        db=db,
    )
    print(f"\nApply it: attnplan.load({DEMO!r}, plan={str(out)!r})")


def _check_apart(db: str, outputs: dict[str, Path]) -> None:
    """Raises ValueError where a command would write a file and its store to one place."""
    from attnplan.profiles.store.migrations.engine import file_of
    from attnplan.profiles.store.output_files import check_apart

    store = file_of(db)
    check_apart(outputs, {} if store is None else {"--db": store})


def _workload(
    model: str,
    data: str,
    context: int,
    sequences: int,
    seed: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """The model and its calibration texts."""
    from attnplan.models.load import check_context, load_model
    from attnplan.profiles.text.calibration import load_sequences
    from attnplan.profiling.profiling import Workload

    quiet_libraries()
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    check_context(loaded.identity, context)
    tokens = load_sequences(
        loaded.tokenizer, data, context=context, sequences=sequences, split="calibration"
    )
    return loaded, Workload(tokens, seed)


def _write(
    loaded: Any, outcome: Any, work: Any, holdout: Any, budget: Any, store: Any, out: Path
) -> None:
    from attnplan.profiles.records import records
    from attnplan.profiles.records.digest import digest
    from attnplan.report.search_tables import figures, to_plan

    plan = to_plan(loaded, outcome, work, holdout, budget)
    plan.save(out)
    text = out.read_text(encoding="utf-8")
    store.save_plan(
        records.PlanRecord(
            search=outcome.search,
            digest=digest(text),
            path=str(out),
            yaml=text,
            feasible=True,
            figures=figures(outcome.plan, timed=outcome.costs.is_here),
        )
    )


def _search_memory(
    loaded: Any,
    work: Any,
    held_out: Any,
    budget: Any,
    db: str,
    out: Path,
    trials: int,
    swaps: int,
    repeats: int,
    seed: int,
    methods: Any,
    json_: bool,
) -> None:
    """What is kept while decoding; and before it prefill, where other costs are limited too."""
    from dataclasses import replace

    from attnplan.pipeline.search_cache import remember
    from attnplan.pipeline.search_prefill import Request
    from attnplan.pipeline.search_prefill import plan as run_plan
    from attnplan.profiles.store.database import Store
    from attnplan.profiling.profiling import captures
    from attnplan.report.search_tables import (
        MEMORY_HEADERS,
        memory_figures,
        memory_lines,
        memory_notes,
        to_plan,
        with_memory,
    )

    prefill, missed = None, ""
    with Store(db) as store, captures(loaded, work, CAPTURES) as files, Stages() as progress:
        if budget.max_density is not None or budget.max_latency is not None:
            request = Request(
                replace(budget, max_memory=None, max_decode=None),
                trials,
                swaps,
                repeats,
                seed,
                methods,
            )
            outcome = run_plan(loaded, work, held_out, store, db, files, request, progress)
            if outcome.plan is None:
                missed = "; ".join(outcome.attempts[-1].misses)
            else:
                prefill = to_plan(loaded, outcome, work, held_out, request.budget)
        if not missed:
            memory = remember(
                loaded,
                work,
                held_out,
                store,
                db,
                files,
                budget,
                trials=trials,
                seed=seed,
                progress=progress,
            )
            missed = "; ".join(memory.misses)
    if not missed:
        with_memory(loaded, memory, work, held_out, budget, prefill).save(out)
        if json_:
            _print_json(
                {
                    "plan": str(out),
                    "budget": budget.canonical(),
                    "memory": memory_figures(memory.best),
                    "uniform": memory.uniform and memory_figures(memory.uniform),
                    "notes": memory_notes(memory.best),
                }
            )
            return
        print_table("Continuation of held-out text", MEMORY_HEADERS, memory_lines(memory))
        for note in memory_notes(memory.best):
            print(note)
        print(f"plan: {out}")
        return
    leave(f"no plan within the budget held up to measurement; the last one missed: {missed}", 1)


def _print_outcome(outcome: Any, budget: Any, out: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from attnplan.report.search_tables import HEADERS, comparison, lines, notes

    rows = comparison(outcome)
    if as_json:
        found = {
            "plan": str(out) if outcome.plan else None,
            "budget": budget.canonical(),
            "rows": [asdict(row) for row in rows],
            "solver_seconds": outcome.solver_seconds,
            "cost_model_error": outcome.costs.error,
            "times": _kind_of_times(outcome.costs),
            "device": outcome.costs.device.name,
            "notes": notes(outcome),
        }
        _print_json(found)
        return
    timed = "prefill measured beside dense"
    if not outcome.costs.is_here:
        timed = f"attention as {_kind_of_times(outcome.costs)} for {outcome.costs.device.name}"
    print_table(f"Held-out text, and {timed}", HEADERS, lines(rows))
    if outcome.costs.is_estimate:
        print("cost model: an estimate; no timing of this device exists, its error is unknown")
    else:
        print(outcome.costs.told_error)
    print(f"solver: {outcome.solver_seconds:.2f} s from the stored scores to its first answer")
    for note in notes(outcome):
        print(note)
    if outcome.plan is not None:
        print(f"plan: {out}")


def _kind_of_times(costs: Any) -> str:
    if costs.is_estimate:
        return "estimated"
    return "measured" if costs.is_here else "predicted"


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
        _print_json({**outcome.conditions, "rows": rows, "left_out": outcome.left_out})
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


def _print_profile(run: int, heads: Any) -> None:
    shown = (
        "sink_mass",
        "sink_local_mass",
        "entropy",
        "effective_keys",
        "k_rank95",
        "fisher_total",
    )
    rows = []
    for layer in sorted({h.layer for h in heads}):
        of_layer = [h.scalars for h in heads if h.layer == layer]
        means = [sum(s[name] for s in of_layer) / len(of_layer) for name in shown]
        rows.append([str(layer), *(f"{value:.4g}" for value in means)])
    print_table(f"profile run {run}: mean over the heads of each layer", ("layer", *shown), rows)


def _print_json(found: dict[str, Any]) -> None:
    """One object on standard output; what is not finite becomes null."""
    print(json.dumps(_finite(found), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return str(value)
