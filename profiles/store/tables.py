"""The tables of the store, and the three ways in which rows get into them.

Every row is keyed by what determines it. A change of a table needs a migration in
`profiles/store/migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from attnplan.profiles.records.records import PLAN_FIGURES
from attnplan.profiles.records.scalars import ARRAY_NAMES, SCALAR_NAMES

Digest = Text()
Time = String(20)
"""UTC, as in 2025-01-31T12:00:00Z: sorts as text and reads the same in every database."""

Row = Mapping[str, Any]


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can name it too."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )
    type_annotation_map = {float: Double, dict[str, Any]: JSON(none_as_null=True)}  # noqa: RUF012


class ModelRow(Base):
    __tablename__ = "models"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(Digest, unique=True)
    name: Mapped[str] = mapped_column(Text)
    architecture: Mapped[str] = mapped_column(Text)
    layers: Mapped[int]
    heads: Mapped[int]
    kv_heads: Mapped[int]
    head_dim: Mapped[int]
    rope: Mapped[dict[str, Any]]
    weights_digest: Mapped[str] = mapped_column(Text)


class DatasetRow(Base):
    __tablename__ = "datasets"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(Digest, unique=True)
    name: Mapped[str] = mapped_column(Text)
    split: Mapped[str] = mapped_column(Text)
    tokens: Mapped[int]
    identity: Mapped[dict[str, Any]]


class RunRow(Base):
    __tablename__ = "profile_runs"
    __table_args__ = (
        UniqueConstraint(
            "model_id", "dataset_id", "context", "sequences", "dtype", "seed", "settings_digest"
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    dataset_id: Mapped[int] = mapped_column(ForeignKey("datasets.id"))
    context: Mapped[int]
    sequences: Mapped[int]
    dtype: Mapped[str] = mapped_column(Text)
    seed: Mapped[int] = mapped_column(BigInteger)
    settings: Mapped[dict[str, Any]]
    settings_digest: Mapped[str] = mapped_column(Digest)
    status: Mapped[str] = mapped_column(Text)
    created: Mapped[str] = mapped_column(Time)
    finished: Mapped[str | None] = mapped_column(Time)


class ShardRow(Base):
    """The mergeable statistics of one sequence."""

    __tablename__ = "profile_shards"

    run_id: Mapped[int] = mapped_column(ForeignKey("profile_runs.id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    created: Mapped[str] = mapped_column(Time)


class HeadRow(Base):
    """One head's statistics; the columns come from `profiles/records/scalars.py`."""

    __table__ = Table(
        "head_profiles",
        Base.metadata,
        Column("run_id", ForeignKey("profile_runs.id"), primary_key=True),
        Column("layer", Integer, primary_key=True),
        Column("head", Integer, primary_key=True),
        *(Column(name, Double) for name in SCALAR_NAMES),
        *(Column(name, LargeBinary) for name in ARRAY_NAMES),
    )


class FittedRow(Base):
    """A tensor that a method was fitted with, for one layer."""

    __tablename__ = "fitted"

    run_id: Mapped[int] = mapped_column(ForeignKey("profile_runs.id"), primary_key=True)
    layer: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    array: Mapped[bytes] = mapped_column(LargeBinary)


