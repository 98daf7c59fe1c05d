"""Questions to the store: views that join what belongs together, filtered, ordered and limited.

    run_query(store, "heads", where="sink_mass > 0.5 and k_rank95 < 16", order_by="sink_mass desc")

Filters are parsed (`store/filters.py`) and their values bound: no text of a user's reaches SQL.
"""

from __future__ import annotations

import csv
import io
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Double,
    LargeBinary,
    Select,
    String,
    Subquery,
    Text,
    and_,
    func,
    literal,
    not_,
    null,
    or_,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy import cast as sql_cast

from attnplan.profiles.records.arrays import unpack
from attnplan.profiles.records.records import PLAN_FIGURES
from attnplan.profiles.records.scalars import SCALARS
from attnplan.profiles.store import filters
from attnplan.profiles.store.database import Store
from attnplan.profiles.store.tables import (
    DatasetRow,
    DeviceRow,
    HeadRow,
    ModelRow,
    PlanRow,
    RunRow,
    ScoreRow,
    SearchRow,
    ShardRow,
    TimingRow,
    table,
)

SPECTRUM_LENGTH = 16
"""Leading values that the view `spectra` shows of a spectrum."""


@dataclass(frozen=True)
class View:
    """What can be asked about.

    Attributes:
        rows: all columns and all rows.
        order: the columns that order the rows where the question does not, and break its ties.
        brief: the columns that fit a terminal.
        help: column to what it holds, where the name does not say it.
    """

    rows: Subquery
    order: tuple[str, ...]
    brief: tuple[str, ...]
    help: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.rows.c.keys())

    @property
    def kinds(self) -> dict[str, str]:
        """Column to what it holds, of those that can be filtered and ordered."""
        kinds = {name: _kind(column) for name, column in self.rows.c.items()}
        return {name: kind for name, kind in kinds.items() if kind}


@dataclass(frozen=True)
class Table:
    """The answer to a question: numbers, texts, None, and lists or dictionaries of them."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def to_json(self) -> str:
        """A list of objects; what is not finite becomes null."""
        found = [dict(zip(self.columns, map(_finite, row), strict=True)) for row in self.rows]
        return json.dumps(found, ensure_ascii=False, allow_nan=False)

    def to_csv(self) -> str:
        """A line of names and a line per row; a list is JSON, a missing value is empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow(json.dumps(v) if isinstance(v, list | dict) else v for v in row)
        return out.getvalue()

    def only(self, columns: tuple[str, ...]) -> Table:
        """The same rows with some of the columns."""
        index = [self.columns.index(name) for name in columns]
        return Table(columns, [tuple(row[i] for i in index) for row in self.rows])


def run_query(
    store: Store,
    view: str,
    where: str | None = None,
    order_by: str | None = None,
    limit: int | None = None,
) -> Table:
    """Rows of a view.

    Args:
        view: one of `VIEWS`.
        where: a filter, see `profiles/store/filters.py`.
        order_by: columns, separated by commas, each alone or followed by `desc` or `asc`. Missing
            values come last.
        limit: at most so many rows.

    Raises:
        ValueError: there is no such view or column, or the filter is none.
        DatabaseError: the database fails.
    """
    found = view_of(view)
    statement = select(found.rows)
    if where is not None:
        tree = filters.parse_filter(where, found.kinds, view)
        statement = statement.where(_condition(tree, found.rows))
    statement = statement.order_by(*_order(order_by, found, view))
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        statement = statement.limit(limit)
    with store.reading() as connection:
        rows = connection.execute(statement).all()
    return Table(found.columns, [tuple(map(_decoded, row)) for row in rows])


def view_of(name: str) -> View:
    """The view of this name."""
    if name not in VIEWS:
        raise ValueError(f"unknown view {name!r}; known: {', '.join(VIEWS)}")
    return VIEWS[name]


def _kind(column: ColumnElement[Any]) -> str | None:
    if isinstance(column.type, Boolean):
        return filters.TRUTH
    if isinstance(column.type, String):
        return filters.TEXT
    return filters.NUMBER if column.type.python_type in (int, float) else None


