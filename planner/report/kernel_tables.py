"""Rows of a sweep over attention kernels as tables that people read."""

from __future__ import annotations

from collections.abc import Iterator

from attnplan.bench.rows import Row
from attnplan.bench.sweep import Outcome

Table = tuple[str, tuple[str, ...], list[list[str]]]
TIMED = (
    *(
        "what",
        "length",
        "heads",
        "dim",
        "density",
        "ms",
        "quartiles",
        "warm",
        "dense",
        "by",
        "TFLOP/s",
    ),
    *("eta", "host us"),
)


def tables(outcome: Outcome) -> Iterator[Table]:
    """What people read: title, headers and rows, part by part."""
    good = [row for row in outcome.rows if row.error is None]
    for title, headers, cells, rows in (
        (
            "Errors against the reference in float64",
            ("kind", "dtype", "dim", "relative error", "allowed", "largest", "right"),
            _error_cells,
            [row for row in outcome.rows if row.part == "errors" and row.density is not None],
        ),
        (
            "Layers beside the best dense attention",
            TIMED,
            _timed_cells,
            [row for row in good if row.part in ("dense", "layers", "mixed", "far")],
        ),
        (
            "Layers of several kinds, ms",
            (
                "length",
                "dim",
                "one launch",
                "balanced",
                "sum of its parts",
                "head by head",
                "parts",
            ),
            _mixed_cells,
            [row for row in good if row.part == "mixed"],
        ),
        (
            "Crossover lengths",
            ("what", "density", "dim", "faster than dense from", "ms / dense ms by length"),
            _crossover_cells,
            [row for row in good if row.part == "crossover"],
        ),
        (
            "A generated token, one layer",
            ("kept", "after", "dim", "ms", "mean", "dense", "dense mean", "bytes"),
            _decode_cells,
            [row for row in good if row.part == "decode"],
        ),
        (
            "What the host does for a generated token and a layer, us of one thread",
            ("kept", "heads", "dim", "median", "quartiles", "DynamicCache, sdpa", "more"),
            _host_cells,
            [row for row in good if row.part == "host"],
        ),
        (
            "Without numbers, or with wrong ones",
            ("part", "what", "length", "dim", "dtype", "error"),
            _failed_cells,
            [row for row in outcome.rows if row.error is not None],
        ),
    ):
        if rows:
            yield title, headers, [cells(row) for row in rows]


def _error_cells(row: Row) -> list[str]:
    largest = row.more.get("largest_error")
    sizes = [_short(x, ".1e") for x in (row.relative_error, row.allowed, largest)]
    return [row.name, row.dtype, str(row.head_dim), *sizes, "no" if row.wrong else "yes"]


def _timed_cells(row: Row) -> list[str]:
    return [
        row.more.get("approximation", row.name),
        str(row.length),
        f"{row.heads}/{row.kv_heads}",
        str(row.head_dim),
        _short(row.density, ".3f"),
        _short(row.median_ms, ".4g"),
        f"{_short(row.q25_ms, '.4g')} to {_short(row.q75_ms, '.4g')}",
        _short(row.warm_ms, ".4g"),
        _short(row.dense_ms, ".4g"),
        row.dense_backend or "",
        _short(row.dense_tflops, ".4g"),
        _short(row.eta, ".2f"),
        _short(row.host_us, ".0f"),
    ]


def _mixed_cells(row: Row) -> list[str]:
    more = row.more
    parts = ", ".join(f"{name} {ms:.4g}" for name, ms in more["parts_ms"].items())
    times = (
        *(row.median_ms, more.get("balanced_ms")),
        *(more["sum_of_parts_ms"], more["head_by_head_ms"]),
    )
    return [str(row.length), str(row.head_dim), *(_short(t, ".4g") for t in times), parts]


def _crossover_cells(row: Row) -> list[str]:
    tried = [f"{t['length']}: {t['ms']:.4g}/{t['dense_ms']:.4g}" for t in row.more["tried"]]
    found = row.more["crossover"]
    target = "" if row.target is None else f"{row.target:g}"
    shown = "none of these" if found is None else str(found)
    return [row.name, target, str(row.head_dim), shown, ", ".join(tried)]


def _decode_cells(row: Row) -> list[str]:
    more = row.more
    times = row.median_ms, more["mean_ms"], row.dense_ms, more["dense_mean_ms"]
    shown = [_short(t, ".4g") for t in times]
    return [row.name, str(row.length), str(row.head_dim), *shown, _short(more["share"], ".3f")]


def _host_cells(row: Row) -> list[str]:
    more = row.more
    quartiles = f"{more['q25_us']:.0f} to {more['q75_us']:.0f}"
    others = [f"{x:.0f}" for x in (more["dense_median_us"], more["over_us"])]
    sizes = f"{row.heads}/{row.kv_heads}", str(row.head_dim)
    return [row.name, *sizes, _short(row.host_us, ".0f"), quartiles, *others]


def _failed_cells(row: Row) -> list[str]:
    asked = "" if row.target is None else f" at {row.target:g}"
    sizes = str(row.length), str(row.head_dim), row.dtype
    return [row.part, f"{row.name}{asked}", *sizes, row.error or ""]


def _short(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
