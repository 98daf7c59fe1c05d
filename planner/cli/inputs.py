"""What commands are given: a model with its texts, and files that must not be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnplan.cli.console import quiet_libraries


def check_apart(db: str, outputs: dict[str, Path]) -> None:
    """Raises ValueError where a command would write a file and its store to one place."""
    from attnplan.profiles.store.migrations.engine import file_of
    from attnplan.profiles.store.output_files import check_apart as check

    store = file_of(db)
    check(outputs, {} if store is None else {"--db": store})


def workload(
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
