"""A method or a keeper from how a plan spells it: {name: ..., knobs}, all knobs whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

MOST = 1 << 24
"""Of every knob: knobs count keys, blocks or features, and no text is as long."""

T = TypeVar("T")


def build(known: Mapping[str, type[T]], spelled: Mapping[Any, Any], what: str) -> T:
    """The value that is spelled.

    Args:
        known: name to class, a dataclass whose fields are the knobs.
        spelled: with the key 'name'.
        what: a class of `known`, in words.

    Raises:
        ValueError: an unknown name or knob, or a bad value; the message names what is known.
    """
    name = spelled["name"]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    knobs = {knob: value for knob, value in spelled.items() if knob != "name"}
    names = {f.name for f in fields(known[name])}  # type: ignore[arg-type]
    for knob, value in knobs.items():
        if knob not in names:
            raise ValueError(f"{name} has no knob {knob!r}; known: {', '.join(sorted(names))}")
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}: {knob} must be a whole number, got {value!r}")
        if value > MOST:
            raise ValueError(f"{name}: {knob} must be at most {MOST}, got {value}")
    try:
        return known[name](**knobs)
    except TypeError as error:
        raise ValueError(f"bad knobs for {name}: {error}") from None
