"""Plan files as text: YAML that knows where every value stands, and head ranges such as "0-4, 7".

The reader takes plain YAML only: no tags, no anchors, no duplicate keys. Every value is an `Entry`,
which knows its file, its dotted place and its line, so that whoever checks it can say exactly what
is wrong and where.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 24
"""Bytes of a plan file: reading more would take minutes, and 100 layers of 100 heads need 1 MB."""


LONGEST = 1 << 40
"""Of every length and count in a plan, unless a smaller bound is named."""
SAID = 800
"""Characters of an error: a value may be as long as the file."""
DEEPEST = 50
"""Mappings and lists within each other."""


class PlanError(ValueError):
    """A plan that cannot be read, or that does not fit the model it is applied to."""


@dataclass(frozen=True)
class Entry:
    """One value of a YAML file, with its place.

    Attributes:
        file: the file, as the user named it.
        place: dotted path from the top, such as `phases.prefill[0].layers.3`; empty at the top.
        line: line of the value, from 1.
        value: None, bool, int, float, str, a list of entries, or a dict of entries.
    """

    file: str
    place: str
    line: int
    value: Any

    def error(self, message: str) -> PlanError:
        """The error to raise when something is wrong here."""
        told = f"{self.place}: {message}" if self.place else message
        told = " ".join(told.split())
        told = told if len(told) <= SAID else f"{told[:SAID]}..."
        return PlanError(f"{self.file}: {told} (line {self.line})")

    def items(self) -> Iterator[tuple[Any, Entry]]:
        """Keys and entries of a mapping."""
        yield from self._typed(dict, "a mapping").items()

    def entries(self) -> list[Entry]:
        """Entries of a list."""
        entries: list[Entry] = self._typed(list, "a list")
        return entries

    def fields(self, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Entry]:
        """Entries of a mapping that has all `required` keys and no unknown ones."""
        mapping: dict[str, Entry] = self._typed(dict, "a mapping")
        known = [*required, *optional]
        for key, entry in mapping.items():
            if key not in known:
                raise entry.error(f"unknown key; known here: {', '.join(known)}")
        for key in required:
            if key not in mapping:
                raise self.error(f"{key} is missing")
        return mapping

    def text(self) -> str:
        """A string."""
        return str(self._typed(str, "text"))

    def integer(self, least: int = 0, most: int = LONGEST) -> int:
        """An integer of at least `least` and at most `most`."""
        number = int(self._typed(int, "an integer"))
        if number < least:
            raise self.error(f"must be at least {least}, got {number}")
        if number > most:
            raise self.error(f"must be at most {most}, got {_shown(number)}")
        return number

    def number(self) -> float:
        """A finite number."""
        number = self.value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise self.error(f"must be a number, got {_shown(self.plain())}")
        if not -LONGEST <= number <= LONGEST:
            raise self.error(f"must be a finite number, got {_shown(number)}")
        return float(number)

    def pair(self, least: int = 0) -> tuple[int, int]:
        """A range [low, high] of two integers in order."""
        entries = self.entries()
        if len(entries) != 2:
            raise self.error(f"must be [low, high], got {len(entries)} values")
        low, high = (entry.integer(least) for entry in entries)
        if low > high:
            raise self.error(f"the low end {low} is above the high end {high}")
        return low, high

    def plain(self) -> Any:
        """The value without places: scalars, lists and dicts."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def _typed(self, kind: type, words: str) -> Any:
        if not isinstance(self.value, kind) or (kind is int and isinstance(self.value, bool)):
            raise self.error(f"must be {words}, got {_shown(self.plain())}")
        return self.value


