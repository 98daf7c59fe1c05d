"""The store keeps whole units, once each, whoever dies and whoever else writes."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, event

from attnplan.profiles.records import records
from attnplan.profiles.records.arrays import narrow, pack, pack_all, unpack, unpack_all
from attnplan.profiles.records.digest import canonical, digest
from attnplan.profiles.records.scalars import ARRAY_NAMES, SCALAR_NAMES
from attnplan.profiles.store.database import DatabaseError, Store
from attnplan.profiles.store.device_table import export_timings, import_timings
from attnplan.profiles.store.migrations import engine
from attnplan.profiles.store.tables import Base

MODEL = records.ModelIdentity(
    "f" * 64, "tiny", "LlamaForCausalLM", 2, 4, 2, 16, {"rope_type": "default"}, "w" * 64
)
DATASET = records.DatasetIdentity("d" * 64, "builtin", "calibration", 256, {"tokenizer": "t"})
KEY = records.RunKey(MODEL, DATASET, 128, 2, "float32", 0, {"probes": 1})
DEVICE = records.DeviceIdentity("Test CPU", "cpu", "", 2, {"torch": "2.13"})
TIMING = records.KernelTiming(
    "e" * 64, "float32", 4, 2, 16, 128, 128, "window(window=64)", 1.5, 1.4, 1.7, 9, 0.25
)

SETUP = """
    import sys
    from attnplan.profiles.records import records
    from attnplan.profiles.store.database import Store
    import numpy as np
    MODEL = records.ModelIdentity("f" * 64, "tiny", "L", 2, 4, 2, 16, {}, "w")
    DATASET = records.DatasetIdentity("d" * 64, "builtin", "calibration", 256, {})
    KEY = records.RunKey(MODEL, DATASET, 128, 2, "float32", 0, {})
    DEVICE = records.DeviceIdentity("Test CPU", "cpu", "", 2, {})
    def scores(n):
        return [records.CandidateScore(h, f"a{i}", 1.0, .5, None, 8)
                for h in range(4) for i in range(n)]
