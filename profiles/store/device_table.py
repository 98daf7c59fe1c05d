"""Timings of a device as a file that travels: JSON lines, one timing each, complete in itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from attnplan.profiles.records.digest import canonical
from attnplan.profiles.records.records import DeviceIdentity, KernelTiming
from attnplan.profiles.store.database import Store
from attnplan.profiles.store.output_files import check_output, replace_file

VERSION = 1
"""Of the format; every line carries it."""
LONGEST = 1 << 20
"""Bytes of a line."""

T = TypeVar("T")


def export_timings(store: Store, path: Path, device: DeviceIdentity | None = None) -> int:
    """Write the timings of one device, or of all, to `path`; returns how many.

    Each line is `{"version": 1, "device": {name, kind, driver, threads, versions}, "timing":
    {engine, dtype, heads, ...}}` with the fields of the two records.
    """
    lines = [
        canonical({"version": VERSION, "device": asdict(where), "timing": asdict(timing)})
        for where in ([device] if device else store.devices())
        for timing in store.load_timings(where)
    ]
    check_table(path)
    replace_file(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def check_table(path: Path) -> None:
    """Raises ValueError where timings cannot be written, or would replace another file."""
    check_output(path, "a table of timings", _is_table)


def _is_table(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(LONGEST)
    try:
        _parse(first.decode())
    except ValueError:
        return False
    return True


def import_timings(store: Store, path: Path) -> int:
    """Add the timings of a file to the store, all or none; returns how many.

    Raises:
        ValueError, OSError: see `read_timings`.
    """
    return store.import_timings(read_timings(path))


def read_timings(path: Path) -> list[tuple[DeviceIdentity, list[KernelTiming]]]:
    """The timings of a file, by device.

    Raises:
        ValueError: a line is not what `export_timings` writes; the message names file and line.
        OSError: the file cannot be read.
    """
    found: dict[str, tuple[DeviceIdentity, list[KernelTiming]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is no text file, so no table of timings") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                device, timing = _parse(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            found.setdefault(device.digest, (device, []))[1].append(timing)
    return list(found.values())


def _parse(line: str) -> tuple[DeviceIdentity, KernelTiming]:
    row = json.loads(line)
    if not isinstance(row, dict) or row.keys() != {"version", "device", "timing"}:
        raise ValueError('not a timing: want an object of "version", "device" and "timing"')
    if row["version"] != VERSION:
        raise ValueError(f"format version {row['version']!r}, this attnplan reads {VERSION}")
    device = _record(DeviceIdentity, row["device"], "device")
    timing = _record(KernelTiming, row["timing"], "timing")
    if not min(timing.median_ms, timing.q25_ms, timing.q75_ms) > 0:
        raise ValueError(f"a time must be above 0 ms, got median {timing.median_ms}")
    return device, timing


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "Mapping[str, str]": (dict,),
}


def _record(cls: type[T], value: Any, what: str) -> T:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object, got {value!r}")
    wanted = {f.name: str(f.type) for f in fields(cls)}  # type: ignore[arg-type]
    for name in sorted(wanted.keys() ^ value.keys()):
        raise ValueError(f"{what}: {'missing' if name in wanted else 'unknown'} field {name!r}")
    for name, kind in wanted.items():
        if isinstance(value[name], bool) or not isinstance(value[name], _TYPES[kind]):
            raise ValueError(f"{what}: {name} must be {kind}, got {value[name]!r}")
    return cls(**value)