def read(path: Path) -> Entry:
    """The top entry of a YAML file.

    Raises:
        PlanError: the file is missing, is no YAML, or uses a feature that plans do without.
    """
    file = str(path)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise PlanError(f"{file}: no plan has {size} bytes; they are below {LARGEST}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{file}: cannot be read: {_reason(error)}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise Entry(file, "", 1, None).error("the file is empty")
        return _entry(loader, node, file, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise Entry(file, "", line, None).error(f"not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "position", None) or 0) + 1
        raise Entry(file, "", line, None).error(f"not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                problem="anchors and aliases are not used in plans", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")}


def _entry(loader: _Loader, node: yaml.Node, file: str, place: str) -> Entry:
    line = node.start_mark.line + 1
    if place.count(".") + place.count("[") > DEEPEST:
        raise Entry(file, "", line, None).error(f"more than {DEEPEST} levels within each other")
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        mapping: dict[Any, Entry] = {}
        for key_node, value_node in node.value:
            key = _scalar(loader, key_node, file, place)
            entry = _entry(loader, value_node, file, f"{place}.{key}" if place else str(key))
            if key in mapping:
                raise Entry(file, place, key_node.start_mark.line + 1, None).error(
                    f"{key} is listed twice"
                )
            mapping[key] = entry
        return Entry(file, place, line, mapping)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        entries = [_entry(loader, n, file, f"{place}[{i}]") for i, n in enumerate(node.value)]
        return Entry(file, place, line, entries)
    return Entry(file, place, line, _scalar(loader, node, file, place))


def _scalar(loader: _Loader, node: yaml.Node, file: str, place: str) -> Any:
    where = Entry(file, place, node.start_mark.line + 1, None)
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
        kind = node.tag.rsplit(":", 1)[-1]
        raise where.error(f"a YAML {kind} has no meaning here; quote it if it is text")
    try:
        return loader.construct_object(node)
    except (ValueError, LookupError, ArithmeticError, TypeError) as error:  # as of !!int ""
        raise where.error(f"{_shown(node.value)}: {_reason(error)}") from None


class Flow(dict[Any, Any]):
    """A mapping that is written on one line."""


class FlowList(list[Any]):
    """A list that is written on one line."""


def _style(text: str) -> str | None:
    """Double quotes where YAML would read a line break of Unicode as one of its own."""
    return '"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    Flow, lambda d, data: d.represent_mapping("tag:yaml.org,2002:map", data.items(), True)
)
_Dumper.add_representer(
    str, lambda d, text: d.represent_scalar("tag:yaml.org,2002:str", text, _style(text))
)
_Dumper.add_representer(
    FlowList, lambda d, data: d.represent_sequence("tag:yaml.org,2002:seq", data, True)
)


def write(data: dict[str, Any]) -> str:
    """YAML text of nested plain values, in the given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def readable(value: Any) -> Any:
    """The same plain value, mappings and lists of scalars marked to be written on one line."""
    if isinstance(value, dict):
        inner = {key: readable(item) for key, item in value.items()}
        return inner if any(isinstance(v, dict | list) for v in inner.values()) else Flow(inner)
    if isinstance(value, list):
        nested = [readable(item) for item in value]
        return nested if any(isinstance(v, dict | list) for v in nested) else FlowList(nested)
    return value


def plain(value: Any, place: str) -> Any:
    """A copy that survives a YAML file unchanged; tuples become lists.

    Raises:
        PlanError: something is no plain value, such as a tensor or NaN.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise PlanError(f"{place}: keys must be text or integers, got {key!r}")
        return {key: plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if type(value) is float and math.isnan(value):
        raise PlanError(f"{place}: NaN is not a result")
    if value is not None and type(value) not in (bool, int, float, str):
        raise PlanError(f"{place}: must be a plain value, got {type(value).__name__}")
    return value


def ranges(numbers: Sequence[int]) -> int | str:
    """Ascending numbers as a person would write them: 5, or "0-4, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return numbers[0]
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def parse_ranges(value: Any, count: int, word: str) -> list[int]:
    """The numbers of "0-4, 7", each below `count`.

    Raises:
        ValueError: it is no such text, or a `word` does not exist; the caller adds the place.
    """
    parts = (
        [value] if isinstance(value, int) and not isinstance(value, bool) else str(value).split(",")
    )
    numbers: list[int] = []
    for part in parts:
        low, dash, high = str(part).strip().partition("-")
        if not low.strip().isdecimal() or (dash and not high.strip().isdecimal()):
            raise ValueError(f"{_shown(value)} is no list of {word}s; write 5 or '0-4, 7'")
        first, last = int(low), int(high or low)
        if first > last:
            raise ValueError(f"{str(part).strip()!r} counts backwards")
        if last >= count:
            raise ValueError(f"{word} {last} does not exist; there are {count}, from 0")
        numbers.extend(range(first, last + 1))
        if len(numbers) > count:
            raise ValueError(f"{_shown(value)} lists a {word} twice; there are {count}, from 0")
    return numbers


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