"""


def child(url: str, code: str) -> subprocess.Popen[str]:
    script = textwrap.dedent(SETUP) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", script, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def succeed(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


def count(url: str, table: str) -> int:
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        found: int = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    connection.close()
    return found


def profile(layer: int, head: int) -> records.HeadProfile:
    scalars = {name: float(i) for i, name in enumerate(SCALAR_NAMES[:-1])}
    arrays = {name: np.linspace(1, 0, 8).reshape(2, 4) for name in ARRAY_NAMES}
    return records.HeadProfile(layer, head, scalars, arrays)


def test_a_run_is_made_once_and_found_again(url: str) -> None:
    with Store(url) as store:
        run = store.open_run(KEY)
        assert store.open_run(KEY) == run
        assert (run.key, run.status, run.finished) == (KEY, "running", None)
        for other in (
            replace(KEY, context=64),
            replace(KEY, settings={"probes": 2}),
            replace(KEY, model=replace(MODEL, fingerprint="g" * 64)),
            replace(KEY, dataset=replace(DATASET, digest="e" * 64)),
        ):
            assert store.open_run(other).id != run.id
        assert len(store.runs()) == 5
        assert len(store.runs(MODEL.fingerprint)) == 4


def test_shards_come_back_as_they_were(url: str) -> None:
    payload = {"gram": np.random.default_rng(0).normal(size=(3, 4, 4)), "count": np.array(7)}
    with Store(url) as store:
        run = store.open_run(KEY).id
        assert store.shards_done(run) == frozenset()
        store.save_shard(run, 1, payload)
        store.save_shard(run, 1, {"other": np.zeros(1)})
        store.save_shard(run, 0, {"other": np.zeros(1)})
        assert store.shards_done(run) == {0, 1}
        (first, _), (second, found) = store.load_shards(run)
        assert (first, second) == (0, 1)
        assert found.keys() == payload.keys()
        for name, array in payload.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_head_profiles_come_back_and_complete_the_run(url: str) -> None:
    heads = [profile(layer, head) for layer in range(2) for head in range(4)]
    fitted = {1: {"loki.basis": np.ones((2, 16, 16), dtype=np.float32)}}
    with Store(url) as store:
        run = store.open_run(KEY).id
        store.finish_run(run, reversed(heads), fitted)
        store.finish_run(run, heads, fitted)
        done = store.run(run)
        assert done.complete and done.finished is not None
        found = store.head_profiles(run)
        assert [(p.layer, p.head) for p in found] == [(p.layer, p.head) for p in heads]
        for mine, kept in zip(heads, found, strict=True):
            assert kept.scalars == mine.scalars  # the missing one stays missing
            for name in ARRAY_NAMES:
                np.testing.assert_allclose(kept.arrays[name], mine.arrays[name], atol=1e-3)
        assert not store.head_profiles(run, arrays=False)[0].arrays
        np.testing.assert_array_equal(store.load_fitted(run)[1]["loki.basis"], np.ones((2, 16, 16)))


def test_a_statistic_that_is_unknown_or_infinite_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 1, head 2: unknown statistic 'sink_mas'"):
        records.HeadProfile(1, 2, {"sink_mas": 0.5})
    with pytest.raises(ValueError, match="layer 1, head 2: max_logit is inf"):
        records.HeadProfile(1, 2, {"max_logit": float("inf")})
    with pytest.raises(ValueError, match="not finite float16"):
        narrow(np.array([1e6]), np.float16)


def test_nan_means_that_there_is_no_value(url: str) -> None:
    with Store(url) as store:
        run = store.open_run(KEY).id
        store.finish_run(
            run, [records.HeadProfile(0, 0, {"sink_mass": float("nan"), "entropy": 1})]
        )
        assert store.head_profiles(run)[0].scalars == {"entropy": 1.0}


def test_scores_are_kept_once_and_by_column(url: str) -> None:
    rows = [
        records.CandidateScore(head, name, 0.1 * head, 0.2, None if head else 0.3, 64)
        for head in range(4)
        for name in ("window(window=64)", "dense")
    ]
    with Store(url) as store:
        run = store.open_run(KEY).id
        for _ in range(2):
            store.save_scores(run, 0, 1, "c" * 64, rows)
        assert store.scores_done(run, "c" * 64) == {(0, 1)}
        assert store.scores_done(run, "x" * 64) == frozenset()
        scores = store.load_scores(run)
        assert scores.names == ("dense", "window(window=64)")
        assert scores.head.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert scores.approximation.tolist() == [0, 1] * 4
        assert np.isnan(scores.mass_dropped).tolist() == [False] * 2 + [True] * 6
        assert store.load_scores(run + 1).fisher.shape == (0,)


def test_a_hundred_thousand_scores_load_in_few_statements(url: str) -> None:
    with Store(url) as store:
        run = store.open_run(KEY).id
        rows = [
            records.CandidateScore(head, f"method(window={i}, sinks=4)", 0.1, 0.2, None, 64)
            for head in range(9)
            for i in range(111)
        ]
        for layer in range(100):
            store.save_scores(run, 0, layer, "c" * 64, rows)
        statements: list[str] = []
        event.listen(
            Engine,
            "before_cursor_execute",
            record := lambda *call: statements.append(call[2]),
        )
        try:
            scores = store.load_scores(run)
        finally:
            event.remove(Engine, "before_cursor_execute", record)
        assert 0 < len(statements) <= 4, statements[:6]
        assert scores.fisher.shape == (99_900,)


def test_timings_are_replaced_and_travel_as_json_lines(url: str, tmp_path: Path) -> None:
    other = records.DeviceIdentity("Test GPU", "cuda", "550.1", 0, {"triton": "3.6"})
    with Store(url) as store, Store(f"sqlite:///{tmp_path / 'second.db'}") as second:
        store.save_timings(DEVICE, [TIMING, replace(TIMING, keys=256, selection_ms=None)])
        store.save_timings(DEVICE, [replace(TIMING, median_ms=2.5)])
        store.save_timings(other, [TIMING])
        assert [t.median_ms for t in store.load_timings(DEVICE)] == [2.5, 1.5]
        assert store.load_timings(DEVICE, engine="another") == []

        path = tmp_path / "timings.jsonl"
        assert export_timings(store, path) == 3
        for _ in range(2):
            assert import_timings(second, path) == 3
        assert second.devices() == [DEVICE, other]
        for device in (DEVICE, other):
            assert second.load_timings(device) == store.load_timings(device)
        assert export_timings(store, path, other) == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", ":2: Expecting"),
        ("[]", ":2: not a timing"),
        ('{"version": 9, "device": {}, "timing": {}}', ":2: format version 9"),
        ('{"version": 1, "device": 3, "timing": {}}', ":2: device must be an object, got 3"),
        ('{"version": 1, "device": {}, "timing": {}}', ":2: device: missing field 'driver'"),
    ],
)
def test_a_broken_line_of_timings_is_named_and_nothing_is_kept(
    url: str, tmp_path: Path, broken: str, message: str
) -> None:
    path = tmp_path / "timings.jsonl"
    with Store(url) as store, Store("sqlite://") as second:
        store.save_timings(DEVICE, [TIMING])
        export_timings(store, path)
        path.write_text(path.read_text() + broken + "\n")
        with pytest.raises(ValueError, match=message):
            import_timings(second, path)
        assert second.devices() == []


def test_a_timing_with_a_wrong_type_is_refused(url: str, tmp_path: Path) -> None:
    path = tmp_path / "timings.jsonl"
    with Store(url) as store:
        store.save_timings(DEVICE, [TIMING])
        export_timings(store, path)
        path.write_text(path.read_text().replace('"median_ms":1.5', '"median_ms":"fast"'))
        with pytest.raises(ValueError, match="median_ms must be float, got 'fast'"):
            import_timings(store, path)


def test_a_search_and_its_plans_are_found_again(url: str) -> None:
    with Store(url) as store:
        run = store.open_run(KEY).id
        key = records.SearchKey(run, DEVICE, {"max_density": 0.45, "trials": 20}, 0)
        search = store.open_search(key, "study-1")
        assert search == store.open_search(key, "study-2")
        assert store.open_search(replace(key, seed=1), "study-3").id != search.id
        assert store.open_search(replace(key, budget={}), "study-4").id != search.id

        plan = records.PlanRecord(
            search.id, "p" * 64, "plan.yaml", "version: 1\n", True, {"density": 0.4}
        )
        for _ in range(2):
            store.save_plan(plan)
        store.save_plan(replace(plan, path="other.yaml"))
        assert store.plans(search.id) == [replace(plan, path="other.yaml")]
        store.finish_search(search.id, "complete", {"plan": "p" * 64})
        assert store.open_search(key, "study-1").result == {"plan": "p" * 64}
        with pytest.raises(ValueError, match="complete or infeasible, got 'done'"):
            store.finish_search(search.id, "done", {})
        with pytest.raises(ValueError, match="unknown figure 'speed'"):
            replace(plan, figures={"speed": 1.0})


def test_a_measurement_is_found_by_everything_that_determines_it(url: str) -> None:
    key = records.MeasurementKey(MODEL, "kl", "p" * 64, {"context": 128, "data": "d"})
    same = replace(key, conditions={"data": "d", "context": 128})
    with Store(url) as store:
        assert store.load_measurement(key) is None
        store.save_measurement(key, {"kl_per_token": 0.25})
        store.save_measurement(same, {"kl_per_token": 0.125})
        assert store.load_measurement(key) == {"kl_per_token": 0.125}
        assert store.load_measurement(replace(key, kind="latency")) is None
        with pytest.raises(ValueError, match="cannot be stored as JSON: Out of range"):
            store.save_measurement(key, {"kl_per_token": float("nan")})
        assert store.load_measurement(key) == {"kl_per_token": 0.125}


def test_a_row_of_a_run_that_does_not_exist_is_refused(url: str) -> None:
    with Store(url) as store:
        with pytest.raises(DatabaseError, match="FOREIGN KEY"):
            store.save_shard(99, 0, {})
        with pytest.raises(DatabaseError, match="there is no profile run 99"):
            store.run(99)


def test_processes_that_write_the_same_units_at_once_keep_each_once(url: str) -> None:
    code = """
    store = Store(sys.argv[1])
    run = store.open_run(KEY).id
    for sequence in range(4):
        store.save_shard(run, sequence, {"x": np.zeros(1000)})
        for layer in range(2):
            store.save_scores(run, sequence, layer, "c", scores(20))
    store.finish_run(run, [records.HeadProfile(l, h, {}) for l in range(2) for h in range(4)])
    store.open_search(records.SearchKey(run, DEVICE, {}, 0), "study")
    """
    for process in [child(url, code) for _ in range(3)]:
        succeed(process)
    counts = {
        table: count(url, table)
        for table in (
            "models", "profile_runs", "profile_shards", "candidate_scores", "score_shards",
            "head_profiles", "devices", "searches",
        )
    }  # fmt: skip
    assert list(counts.values()) == [1, 1, 4, 640, 8, 8, 1, 1]


def test_a_process_killed_within_a_unit_leaves_none_of_it(url: str) -> None:
    killed = """
    import os, signal, itertools
    store = Store(sys.argv[1])
    run = store.open_run(KEY).id
    store.save_scores(run, 0, 0, "c", scores(50))
    def dies():
        with store._writing() as connection:
            from attnplan.profiles.store.tables import ScoreRow, insert_missing
            rows = [{"run_id": run, "sequence": 0, "layer": 1, "head": s.head,
                     "approximation": s.approximation, "fisher": 1, "relative_error": 1,
                     "mass_dropped": None, "positions": 1} for s in scores(50)]
            insert_missing(connection, ScoreRow, rows)
            os.kill(os.getpid(), signal.SIGKILL)
    dies()
    """
    process = child(url, killed)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (count(url, "candidate_scores"), count(url, "score_shards")) == (200, 1)

    again = """
    store = Store(sys.argv[1])
    run = store.open_run(KEY).id
    for layer in range(2):
        if (0, layer) not in store.scores_done(run, "c"):
            store.save_scores(run, 0, layer, "c", scores(50))
    """
    succeed(child(url, again))
    assert (count(url, "candidate_scores"), count(url, "score_shards")) == (400, 2)


def test_a_process_killed_at_any_time_leaves_whole_units_only(url: str) -> None:
    code = """
    store = Store(sys.argv[1])
    run = store.open_run(KEY).id
    print("ready", flush=True)
    for layer in range(100_000):
        store.save_scores(run, 0, layer, "c", scores(50))
    """
    process = child(url, code)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.kill()
    process.communicate(timeout=60)
    shards = count(url, "score_shards")
    assert shards > 0
    assert count(url, "candidate_scores") == 200 * shards


def test_many_processes_may_create_the_same_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fresh.db'}"
    for process in [child(url, "Store(sys.argv[1]).close()") for _ in range(4)]:
        succeed(process)
    assert count(url, engine.VERSION_TABLE) == 1


def test_threads_of_one_process_share_a_store(url: str) -> None:
    with Store(url) as store, ThreadPoolExecutor(4) as pool:
        run = store.open_run(KEY).id
        list(pool.map(lambda s: store.save_shard(run, s % 8, {"x": np.ones(10)}), range(32)))
        assert store.shards_done(run) == set(range(8))


def test_reopening_changes_nothing_and_keeps_everything(url: str) -> None:
    with Store(url) as store:
        run = store.open_run(KEY)
    before = Path(url.removeprefix("sqlite:///")).read_bytes()
    with Store(url) as store:
        assert store.runs() == [run]
    assert Path(url.removeprefix("sqlite:///")).read_bytes() == before


def test_migrations_lead_to_the_tables_of_the_code(url: str) -> None:
    with Store(url) as store, store.reading() as connection:
        options = {"version_table": engine.VERSION_TABLE, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_a_new_migration_starts_from_the_newest_one(tmp_path: Path) -> None:
    folder = tmp_path / "migrations"
    shutil.copytree(engine.HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = engine.write_migration("add nothing", folder)
    text = path.read_text()
    assert path.name == "0002_add_nothing.py"
    assert "down_revision = '0001'" in text
    assert "create_table" not in text


def test_optuna_keeps_its_tables_in_the_same_file(url: str) -> None:
    import optuna

    with Store(url) as store:
        study = optuna.create_study(
            storage=url, study_name="s", sampler=optuna.samplers.RandomSampler(0)
        )
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        run = store.open_run(KEY)
    with Store(url) as store:
        assert store.runs() == [run]
    assert len(optuna.load_study(storage=url, study_name="s").trials) == 2


def test_a_newer_database_is_refused(url: str) -> None:
    Store(url).close()
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    with connection:
        connection.execute(f"UPDATE {engine.VERSION_TABLE} SET version_num = '9999'")
    connection.close()
    with pytest.raises(DatabaseError, match="has schema 9999, this attnplan knows none after 0001"):
        Store(url)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("these are notes, not a database\n" * 100)
    with pytest.raises(DatabaseError, match=r"notes\.db: this file is no SQLite database"):
        Store(f"sqlite:///{path}")
    assert path.read_text().startswith("these are notes")


def test_somebody_elses_tables_are_not_taken_over(url: str) -> None:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    with connection:
        connection.execute("CREATE TABLE models (x)")
    connection.close()
    with pytest.raises(DatabaseError, match="table models already exists"):
        Store(url)
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        count(url, "datasets")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("attnplan.db", "'attnplan.db' is no database URL; write sqlite:///attnplan.db"),
        ("nosuch://x", "is no database URL"),
        ("mysql://host/name", "SQLite or PostgreSQL, not mysql"),
        ("sqlite:////nonexistent/folder/x.db", "its folder must exist"),
    ],
)
def test_a_wrong_url_gets_one_sentence(url: str, message: str) -> None:
    with pytest.raises(DatabaseError, match=message):
        Store(url)


def test_a_missing_file_is_made_only_if_wanted(url: str) -> None:
    with pytest.raises(DatabaseError, match=r"there is no database at .*; run `attnplan profile`"):
        Store(url, create=False)
    assert not os.path.exists(url.removeprefix("sqlite:///"))
    Store(url).close()
    Store(url, create=False).close()


def test_arrays_and_digests_are_stable() -> None:
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    np.testing.assert_array_equal(unpack(pack(array)), array)
    assert pack_all({"a": array, "b": array}) == pack_all({"b": array, "a": array})
    assert unpack_all(pack_all({})) == {}
    assert digest({"b": 1, "a": (1, 2)}) == digest({"a": [1, 2], "b": 1})
    assert canonical({"é": None}) == '{"é":null}'
    for bad in (float("nan"), object(), {1, 2}):
        with pytest.raises(ValueError, match="no canonical JSON"):
            digest({"x": bad})


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store(url) as opened:
        yield opened


def test_runs_know_their_model_by_the_size_of_its_weights(store: Store) -> None:
    def opened(**sizes: float) -> int:
        settings = dict(KEY.settings) | ({"magnitudes": sizes} if sizes else {})
        return store.open_run(replace(KEY, settings=settings)).id

    first, small = opened(q=-3.0, k=-2.0), opened(q=-3.5, k=-2.0)
    assert first != small
    assert opened(q=-3.003, k=-1.998) == first  # rounded to another type
    assert opened(q=-3.498, k=-2.0) == small
    assert opened(q=5.0, k=-2.0) not in (first, small)


def test_runs_of_older_versions_are_found(store: Store) -> None:
    before = store.open_run(KEY).id  # says nothing of sizes
    sized = replace(KEY, settings={**KEY.settings, "magnitudes": {"q": -3.0}})
    assert store.open_run(sized).id == before
    assert store.open_run(KEY).id == before