class ScoreRow(Base):
    __tablename__ = "candidate_scores"
    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012 (the key is stored once)

    run_id: Mapped[int] = mapped_column(ForeignKey("profile_runs.id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    layer: Mapped[int] = mapped_column(primary_key=True)
    head: Mapped[int] = mapped_column(primary_key=True)
    approximation: Mapped[str] = mapped_column(Text, primary_key=True)
    fisher: Mapped[float]
    relative_error: Mapped[float]
    mass_dropped: Mapped[float | None]
    positions: Mapped[int]


class ScoreShardRow(Base):
    """Says that a layer's scores on a sequence are all there, for a set of candidates."""

    __tablename__ = "score_shards"

    run_id: Mapped[int] = mapped_column(ForeignKey("profile_runs.id"), primary_key=True)
    candidates: Mapped[str] = mapped_column(Digest, primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    layer: Mapped[int] = mapped_column(primary_key=True)


class DeviceRow(Base):
    __tablename__ = "devices"

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(Digest, unique=True)
    name: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    driver: Mapped[str] = mapped_column(Text)
    threads: Mapped[int]
    versions: Mapped[dict[str, Any]]


TIMING_KEY = (
    "device_id", "engine", "dtype", "heads", "kv_heads", "head_dim", "queries", "keys",
    "approximation",
)  # fmt: skip


class TimingRow(Base):
    __tablename__ = "kernel_timings"
    __table_args__ = (UniqueConstraint(*TIMING_KEY),)

    id: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"))
    engine: Mapped[str] = mapped_column(Text)
    dtype: Mapped[str] = mapped_column(Text)
    heads: Mapped[int]
    kv_heads: Mapped[int]
    head_dim: Mapped[int]
    queries: Mapped[int]
    keys: Mapped[int]
    approximation: Mapped[str] = mapped_column(Text)
    median_ms: Mapped[float]
    q25_ms: Mapped[float]
    q75_ms: Mapped[float]
    repeats: Mapped[int]
    selection_ms: Mapped[float | None]
    created: Mapped[str] = mapped_column(Time)


class SearchRow(Base):
    __tablename__ = "searches"
    __table_args__ = (UniqueConstraint("run_id", "device_id", "budget_digest", "seed"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("profile_runs.id"))
    device_id: Mapped[int] = mapped_column(ForeignKey("devices.id"))
    budget: Mapped[dict[str, Any]]
    budget_digest: Mapped[str] = mapped_column(Digest)
    seed: Mapped[int] = mapped_column(BigInteger)
    study: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created: Mapped[str] = mapped_column(Time)
    finished: Mapped[str | None] = mapped_column(Time)


class PlanRow(Base):
    """A written plan; the columns of its figures come from `PLAN_FIGURES`."""

    __table__ = Table(
        "plans",
        Base.metadata,
        Column("id", Integer, primary_key=True),
        Column("search_id", ForeignKey("searches.id"), nullable=False),
        Column("digest", Digest, nullable=False),
        Column("path", Text, nullable=False),
        Column("yaml", Text, nullable=False),
        Column("feasible", Boolean, nullable=False),
        *(Column(name, Double) for name, _ in PLAN_FIGURES),
        Column("created", Time, nullable=False),
        UniqueConstraint("search_id", "digest"),
    )


class MeasurementRow(Base):
    __tablename__ = "measurements"

    id: Mapped[int] = mapped_column(primary_key=True)
    key_digest: Mapped[str] = mapped_column(Digest, unique=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id"))
    kind: Mapped[str] = mapped_column(Text)
    subject: Mapped[str] = mapped_column(Text)
    conditions: Mapped[dict[str, Any]]
    values: Mapped[dict[str, Any]]
    created: Mapped[str] = mapped_column(Time)


def table(rows: type[Base]) -> Table:
    """The table behind a class."""
    return cast(Table, rows.__table__)


def insert_missing(connection: Connection, rows: type[Base], values: Sequence[Row]) -> None:
    """Insert rows whose key is not there yet."""
    if values:
        connection.execute(_insert(connection, rows).on_conflict_do_nothing(), list(values))


def upsert(
    connection: Connection, rows: type[Base], key: Sequence[str], values: Sequence[Row]
) -> None:
    """Insert rows; where the key is there already, the new values replace the old ones."""
    if values:
        statement = _insert(connection, rows)
        replaced = {name: statement.excluded[name] for name in values[0] if name not in key}
        connection.execute(
            statement.on_conflict_do_update(index_elements=list(key), set_=replaced), list(values)
        )


def get_or_create(connection: Connection, rows: type[Base], key: Row, more: Row) -> int:
    """The id of the row of this key; `more` completes the row if it must be made."""
    insert_missing(connection, rows, [{**more, **key}])
    where = table(rows)
    return int(connection.execute(select(where.c.id).filter_by(**key)).scalar_one())


def _insert(connection: Connection, rows: type[Base]) -> sqlite.Insert | postgresql.Insert:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table(rows))