def _decoded(value: Any) -> Any:
    """A spectrum as a list of its first values; anything else as it is."""
    if isinstance(value, bytes):
        return [float(x) for x in unpack(value).reshape(-1)[:SPECTRUM_LENGTH]]
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _order(text: str | None, view: View, name: str) -> list[ColumnElement[Any]]:
    found = []
    for part in text.split(",") if text else ():
        words = part.split()
        if not words or len(words) > 2 or (words[1:] and words[1].lower() not in ("asc", "desc")):
            raise ValueError(
                f"order: {part.strip()!r} is not a column, or a column and asc or desc"
            )
        if words[0] not in view.kinds:
            raise ValueError(f"order: {filters.unknown_column(words[0], view.kinds, name)}")
        column = view.rows.c[words[0]]
        found.append(column.desc() if words[1:] and words[1].lower() == "desc" else column.asc())
    found += [view.rows.c[column].asc() for column in view.order]
    return [column.nulls_last() for column in found]


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _condition(tree: filters.Filter, rows: Subquery) -> ColumnElement[bool]:
    """The SQL of a filter."""
    match tree:
        case filters.And(parts):
            return and_(*(_condition(part, rows) for part in parts))
        case filters.Or(parts):
            return or_(*(_condition(part, rows) for part in parts))
        case filters.Not(part):
            return not_(_condition(part, rows))
        case filters.Compare(left, sign, right):
            return cast(
                "ColumnElement[bool]", _OPERATORS[sign](_operand(left, rows), _operand(right, rows))
            )
        case filters.IsNull(column):
            return rows.c[column.name].is_(null())
        case filters.In(column, values):
            return or_(*(rows.c[column.name] == _operand(value, rows) for value in values))
        case filters.Like(column, pattern):
            escaped = pattern.replace("\\", "\\\\")
            return rows.c[column.name].ilike(literal(escaped, Text), escape="\\")


def _operand(value: filters.Column | filters.Literal, rows: Subquery) -> ColumnElement[Any]:
    """A column, or a bound value with its own type: an integer column compares with 1.5."""
    if isinstance(value, filters.Column):
        return rows.c[value.name]
    if isinstance(value, bool):
        return literal(value, Boolean)
    return literal(value, Text if isinstance(value, str) else Double)


_run, _model, _dataset = table(RunRow).c, table(ModelRow).c, table(DatasetRow).c
_head, _score, _device = table(HeadRow).c, table(ScoreRow).c, table(DeviceRow).c
_timing, _search, _plan = table(TimingRow).c, table(SearchRow).c, table(PlanRow).c

_OF_RUN = (
    _run.id.label("run"),
    _model.name.label("model"),
    _dataset.name.label("dataset"),
    _dataset.split,
    _run.context,
    _run.dtype,
    _run.status,
)
_BY_HEAD = ("model", "run", "layer", "head")


def _with_run(statement: Select[Any], run: ColumnElement[Any]) -> Select[Any]:
    """`statement`, which reads a table with a column `run`, joined with what a run is about."""
    return (
        statement.join(table(RunRow), _run.id == run)
        .join(table(ModelRow), _model.id == _run.model_id)
        .join(table(DatasetRow), _dataset.id == _run.dataset_id)
    )


def _heads() -> View:
    scalars = [_head[name] for name, _ in SCALARS]
    statement = select(*_OF_RUN, _head.layer, _head.head, *scalars).select_from(table(HeadRow))
    brief = ("model", "context", "layer", "head", "sink_mass", "local_mass_256", "entropy",
             "effective_keys", "top_block_mass_8", "a_effective_rank", "k_rank95", "v_rank95",
             "fisher_total")  # fmt: skip
    return View(_with_run(statement, _head.run_id).subquery(), _BY_HEAD, brief, dict(SCALARS))


