"""A sweep over attention kernels on one device: how right, how fast, from which length on.

Rows are ordered by their worth and kept as JSON lines as soon as they are measured. A sweep that
is given so many seconds starts no row after them and names those that it left out; the same file
given again, rows that it holds for the same device and code are not measured anew.
"""

from __future__ import annotations

import gc
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from attnplan.bench.rows import (
    CHECKED_LENGTH,
    MIXED_DENSITY,
    Row,
    Source,
    at_density,
    crossover_row,
    decode_row,
    dense_row,
    error_row,
    host_row,
    layer_row,
    mixed_row,
    pairs,
    parse,
    unfitted_keepers,
)
from attnplan.costs.prefill import this_device
from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.bench.measure import WrongKernel
from attnplan.kernels.cache_catalog import key as keeper_key
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.digest import decode_digest, layer_digest
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.profiles.store.output_files import check_output
from attnplan.profiling.profiling import Advance, silent

VERSION = 1
"""Of the lines in a file of rows."""
PARTS = ("errors", "layers", "mixed", "crossover", "far", "decode", "host")
WORTH = (8192, 32768, 4096, 131072)
"""Lengths in the order of their worth; others come after them."""
METHODS = ("window(window=?, sinks=4)", "block_topk(top=?, local=2)")
"""Patterns whose knob '?' is set so that a density is reached."""
CHECKED_HEADS = 8, 2
"""Query and kv heads of the calls whose numbers are checked."""
NARROW = "window(window=256, sinks=4)"
"""The fourth kind of a layer without far fields."""
FAR = "window(window=128, sinks=4) + centroid_t(chunk=64, slots=8)"
"""That of a layer with them."""
HOST_LENGTH = 16
"""Tokens of the text after which the work of the host is timed: they leave little else to do."""
NO_KEEPERS = "the whole cache"
"""A plan that has no keepers."""
FIXED = "window(window=1024, sinks=4)"
"""Its crossover is asked for, beside that of the last pattern at `MIXED_DENSITY`."""


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        device: cpu, cuda or cuda:N.
        lengths, head_dims, densities: of the timed layers.
        dtype: of the timed layers; None for bfloat16 on a GPU and float32 on a CPU.
        inputs: file of queries, keys and values of real text, see `Source`; None for random ones.
        seconds: after which no row is started; None for no limit.
        parts: of `PARTS`.
        methods: patterns, see `at_density`.
        heads, kv_heads: of every layer.
        beside: heads, kv_heads and head_dim of more layers, timed at the first length where their
            head_dim is asked for; SmolLM2's by default.
        checked_dims, checked_dtypes, checked_length: of the calls whose numbers are checked.
        first_length: where the search for a crossover begins.
        steps: tokens that show the speed of decoding.
        repeats: pairs of timed runs, at least.
        flex: let compiled FlexAttention compete as the dense baseline; compiling takes long.
    """

    device: str = "cpu"
    lengths: tuple[int, ...] = (4096, 8192, 32768, 131072)
    head_dims: tuple[int, ...] = (64, 128)
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    dtype: torch.dtype | None = None
    inputs: Path | None = None
    seconds: float | None = None
    parts: tuple[str, ...] = PARTS
    methods: tuple[str, ...] = METHODS
    heads: int = 32
    kv_heads: int = 8
    beside: tuple[tuple[int, int, int], ...] = ((9, 3, 64),)
    checked_dims: tuple[int, ...] = (64, 80, 96, 128, 256)
    checked_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    checked_length: int = CHECKED_LENGTH
    first_length: int = 1024
    steps: int = 128
    repeats: int = 5
    flex: bool = False

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"unknown part {part!r}; known: {', '.join(PARTS)}")
        for name in ("lengths", "head_dims", "densities"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name} must be positive numbers, got {values}")
        if max(self.densities) > 1:
            raise ValueError(f"densities must be at most 1, got {self.densities}")

    @property
    def timed_dtype(self) -> torch.dtype:
        default = torch.float32 if torch.device(self.device).type == "cpu" else torch.bfloat16
        return self.dtype or default

    @property
    def ordered(self) -> list[int]:
        """Lengths, those that are worth most first."""
        return sorted(set(self.lengths), key=lambda n: (WORTH.index(n) if n in WORTH else 99, n))


@dataclass(frozen=True)
class Outcome:
    """What a sweep found.

    Attributes:
        rows: in the order of their worth.
        left_out: questions that there was no time for, in words.
        conditions: of all rows: device, versions, code, what the numbers were.
    """

    rows: list[Row]
    left_out: list[str]
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.wrong]


@dataclass(frozen=True)
class Case:
    """A row to be measured.

    Attributes:
        row: what is asked.
        measure: fills the row in.
        kinds: methods in it: it is not timed where one of them gave wrong numbers.
    """

    row: Row
    measure: Callable[[Row], Row]
    kinds: frozenset[str]

    @property
    def label(self) -> str:
        row = self.row
        asked = "" if row.target is None else f" at density {row.target:g}"
        heads = f"{row.heads} heads of {row.head_dim}"
        return f"{row.part} {row.name}{asked}, {row.dtype}, {heads} x {row.length}"


def sweep(
    asked: Sweep,
    out: Path | None = None,
    *,
    advance: Advance = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Measure what is asked, as far as time allows.

    Args:
        asked: what to measure.
        out: JSON lines: what they hold is not measured again, and new rows are added.
        advance: called with the name of each row before it is measured.
        clock: seconds that pass.
    """
    begin = clock()

    def enough() -> bool:
        return asked.seconds is not None and clock() - begin >= asked.seconds

    if out is not None:
        check(out)
    plan = _Cases(asked, enough)
    conditions = conditions_of(asked, plan.source.kind)
    known = {} if out is None else read(out, conditions)
    rows: list[Row] = []
    left_out: list[str] = []
    refused: set[tuple[str, int, str]] = set()
    broken = False
    for case in plan:
        row = known.get(case.row.key)
        if row is None and (enough() or broken):
            left_out.append(case.label)
            continue
        if row is None:
            advance(case.label)
            row, broken = _measured(case, refused, plan.device)
            if out is not None:
                append(out, conditions, row)
        if row.part == "errors" and row.wrong:
            refused |= {(kind, row.head_dim, row.dtype) for kind in case.kinds}
        rows.append(row)
    return Outcome(rows, left_out, conditions)


