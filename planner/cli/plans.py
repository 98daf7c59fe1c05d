"""`attnplan show` and `attnplan validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnplan.cli.console import print_table, quiet_libraries
from attnplan.cli.options import (
    DATABASE,
    Database,
    Trust,
)


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
