"""`attnplan query`."""

from __future__ import annotations

from typing import Annotated

import typer

from attnplan.cli.console import print_table
from attnplan.cli.options import (
    DATABASE,
    Database,
)
from attnplan.cli.printing import cell


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
        rows = [[cell(row[place]) for place in places] for row in table.rows]
        print_table("", brief, rows)