def _measured(
    case: Case, refused: set[tuple[str, int, str]], device: torch.device
) -> tuple[Row, bool]:
    """A row filled in, and whether the device has stopped to answer."""
    row = case.row
    wrong = sorted(k for k in case.kinds if (k, row.head_dim, row.dtype) in refused)
    if wrong and row.part != "errors":
        return replace(row, error=f"not timed: {', '.join(wrong)} gives wrong numbers"), False
    try:
        with torch.no_grad():
            return case.measure(row), False
    except Exception as error:  # a row that fails must not end the sweep
        text = " ".join(f"{type(error).__name__}: {error}".split())
        row = replace(row, error=text[:400], wrong=isinstance(error, WrongKernel))
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return row, True
    return row, False


class _Cases:
    """All rows of a sweep, in the order of their worth; sizes are made when they are needed."""

    def __init__(self, asked: Sweep, enough: Callable[[], bool]) -> None:
        self.asked = asked
        self.device = torch.device(asked.device)
        self.source = Source(self.device, asked.inputs)
        self._enough = enough

    def __iter__(self) -> Iterator[Case]:
        asked = self.asked
        first = [d for d in asked.head_dims]
        yield from self._errors([asked.timed_dtype], first)
        for place, length in enumerate(asked.ordered):
            for head_dim in asked.head_dims:
                yield from self._layers(length, head_dim, (asked.heads, asked.kv_heads))
            if place == 0:
                yield from self._mixed_layers(length)
                for *heads, head_dim in asked.beside:
                    if head_dim in asked.head_dims:
                        yield from self._layers(length, head_dim, (heads[0], heads[1]))
            if place == min(1, len(asked.ordered) - 1):
                yield from self._crossovers()
                yield from self._errors(asked.checked_dtypes, asked.checked_dims, first)
                yield from self._far_fields()
                yield from self._decoding()
                yield from self._host_work()

    def _row(
        self,
        part: str,
        name: str,
        length: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        target: float | None = None,
        heads: tuple[int, int] | None = None,
    ) -> Row:
        spelled = str(dtype or self.asked.timed_dtype).removeprefix("torch.")
        heads = heads or (self.asked.heads, self.asked.kv_heads)
        return Row(part, name, length, head_dim, *heads, spelled, target)

    def _inputs(self, row: Row) -> Inputs:
        dtype = getattr(torch, row.dtype)
        return self.source.inputs(row.length, row.head_dim, row.heads, row.kv_heads, dtype)

    def _shape(self, row: Row) -> AttentionShape:
        return AttentionShape(1, row.heads, row.kv_heads, row.length, row.length, row.head_dim)

    @cached_property
    def _repeated(self) -> dict[str, Any]:
        return {"repeats": self.asked.repeats, "flex": self.asked.flex}

    def _errors(
        self,
        dtypes: Sequence[torch.dtype],
        head_dims: Sequence[int],
        done: Sequence[int] = (),
    ) -> Iterator[Case]:
        """Checks of numbers, but for those of the timed dtype at head_dims that are `done`."""
        if "errors" not in self.asked.parts:
            return
        for dtype in dtypes:
            for head_dim in head_dims:
                if dtype == self.asked.timed_dtype and head_dim in done:
                    continue
                for name, patterns in self._checked.items():
                    length = self.asked.checked_length
                    row = self._row("errors", name, length, head_dim, dtype, heads=CHECKED_HEADS)
                    yield Case(row, partial(self._check, patterns), frozenset({name}))

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """Name of a kind of heads, to a pattern or to what it is; see `_approximation`."""
        return {"dense": "dense()", **{_name(m): m for m in self.asked.methods}, "far": FAR}

    @cached_property
    def _checked(self) -> dict[str, tuple[str, ...]]:
        """Name of a layer whose numbers are checked, to the patterns of its heads."""
        heads = CHECKED_HEADS[0]
        alike = {name: (pattern,) * heads for name, pattern in self._kinds.items()}
        near = self._mixtures["near fields"]
        return alike | {"mixed": tuple(near[head % len(near)] for head in range(heads))}

    def _approximation(self, pattern: str, row: Row, target: float) -> Approximation:
        return at_density(pattern, self._shape(row), target) if "?" in pattern else parse(pattern)

    def _check(self, patterns: Sequence[str], row: Row) -> Row:
        layer = [self._approximation(pattern, row, MIXED_DENSITY) for pattern in patterns]
        return error_row(row, self._inputs(row), layer)

    def _layers(self, length: int, head_dim: int, heads: tuple[int, int]) -> Iterator[Case]:
        make = partial(self._row, length=length, head_dim=head_dim, heads=heads)
        if "layers" in self.asked.parts:
            for name, force in (("dense()", False), ("dense() by the kernel", True)):
                part = "layers" if force else "dense"
                kinds = frozenset({"dense"} if force else ())
                yield Case(make(part, name, target=1.0), partial(self._dense, force), kinds)
            for target in self.asked.densities:
                for pattern in self.asked.methods:
                    row = make("layers", pattern, target=target)
                    yield Case(row, partial(self._alike, pattern), frozenset({_name(pattern)}))

    def _mixed_layers(self, length: int) -> Iterator[Case]:
        if "mixed" not in self.asked.parts:
            return
        for head_dim in self.asked.head_dims:
            for name, patterns in self._mixtures.items():
                row = self._row("mixed", name, length, head_dim, target=MIXED_DENSITY)
                kinds = frozenset({"mixed", *(_name(pattern) for pattern in patterns)})
                yield Case(row, partial(self._mixed, patterns), kinds)

    def _dense(self, force: bool, row: Row) -> Row:
        return dense_row(row, self._inputs(row), force=force, **self._repeated)

    def _alike(self, pattern: str, row: Row) -> Row:
        assert row.target is not None
        found = self._approximation(pattern, row, row.target)
        return layer_row(row, self._inputs(row), found, **self._repeated)

    @cached_property
    def _mixtures(self) -> dict[str, tuple[str, ...]]:
        """Name of a mixture to the patterns of its heads, in equal shares."""
        near = tuple(pattern for name, pattern in self._kinds.items() if name != "far")
        return {"near fields": (*near, NARROW), "with far fields": (*near, FAR)}

    def _mixed(self, patterns: Sequence[str], row: Row) -> Row:
        found = [self._approximation(pattern, row, MIXED_DENSITY) for pattern in patterns]
        return mixed_row(row, self._inputs(row), found, **self._repeated)

    def _crossovers(self) -> Iterator[Case]:
        if "crossover" not in self.asked.parts:
            return
        last, longest = self.asked.methods[-1], max(self.asked.lengths)
        for head_dim in self.asked.head_dims:
            for pattern, target in ((FIXED, None), (last, MIXED_DENSITY)):
                row = self._row("crossover", pattern, longest, head_dim, target=target)
                yield Case(row, self._crossover, frozenset({_name(pattern)}))

    def _crossover(self, row: Row) -> Row:
        def steps() -> Iterator[tuple[int, Inputs, Approximation]]:
            length = self.asked.first_length
            while length <= max(row.length, self.asked.first_length):
                at = replace(row, length=length)
                target = MIXED_DENSITY if row.target is None else row.target
                yield length, self._inputs(at), self._approximation(row.name, at, target)
                length *= 2

        return crossover_row(row, steps(), enough=self._enough, **self._repeated)

    def _far_fields(self) -> Iterator[Case]:
        if "far" not in self.asked.parts:
            return
        head_dim = self.asked.head_dims[0]
        for length in self.asked.ordered[:2]:
            for pair in pairs(self._shape(self._row("far", "", length, head_dim))):
                row = self._row("far", catalog.key(pair), length, head_dim)
                yield Case(row, partial(self._alike_pair, pair), frozenset({"far"}))

    def _alike_pair(self, pair: Approximation, row: Row) -> Row:
        return layer_row(row, self._inputs(row), pair, **self._repeated)

    def _decoding(self) -> Iterator[Case]:
        if "decode" not in self.asked.parts:
            return
        length = self.asked.ordered[0]
        for head_dim in self.asked.head_dims:
            for keeper in unfitted_keepers(length, head_dim):
                row = self._row("decode", keeper_key(keeper), length, head_dim)
                measure = partial(self._decode, keeper)
                yield Case(row, measure, frozenset())

    def _host_work(self) -> Iterator[Case]:
        if "host" not in self.asked.parts:
            return
        heads, head_dim = CHECKED_HEADS, self.asked.head_dims[0]
        # the first of every kind: what the host does depends on nothing else
        kinds = {type(k): k for k in reversed(unfitted_keepers(self.asked.ordered[0], head_dim))}
        kept = {keeper_key(keeper): (keeper,) * heads[1] for keeper in kinds.values()}
        one, *others = [kinds[kind] for kind in sorted(kinds, key=lambda kind: kind.name)]
        kept |= {NO_KEEPERS: (), "two kinds": (one, *others[:1] * (heads[1] - 1))}
        for name, row in kept.items():
            asked = self._row("host", name, HOST_LENGTH, head_dim, heads=heads)
            yield Case(asked, partial(self._host, row), frozenset())

    def _host(self, layer: tuple[Any, ...], row: Row) -> Row:
        return host_row(row, self._inputs(row), layer, self.asked.steps)

    def _decode(self, keeper: Any, row: Row) -> Row:
        return decode_row(row, self._inputs(row), keeper, self.asked.steps)


