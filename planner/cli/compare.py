"""`attnplan compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnplan.cli.console import Stages, print_table
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
        check_apart(db, {"--out": out})
    loaded, work = workload(model, data, context, sequences, seed, device, dtype, trust_remote_code)
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
        print_json({"density": density, "entries": [asdict(entry) for entry in entries]})
    else:
        print_table(f"{context} tokens, density at most {density}", HEADERS, lines(entries))
