"""`attnplan demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnplan.cli.options import (
    DATABASE,
    Context,
    Database,
)
from attnplan.cli.search import search

DEMO = "smollm2-135m"


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
