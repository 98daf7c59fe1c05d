"""Where long steps report to."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """Where long steps report to."""

    def stage(self, name: str, total: int | None) -> Any:
        """Begin a stage of `total` units, or of an unknown number."""

    def advance(self, detail: str = "") -> None:
        """One unit is done, or begins with what `detail` says."""


class Quiet:
    """No progress."""

    def stage(self, name: str, total: int | None) -> None:
        pass

    def advance(self, detail: str = "") -> None:
        pass
