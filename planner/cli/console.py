"""What the command line shows: progress with time left, tables, and errors in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

STORE = "attnplan.profiles.store.database"


@cache
def errors() -> Console:
    """Progress and messages; standard output is for results alone."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class Stages:
    """Progress of a command, stage by stage, on standard error."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=errors(),
        )
        self._task: TaskID | None = None
        self._name = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()
        if kind is KeyboardInterrupt:
            errors().print("interrupted; the same command goes on where this one stopped")

    def stage(self, name: str, total: int | None) -> None:
        self._finish()
        self._name = name
        self._task = self._bars.add_task(name, total=total, detail="")
        if not errors().is_terminal:
            errors().print(name)

    def advance(self, detail: str = "") -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=1, detail=detail)

    def _finish(self) -> None:
        if self._task is not None:
            done = self._bars.tasks[-1].completed
            self._bars.update(self._task, total=done or 1, completed=done or 1, detail="")
            self._task = None


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    for header, right in zip(headers, numeric, strict=True):
        table.add_column(header, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(table)


def _is_number(cell: str) -> bool:
    return bool(cell) and cell.rstrip("x%").replace(".", "", 1).replace("-", "", 1).isdigit()


@contextmanager
def one_sentence() -> Iterator[None]:
    """Expected errors become one sentence on standard error and an exit code.

    Exit codes: 1 a budget that cannot be met, 2 bad input.
    """
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code is None:
            raise
        named = isinstance(error, OSError) and None not in (error.filename, error.strerror)
        leave(f"{error.filename}: {error.strerror}" if named else str(error), code)  # type: ignore[attr-defined]


def _code(error: Exception) -> int | None:
    """The exit code of an expected error; None for one that is not.

    What was never imported has raised nothing: help comes without the store and its libraries.
    """
    budget, store = map(sys.modules.get, ("attnplan.search.budget", STORE))
    if budget is not None and isinstance(error, budget.BudgetError):
        return 1
    expected = (
        (ValueError, OSError) if store is None else (ValueError, OSError, store.DatabaseError)
    )
    return 2 if isinstance(error, expected) else None


def leave(message: str, code: int) -> None:
    """Say why on standard error, and exit."""
    errors().print(f"attnplan: {message}", style="red", soft_wrap=True, markup=False)
    raise SystemExit(code)


def quiet_libraries() -> None:
    """transformers' own progress bars and advice stay away from our output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
