"""`attnplan evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnplan.cli.console import Stages, print_table, quiet_libraries
from attnplan.cli.options import (
    Context,
    Data,
    Device,
    Json,
    Model,
    Repeats,
    Seed,
    Sequences,
    Trust,
)
from attnplan.cli.printing import cell, print_json


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
        print_json(found)
    else:
        notes = found.pop("notes")
        rows = [[key, cell(value)] for key, value in found.items()]
        print_table("", ("measured", "value"), rows)
        for note in notes:
            print(note)
