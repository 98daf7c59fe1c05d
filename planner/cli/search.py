"""`attnplan search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnplan.cli.console import Stages, leave, print_table
from attnplan.cli.inputs import check_apart, workload
from attnplan.cli.options import (
    CAPTURES,
    DATABASE,
    Context,
    Data,
    Database,
    Device,
    Dtype,
    Json,
    Model,
    Repeats,
    Seed,
    Sequences,
    Trust,
)
from attnplan.cli.printing import print_json


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
    from attnplan.pipeline.request import Request
    from attnplan.pipeline.search_cache import check_room
    from attnplan.pipeline.search_prefill import plan as run_plan
    from attnplan.pipeline.to_plan import figures, keep, to_plan
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
    check_apart(db, {"--out": out, "the plan's data": data_file(out)})
    loaded, work = workload(model, data, context, sequences, seed, device, dtype, trust_remote_code)
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
            found = to_plan(loaded, outcome, work, held_out, budget)
            numbers = figures(outcome.plan, timed=outcome.costs.is_here)
            keep(store, outcome.search, found, out, numbers)
    _print_outcome(outcome, budget, out, as_json=json_)
    if outcome.plan is None:
        missed = "; ".join(outcome.attempts[-1].misses)
        leave(f"no plan within the budget held up to measurement; the last one missed: {missed}", 1)


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

    from attnplan.pipeline.request import Request
    from attnplan.pipeline.search_cache import remember
    from attnplan.pipeline.search_prefill import plan as run_plan
    from attnplan.pipeline.to_plan import figures, keep, memory_figures, to_plan, with_memory
    from attnplan.profiles.store.database import Store
    from attnplan.profiling.profiling import captures
    from attnplan.report.search_tables import MEMORY_HEADERS, memory_lines, memory_notes

    prefill, missed = None, ""
    numbers: dict[str, float] = {}
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
                numbers = figures(outcome.plan)
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
                found = with_memory(loaded, memory, work, held_out, budget, prefill)
                numbers["kv_bytes"] = float(memory.best.held[0])
                keep(store, memory.search, found, out, numbers)
    if not missed:
        if json_:
            print_json(
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
        print_json(found)
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
