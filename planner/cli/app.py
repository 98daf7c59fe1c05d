"""The command line: profile, bench, search, evaluate, compare, query, show, validate, doctor, demo.

Every command parses, calls the library and prints. Results go to standard output, progress and
errors to standard error. Exit codes: 0 done, 1 a budget that cannot be met, 2 bad input.
"""

from __future__ import annotations

import typer

from attnplan.cli.bench import bench
from attnplan.cli.compare import compare
from attnplan.cli.console import one_sentence
from attnplan.cli.demo import demo
from attnplan.cli.doctor import doctor
from attnplan.cli.evaluate import evaluate
from attnplan.cli.plans import show, validate
from attnplan.cli.profiling import profile
from attnplan.cli.query import query
from attnplan.cli.search import search

app = typer.Typer(
    help="Find, for every head of a transformer, the cheapest attention it can live with.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain help takes a third of the time
)
# Commands import what they run when they run: help comes without torch.
for command in (profile, search, evaluate, bench, compare, query, show, validate, doctor, demo):
    app.command()(command)


def main() -> None:
    """The console script."""
    with one_sentence():
        app()
