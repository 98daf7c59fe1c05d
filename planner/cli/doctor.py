"""`attnplan doctor`."""

from __future__ import annotations

from attnplan.cli.console import print_table


def doctor() -> None:
    """Say what this machine can run."""
    from attnplan.report.explain import machine_rows

    print_table("", ("what", "here"), machine_rows())
