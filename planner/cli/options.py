"""Options and arguments that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