def _name(pattern: str) -> str:
    """The kind of heads that a pattern makes."""
    return "far" if " + " in pattern else pattern.split("(", 1)[0]


def conditions_of(asked: Sweep, inputs: str) -> dict[str, Any]:
    """What all rows of a sweep have in common; none may differ where rows are used again."""
    device = torch.device(asked.device)
    here = this_device(device)
    return {
        "version": VERSION,
        "device": here.name,
        "kind": here.kind,
        "driver": driver(device),
        "cuda": here.driver,
        "threads": here.threads,
        **here.versions,
        "engine": layer_digest(here.kind, {*catalog.NEAR.values(), *catalog.FAR.values()}),
        "decode_engine": decode_digest(here.kind, cache_catalog.KEEPERS.values()),
        "inputs": inputs,
    }


def driver(device: torch.device) -> str:
    """Version of the GPU's driver; empty on a CPU, and where nobody says."""
    if device.type != "cuda":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (found.stdout.split() or [""])[0]


def append(path: Path, conditions: dict[str, Any], row: Row) -> None:
    """Add a row to a file of JSON lines, complete in itself."""
    line = json.dumps({**conditions, **asdict(row)}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    ended = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n" if ended else f"\n{line}\n")


def check(path: Path) -> None:
    """Raises ValueError where rows cannot be added to a file, before anything is measured."""
    check_output(path, "rows of a sweep", lambda file: read(file, {}) is not None)


def read(path: Path, conditions: dict[str, Any]) -> dict[tuple[object, ...], Row]:
    """The rows of a file that were measured under the same conditions and have no error.

    Raises:
        ValueError: a line is no row; the message names file and line.
    """
    found: dict[tuple[object, ...], Row] = {}
    if not path.exists():
        return found
    names = {f.name for f in fields(Row)}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is no text file, so it holds no rows of a sweep") from None
    for number, line in enumerate(lines, start=1):
        try:
            stored = json.loads(line)
            row = Row(**{name: stored[name] for name in names})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no row of a sweep: {error}") from None
        if row.error is None and all(stored.get(k) == v for k, v in conditions.items()):
            found[row.key] = row
    return found
