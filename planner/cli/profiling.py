"""`attnplan profile`."""

from __future__ import annotations

from typing import Any

from attnplan.cli.console import Stages, print_table
from attnplan.cli.inputs import workload
from attnplan.cli.options import (
    CAPTURES,
    DATABASE,
    Context,
    Data,
    Database,
    Device,
    Dtype,
    Model,
    Seed,
    Sequences,
    Trust,
)


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

    loaded, work = workload(model, data, context, sequences, seed, device, dtype, trust_remote_code)
    with (
        Store(db) as store,
        captures(loaded, work, CAPTURES, keep=True) as files,
        Stages() as progress,
    ):
        progress.stage("Profiling", work.texts + 1)
        run = run_profile(loaded, work, store, files, progress.advance)
        heads = store.head_profiles(run.id, arrays=False)
    _print_profile(run.id, heads)


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
