"""Of knobs: how plans of before spell them, and from where on settings are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

LATER: Mapping[str, object] = {"later": True}
"""Metadata of a knob that is spelled where it is not its default alone: it is newer than plans and
tables that spell its method without it."""

SHORT = 32
"""Recent keys of the shortest window; those of a query block and the one before are near anyway."""
LEAST = 2048
"""Keys from which a far field beside single keys is worth trying."""
