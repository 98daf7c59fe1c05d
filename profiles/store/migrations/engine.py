"""Opens a database, SQLite or PostgreSQL, and brings its tables to the newest schema.

A change of schema, from the root of the repository, after editing `profiles/store/tables.py`:

    python -c "from attnplan.profiles.store.migrations import engine as e; e.write_migration('x')"
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

HERE = Path(__file__).parent
VERSION_TABLE = "attnplan_version"
"""Not alembic's default name: Optuna uses that one, in the same database."""
_OPTUNA_TABLE = "studies"
_MAGIC = b"SQLite format 3\0"
WAIT_S = 60
"""How long a process waits for another one that writes to the same SQLite file."""
_LOCK = 0x6174746E  # a PostgreSQL advisory lock: one process migrates at a time


class DatabaseError(Exception):
    """A database cannot be opened, read or written."""


def open_engine(url: str, *, create: bool = True) -> Engine:
    """The engine of a database whose tables are at the newest schema.

    Args:
        url: any SQLAlchemy URL of SQLite or PostgreSQL, such as `sqlite:///attnplan.db`.
        create: make a SQLite file that does not exist.

    Raises:
        DatabaseError: there is no such database, it is none, or a newer attnplan wrote it.
    """
    parsed = _parse(url)
    path = parsed.database
    if not create and parsed.get_backend_name() == "sqlite" and not Path(path or "").is_file():
        raise DatabaseError(f"there is no database at {path}; run `attnplan profile` first")
    file = file_of(url)
    if file is not None:
        _check_file(file)
    try:
        engine = create_engine(parsed, json_serializer=_json)
    except ModuleNotFoundError as error:
        raise DatabaseError(
            f"{parsed.drivername} needs the Python package {error.name!r}: pip install {error.name}"
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        with explained(engine):
            _upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


class explained:
    """Turns a driver's errors inside the `with` block into one sentence."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.url.render_as_string(hide_password=True)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, PoolTimeoutError):
            raise DatabaseError(f"{self.name}: no free connection: {error}") from error
        if isinstance(error, DBAPIError):
            raise DatabaseError(f"{self.name}: {_reason(error)}") from error


def write_migration(message: str, folder: Path = HERE) -> Path:
    """Write the migration from the newest one to `store/tables.py`, to be read and edited."""
    config = _config(folder)
    script = ScriptDirectory.from_config(config)
    number = f"{len(list(script.walk_revisions())) + 1:04d}"
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        slug = message.replace(" ", "_")
        command.revision(config, message, autogenerate=True, rev_id=number)
    engine.dispose()
    return folder / "versions" / f"{number}_{slug}.py"


def _config(folder: Path = HERE) -> Config:
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _upgrade(engine: Engine) -> None:
    """Bring the tables to the newest schema; processes that open at once take turns."""
    config = _config()
    script = ScriptDirectory.from_config(config)
    head = script.get_current_head()
    with engine.connect() as connection:
        if _revision(connection) == head:
            return
    with engine.execution_options(attnplan_writes=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        found = _revision(connection)
        if found is not None and found not in {r.revision for r in script.walk_revisions()}:
            raise DatabaseError(
                f"{engine.url.render_as_string(hide_password=True)} has schema {found}, this "
                f"attnplan knows none after {head}: upgrade attnplan, or use another database"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        dialect = parsed.get_dialect().name
    except (ArgumentError, NoSuchModuleError):
        raise DatabaseError(
            f"{url!r} is no database URL; write sqlite:///attnplan.db for a file, or "
            "postgresql+psycopg://user@host/name"
        ) from None
    if dialect not in ("sqlite", "postgresql"):
        raise DatabaseError(f"the store is SQLite or PostgreSQL, not {dialect}")
    return parsed


def file_of(url: str) -> Path | None:
    """The file of a SQLite database; None where it is in memory, or on a server.

    Raises:
        DatabaseError: this is no URL of a database.
    """
    parsed = _parse(url)
    name = parsed.database or ":memory:"
    if parsed.get_backend_name() != "sqlite" or name.startswith((":memory:", "file:")):
        return None
    return Path(name)


def _check_file(path: Path) -> None:
    """Raises DatabaseError where the database would be made in a file of something else.

    The file is read without SQLite's locks and logs, which would leave their traces beside it.
    """
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise DatabaseError(f"{path}: this file is no SQLite database; name another one")
        tables = _tables(path)
        if tables and not tables & {VERSION_TABLE, _OPTUNA_TABLE}:
            raise DatabaseError(
                f"{path}: this database is another program's, its table {min(tables)} already "
                "exists; name another one"
            )
        return
    for suffix in ("-wal", "-shm", "-journal"):
        beside = path.with_name(path.name + suffix)
        # the database itself, if there is one by now, is just being made by another process
        if os.path.lexists(beside) and not os.path.lexists(path):
            raise DatabaseError(
                f"{beside} is in the way: SQLite would replace it; name another database"
            )


def _tables(path: Path) -> set[str]:
    """Names of a SQLite file's tables; none where somebody is writing to it just now."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)
    try:
        return {
            row[0]
            for row in connection.execute("select name from sqlite_master where type = 'table'")
        }
    except sqlite3.DatabaseError:
        return set()
    finally:
        connection.close()


def _configure_sqlite(connection: Any, _record: object) -> None:
    """Let readers and one writer work at once, and wait for another writer."""
    connection.isolation_level = None  # `_begin_sqlite` opens every transaction
    connection.execute(f"PRAGMA busy_timeout = {WAIT_S * 1000}")
    connection.execute("PRAGMA foreign_keys = ON")
    deadline = time.monotonic() + WAIT_S
    while True:  # the change to WAL does not honour busy_timeout
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous = NORMAL")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the write lock first: a reader that turns writer could not wait for it."""
    writes = connection.get_execution_options().get("attnplan_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot be stored as JSON: {error}: {value!r}") from None


def _reason(error: DBAPIError) -> str:
    reason = " ".join(str(error.orig).split())
    if "file is not a database" in reason:
        return "this file is no SQLite database; name another one"
    if "unable to open database file" in reason:
        return "cannot open or create this file; its folder must exist and be writable"
    if "database is locked" in reason:
        return f"another process has been writing for more than {WAIT_S} s; try again"
    return reason
