"""The store: everything that attnplan has learnt, in one database.

Every row is keyed by what determines it and every unit of work is one transaction. So a process
that dies leaves no half unit, the same command again computes only what is missing, and several
processes may do the same work at once: the first one to finish a unit has written it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import numpy as np
from sqlalchemy import Connection, Table, select, update
from sqlalchemy.exc import DBAPIError, StatementError

from attnplan.profiles.records import magnitudes, records
from attnplan.profiles.records.arrays import Array, narrow, pack, pack_all, unpack, unpack_all
from attnplan.profiles.records.digest import digest
from attnplan.profiles.records.scalars import ARRAY_NAMES, SCALAR_NAMES
from attnplan.profiles.store.migrations.engine import DatabaseError as DatabaseError
from attnplan.profiles.store.migrations.engine import explained, open_engine
from attnplan.profiles.store.tables import (
    TIMING_KEY,
    DatasetRow,
    DeviceRow,
    FittedRow,
    HeadRow,
    MeasurementRow,
    ModelRow,
    PlanRow,
    RunRow,
    ScoreRow,
    ScoreShardRow,
    SearchRow,
    ShardRow,
    TimingRow,
    get_or_create,
    insert_missing,
    table,
    upsert,
)

MAGNITUDES = "magnitudes"
"""Among the settings of a run: how large the weights of its model are."""
_FITTED_KEY = ("run_id", "layer", "name")
T = TypeVar("T")


class Store:
    """A database of profiles, scores, timings, searches, plans and measurements.

    Args:
        url: SQLAlchemy URL, such as `sqlite:///attnplan.db` or `postgresql+psycopg://host/name`.
        create: make a SQLite file that does not exist.

    Raises:
        DatabaseError: also by every method, where the database fails.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._engine = open_engine(url, create=create)
        self._writer = self._engine.execution_options(attnplan_writes=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection in a transaction that only reads."""
        with explained(self._engine), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A connection in a transaction that the end of the block commits, or nothing does."""
        with explained(self._engine):
            try:
                with self._writer.begin() as connection:
                    yield connection
            except StatementError as error:
                if isinstance(error, DBAPIError):
                    raise
                raise ValueError(str(error.orig)) from error

    # Profile runs

    def open_run(self, key: records.RunKey) -> records.ProfileRun:
        """The run of this key, made if there is none.

        The magnitudes of the model among its settings need not be the same to the last digit, and
        runs of older versions have none.
        """
        with self._writing() as connection:
            unique = {
                "model_id": _model_id(connection, key.model),
                "dataset_id": get_or_create(
                    connection, DatasetRow, {"digest": key.dataset.digest}, _values(key.dataset)
                ),
                "context": key.context,
                "sequences": key.sequences,
                "dtype": key.dtype,
                "seed": key.seed,
                "settings_digest": digest(dict(key.settings)),
            }
            known = _known_run(connection, unique, key.settings)
            if known is not None:
                unique["settings_digest"] = known
            more = {"settings": dict(key.settings), "status": "running", "created": _now()}
            run = get_or_create(connection, RunRow, unique, more)
        return self.run(run)

    def run(self, run: int) -> records.ProfileRun:
        """The run with this id."""
        found = self._runs(RunRow.id == run)
        if not found:
            raise DatabaseError(f"there is no profile run {run}")
        return found[0]

    def runs(self, fingerprint: str | None = None) -> list[records.ProfileRun]:
        """Runs, of one model or of all, the newest last."""
        return (
            self._runs() if fingerprint is None else self._runs(ModelRow.fingerprint == fingerprint)
        )

    def save_shard(self, run: int, sequence: int, payload: Mapping[str, Array]) -> None:
        """Keep the mergeable statistics of one sequence; the first to come stays."""
        row = {"run_id": run, "sequence": sequence, "payload": pack_all(payload), "created": _now()}
        with self._writing() as connection:
            insert_missing(connection, ShardRow, [row])

    def shards_done(self, run: int) -> frozenset[int]:
        """The sequences whose statistics are there."""
        rows = self._all(select(ShardRow.sequence).where(ShardRow.run_id == run))
        return frozenset(row[0] for row in rows)

    def load_shards(self, run: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """(sequence, statistics) of each shard, in order, one at a time in memory."""
        for sequence in sorted(self.shards_done(run)):
            statement = select(ShardRow.payload).where(
                ShardRow.run_id == run, ShardRow.sequence == sequence
            )
            yield sequence, unpack_all(self._all(statement)[0][0])

    def finish_run(
        self,
        run: int,
        heads: Iterable[records.HeadProfile],
        fitted: Mapping[int, Mapping[str, Array]] | None = None,
    ) -> None:
        """Write the profiles of all heads, and data fitted per layer, and mark the run complete."""
        rows = [_head_row(run, profile) for profile in heads]
        with self._writing() as connection:
            insert_missing(connection, HeadRow, rows)
            upsert(connection, FittedRow, _FITTED_KEY, _fitted_rows(run, fitted or {}))
            connection.execute(
                update(RunRow)
                .where(RunRow.id == run, RunRow.status != "complete")
                .values(status="complete", finished=_now())
            )

    def head_profiles(self, run: int, *, arrays: bool = True) -> list[records.HeadProfile]:
        """The profiles of a run by layer and head; without `arrays`, scalars only."""
        source = table(HeadRow)
        names = ["layer", "head", *SCALAR_NAMES, *(ARRAY_NAMES if arrays else ())]
        statement = select(*(source.c[name] for name in names)).where(source.c.run_id == run)
        return [
            _head_profile(row)
            for row in self._all(statement.order_by(source.c.layer, source.c.head))
        ]

    def save_fitted(self, run: int, fitted: Mapping[int, Mapping[str, Array]]) -> None:
        """Keep fitted data, layer to name to array; the last to come stays."""
        with self._writing() as connection:
            upsert(connection, FittedRow, _FITTED_KEY, _fitted_rows(run, fitted))

    def load_fitted(self, run: int) -> dict[int, dict[str, Array]]:
        """Fitted data of a run, layer to name to array."""
        out: dict[int, dict[str, Array]] = {}
        statement = select(FittedRow.layer, FittedRow.name, FittedRow.array)
        for layer, name, data in self._all(
            statement.where(FittedRow.run_id == run).order_by(FittedRow.layer, FittedRow.name)
        ):
            out.setdefault(layer, {})[name] = unpack(data)
        return out

    # Scores of candidates

    def save_scores(
        self,
        run: int,
        sequence: int,
        layer: int,
        candidates: str,
        scores: Iterable[records.CandidateScore],
    ) -> None:
        """Keep all scores of one layer on one sequence, and that they are all there.

        Args:
            candidates: digest of the set of candidates and whatever else was asked for.
        """
        place = {"run_id": run, "sequence": sequence, "layer": layer}
        rows = [place | _values(score) for score in scores]
        with self._writing() as connection:
            insert_missing(connection, ScoreRow, rows)
            insert_missing(connection, ScoreShardRow, [place | {"candidates": candidates}])

    def scores_done(self, run: int, candidates: str) -> frozenset[tuple[int, int]]:
        """The (sequence, layer) whose scores are all there for this set of candidates."""
        rows = self._all(
            select(ScoreShardRow.sequence, ScoreShardRow.layer).where(
                ScoreShardRow.run_id == run, ScoreShardRow.candidates == candidates
            )
        )
        return frozenset((sequence, layer) for sequence, layer in rows)

    def load_scores(self, run: int) -> records.Scores:
        """All scores of a run, as columns."""
        source = table(ScoreRow)
        names = [f.name for f in fields(records.Scores) if f.name != "names"]
        statement = select(*(source.c[name] for name in names)).where(source.c.run_id == run)
        rows = self._all(statement.order_by(*source.primary_key))
        found = dict(
            zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True)
        )
        texts = sorted(set(found["approximation"]))
        index = {text: i for i, text in enumerate(texts)}
        found["approximation"] = tuple(index[text] for text in found["approximation"])
        floats = ("fisher", "relative_error", "mass_dropped")
        arrays = {
            name: np.array(values, dtype=np.float64 if name in floats else np.int64)
            for name, values in found.items()
        }
        return records.Scores(names=tuple(texts), **arrays)

    # Devices and timings

    def devices(self) -> list[records.DeviceIdentity]:
        """The devices that have rows here."""
        source = table(DeviceRow)
        rows = self._all(select(source).order_by(source.c.id))
        return [_pick(records.DeviceIdentity, source, row) for row in rows]

    def save_timings(
        self, device: records.DeviceIdentity, timings: Iterable[records.KernelTiming]
    ) -> None:
        """Keep timings of a device; the last of a key stays."""
        self.import_timings([(device, list(timings))])

    def import_timings(
        self, tables: Iterable[tuple[records.DeviceIdentity, Sequence[records.KernelTiming]]]
    ) -> int:
        """Keep timings of several devices, all or none; returns how many."""
        count = 0
        with self._writing() as connection:
            for device, timings in tables:
                more = {"device_id": _device_id(connection, device), "created": _now()}
                rows = [_values(timing) | more for timing in timings]
                upsert(connection, TimingRow, TIMING_KEY, rows)
                count += len(rows)
        return count

    def load_timings(
        self, device: records.DeviceIdentity, engine: str | None = None
    ) -> list[records.KernelTiming]:
        """Timings of a device, of one engine or of all."""
        names = [f.name for f in fields(records.KernelTiming)]
        source = table(TimingRow)
        statement = (
            select(*(source.c[name] for name in names))
            .join(DeviceRow, DeviceRow.id == source.c.device_id)
            .where(DeviceRow.digest == device.digest)
            .order_by(source.c.id)
        )
        if engine is not None:
            statement = statement.where(source.c.engine == engine)
        return [records.KernelTiming(*row) for row in self._all(statement)]

    # Searches, plans, measurements

    def open_search(self, key: records.SearchKey, study: str) -> records.Search:
        """The search of this key, made if there is none; a first one's study name stays."""
        budget = dict(key.budget)
        with self._writing() as connection:
            unique = {
                "run_id": key.run,
                "device_id": _device_id(connection, key.device),
                "budget_digest": digest(budget),
                "seed": key.seed,
            }
            more = {"budget": budget, "study": study, "status": "running", "created": _now()}
            number = get_or_create(connection, SearchRow, unique, more)
            row = connection.execute(select(table(SearchRow)).filter_by(id=number)).one()
        return records.Search(
            row.id, key, row.study, row.status, row.result, row.created, row.finished
        )

    def finish_search(self, search: int, status: str, result: Mapping[str, Any]) -> None:
        """Write what a search found; status is 'complete' or 'infeasible'."""
        if status not in ("complete", "infeasible"):
            raise ValueError(f"a finished search is complete or infeasible, got {status!r}")
        with self._writing() as connection:
            connection.execute(
                update(SearchRow)
                .where(SearchRow.id == search)
                .values(status=status, result=dict(result), finished=_now())
            )

    def save_plan(self, plan: records.PlanRecord) -> None:
        """Keep a plan of a search; the same plan again replaces its path and figures."""
        row = {name: plan.figures.get(name) for name, _ in records.PLAN_FIGURES} | {
            "search_id": plan.search,
            "digest": plan.digest,
            "path": plan.path,
            "yaml": plan.yaml,
            "feasible": plan.feasible,
            "created": _now(),
        }
        with self._writing() as connection:
            upsert(connection, PlanRow, ("search_id", "digest"), [row])

    def plans(self, search: int) -> list[records.PlanRecord]:
        """The plans of a search, the oldest first."""
        source = table(PlanRow)
        rows = self._all(select(source).where(source.c.search_id == search).order_by(source.c.id))
        return [_plan(row) for row in rows]

    def save_measurement(self, key: records.MeasurementKey, values: Mapping[str, Any]) -> None:
        """Keep what was measured; the last of a key stays."""
        with self._writing() as connection:
            row = {
                "key_digest": key.digest,
                "model_id": _model_id(connection, key.model),
                "kind": key.kind,
                "subject": key.subject,
                "conditions": dict(key.conditions),
                "values": dict(values),
                "created": _now(),
            }
            upsert(connection, MeasurementRow, ("key_digest",), [row])

    def load_measurement(self, key: records.MeasurementKey) -> dict[str, Any] | None:
        """What was measured under this key, None where nothing was."""
        source = table(MeasurementRow)
        rows = self._all(select(source.c["values"]).where(source.c.key_digest == key.digest))
        return dict(rows[0][0]) if rows else None

    def _all(self, statement: Any) -> Sequence[Any]:
        with self.reading() as connection:
            return connection.execute(statement).all()

    def _runs(self, *conditions: Any) -> list[records.ProfileRun]:
        run, model, dataset = table(RunRow), table(ModelRow), table(DatasetRow)
        statement = (
            select(run, model, dataset)
            .join(model, model.c.id == run.c.model_id)
            .join(dataset, dataset.c.id == run.c.dataset_id)
            .where(*conditions)
            .order_by(run.c.id)
        )
        out = []
        for row in self._all(statement):
            identities = {
                "model": _pick(records.ModelIdentity, model, row),
                "dataset": _pick(records.DatasetIdentity, dataset, row),
            }
            key = _pick(records.RunKey, run, row, identities)
            out.append(_pick(records.ProfileRun, run, row, {"key": key}))
        return out


def _pick(cls: type[T], source: Table, row: Any, more: Mapping[str, Any] | None = None) -> T:
    """A record from the columns of one table of a joined row; `more` holds what is no column."""
    more = more or {}
    names = [f.name for f in fields(cls) if f.name not in more]  # type: ignore[arg-type]
    return cls(**{name: row._mapping[source.c[name]] for name in names}, **more)


def _values(record: Any) -> dict[str, Any]:
    """The fields of a record; unlike `asdict`, without a deep copy."""
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _model_id(connection: Connection, model: records.ModelIdentity) -> int:
    key = {"fingerprint": model.fingerprint}
    return get_or_create(connection, ModelRow, key, _values(model))


def _known_run(
    connection: Connection, unique: Mapping[str, Any], settings: Mapping[str, Any]
) -> str | None:
    """Digest of the settings of a run with the same settings, magnitudes within the tolerance."""

    def others(of: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in of.items() if name != MAGNITUDES}

    source = table(RunRow)
    same = [source.c[name] == value for name, value in unique.items() if name != "settings_digest"]
    rows = connection.execute(
        select(source.c.settings, source.c.settings_digest).where(*same).order_by(source.c.id)
    ).all()
    mine = settings.get(MAGNITUDES)
    alike = [
        (MAGNITUDES in row.settings, row.settings_digest)
        for row in rows
        if others(row.settings) == others(settings)
        and magnitudes.difference(mine, row.settings.get(MAGNITUDES)) is None
    ]
    return max(alike, key=lambda one: one[0])[1] if alike else None


def _device_id(connection: Connection, device: records.DeviceIdentity) -> int:
    return get_or_create(connection, DeviceRow, {"digest": device.digest}, _values(device))


def _head_row(run: int, profile: records.HeadProfile) -> dict[str, Any]:
    """Every column of a head's row: spectra as float32, the heat map as float16."""
    row: dict[str, Any] = {"run_id": run, "layer": profile.layer, "head": profile.head}
    for name in SCALAR_NAMES:
        value = float(profile.scalars.get(name, math.nan))
        row[name] = None if math.isnan(value) else value
    for name in ARRAY_NAMES:
        array = profile.arrays.get(name)
        dtype = np.float16 if name == "block_heat" else np.float32
        row[name] = None if array is None else pack(narrow(array, dtype))
    return row


def _head_profile(row: Any) -> records.HeadProfile:
    found = {name: value for name, value in row._mapping.items() if value is not None}
    scalars = {name: found[name] for name in SCALAR_NAMES if name in found}
    arrays = {name: unpack(found[name]) for name in ARRAY_NAMES if name in found}
    return records.HeadProfile(row.layer, row.head, scalars, arrays)


def _fitted_rows(run: int, fitted: Mapping[int, Mapping[str, Array]]) -> list[dict[str, Any]]:
    return [
        {"run_id": run, "layer": layer, "name": name, "array": pack(array)}
        for layer, arrays in fitted.items()
        for name, array in arrays.items()
    ]


def _plan(row: Any) -> records.PlanRecord:
    names = [name for name, _ in records.PLAN_FIGURES]
    figures = {name: row._mapping[name] for name in names if row._mapping[name] is not None}
    return records.PlanRecord(row.search_id, row.digest, row.path, row.yaml, row.feasible, figures)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