def _spectra() -> View:
    parts = []
    for tensor in ("q", "k", "v", "a"):
        missing = sql_cast(null(), Double)
        ranks = [
            (missing if tensor == "a" else _head[f"{tensor}_rank{share}"]).label(f"rank{share}")
            for share in (90, 95, 99)
        ]
        spectrum = _head[f"{tensor}_spectrum"]
        statement = select(
            *_OF_RUN,
            _head.layer,
            _head.head,
            literal(tensor, Text).label("tensor"),
            *ranks,
            _head[f"{tensor}_effective_rank"].label("effective_rank"),
            type_coerce(spectrum, LargeBinary).label("spectrum"),
        ).select_from(table(HeadRow))
        parts.append(_with_run(statement, _head.run_id).where(spectrum.is_not(null())))
    brief = ("model", "layer", "head", "tensor", "rank90", "rank95", "rank99", "effective_rank")
    help = {
        "tensor": "q, k, v, or a: the attention matrix",
        "spectrum": f"first {SPECTRUM_LENGTH} eigenvalues of the Gram matrix; a: singular values",
    }
    return View(union_all(*parts).subquery(), (*_BY_HEAD, "tensor"), brief, help)


def _timings() -> View:
    names = ("engine", "dtype", "heads", "kv_heads", "head_dim", "queries", "keys", "approximation",
             "median_ms", "q25_ms", "q75_ms", "selection_ms", "repeats", "created")  # fmt: skip
    device = (_device.name.label("device"), _device.kind, _device.driver, _device.threads)
    statement = select(*device, *(_timing[name] for name in names)).join_from(
        table(TimingRow), table(DeviceRow), _device.id == _timing.device_id
    )
    brief = ("device", "dtype", "heads", "kv_heads", "head_dim", "queries", "keys",
             "approximation", "median_ms", "selection_ms")  # fmt: skip
    order = ("device", "dtype", "keys", "queries", "heads", "median_ms", "approximation", "engine")
    return View(statement.subquery(), order, brief)


def _scores() -> View:
    names = ("sequence", "layer", "head", "approximation", "fisher", "relative_error",
             "mass_dropped", "positions")  # fmt: skip
    statement = select(*_OF_RUN, *(_score[name] for name in names)).select_from(table(ScoreRow))
    order = (*_BY_HEAD, "sequence", "fisher", "approximation")
    help = {
        "fisher": "mean of (gradient . output change)^2 per position: what the head costs in KL",
        "relative_error": "norm of the output change over the norm of the output",
        "mass_dropped": "mean attention mass on keys that are neither near nor summarised",
    }
    brief = ("model", "context", *names)
    return View(_with_run(statement, _score.run_id).subquery(), order, brief, help)


def _plans() -> View:
    figures = [name for name, _ in PLAN_FIGURES]
    statement = select(
        _model.name.label("model"),
        _device.name.label("device"),
        _dataset.name.label("dataset"),
        _run.context,
        _run.id.label("run"),
        _search.id.label("search"),
        _search.seed,
        _search.status,
        _search.budget,
        _plan.feasible,
        *(_plan[name] for name in figures),
        (_plan.latency_dense_ms / func.nullif(_plan.latency_ms, 0.0)).label("speedup"),
        _plan.path,
        _plan.digest,
        _plan.created,
    ).select_from(table(PlanRow))
    statement = statement.join(table(SearchRow), _search.id == _plan.search_id)
    statement = statement.join(table(DeviceRow), _device.id == _search.device_id)
    brief = ("model", "device", "context", "feasible", "density", "kl_per_token", "latency_ms",
             "speedup", "path", "created")  # fmt: skip
    rows = _with_run(statement, _search.run_id).subquery()
    return View(rows, ("created", "search", "digest"), brief, dict(PLAN_FIGURES))


def _runs() -> View:
    shards = select(func.count()).select_from(table(ShardRow))
    statement = select(
        *_OF_RUN,
        _model.architecture,
        _model.layers,
        _model.heads,
        _run.sequences,
        _run.seed,
        shards.where(table(ShardRow).c.run_id == _run.id).scalar_subquery().label("shards"),
        _run.created,
        _run.finished,
    ).select_from(table(RunRow))
    statement = statement.join(table(ModelRow), _model.id == _run.model_id)
    statement = statement.join(table(DatasetRow), _dataset.id == _run.dataset_id)
    brief = ("run", "model", "dataset", "context", "sequences", "dtype", "status", "shards",
             "created")  # fmt: skip
    return View(
        statement.subquery(), ("run",), brief, {"shards": "sequences whose statistics are kept"}
    )


VIEWS: dict[str, View] = {
    "heads": _heads(),
    "spectra": _spectra(),
    "timings": _timings(),
    "scores": _scores(),
    "plans": _plans(),
    "runs": _runs(),
}
