"""Filters mean what SQL means by them, point at their errors, and never become SQL themselves."""

import csv
import io
import json
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnplan.profiles.records import records
from attnplan.profiles.records.scalars import SCALAR_NAMES
from attnplan.profiles.store import filters
from attnplan.profiles.store.database import Store
from attnplan.profiles.store.filters import NUMBER, TEXT, TRUTH, parse_filter
from attnplan.profiles.store.queries import VIEWS, Table, run_query, view_of

MODEL = records.ModelIdentity("f" * 64, 'o\'Brien "7B" %_\\', "L", 2, 3, 1, 16, {}, "w")
DATASET = records.DatasetIdentity("d" * 64, "builtin", "calibration", 256, {})
DEVICE = records.DeviceIdentity("NVIDIA H100", "cuda", "550", 0, {})
APPROXIMATIONS = ("dense", "window(window=64)", "loki(top=32)")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = tmp_path_factory.mktemp("queries") / "store.db"
    with Store(f"sqlite:///{path}") as store:
        run = store.open_run(records.RunKey(MODEL, DATASET, 128, 2, "float32", 0, {})).id
        store.save_shard(run, 0, {"x": np.zeros(2)})
        store.finish_run(run, [head_profile(layer, h) for layer in range(2) for h in range(3)])
        for layer in range(2):
            rows = [
                records.CandidateScore(h, name, h + i / 4, layer / 2, None if i else 0.5, 64 * i)
                for h in range(3)
                for i, name in enumerate(APPROXIMATIONS)
            ]
            store.save_scores(run, 0, layer, "c", rows)
        shape = ("e" * 64, "bfloat16", 9, 3, 64)
        timings = [
            records.KernelTiming(*shape, keys, keys, name, keys / 1024 * (i + 1), 1, 2, 9)
            for keys in (1024, 32768)
            for i, name in enumerate(APPROXIMATIONS)
        ]
        store.save_timings(DEVICE, timings)
        search = store.open_search(records.SearchKey(run, DEVICE, {"max_kl": 0.1}, 0), "s").id
        for digest, latency in (("a" * 64, 20.0), ("b" * 64, 40.0)):
            figures = {"latency_ms": latency, "latency_dense_ms": 60.0, "kl_per_token": 0.05}
            store.save_plan(records.PlanRecord(search, digest, "p.yaml", "", latency < 30, figures))
        yield store


def head_profile(layer: int, head: int) -> records.HeadProfile:
    scalars = {"sink_mass": 0.25 * head, "k_rank95": 8.0 * (layer + 1)}
    if head:
        scalars["entropy"] = float(layer)
    spectrum = np.linspace(1, 0, 20)
    arrays = {f"{tensor}_spectrum": spectrum for tensor in "qkva"}
    return records.HeadProfile(layer, head, scalars, arrays)


def places(table: Table) -> list[tuple[int, int]]:
    layer, head = table.columns.index("layer"), table.columns.index("head")
    return [(row[layer], row[head]) for row in table.rows]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_has_rows_and_formats_them(store: Store, view: str) -> None:
    table = run_query(store, view)
    assert table.rows
    objects = json.loads(table.to_json())
    assert [list(o) for o in objects] == [list(table.columns)] * len(table.rows)
    lines = list(csv.reader(io.StringIO(table.to_csv())))
    assert lines[0] == list(table.columns)
    assert len(lines) == len(table.rows) + 1
    brief = table.only(VIEWS[view].brief)
    assert len(brief.rows[0]) == len(VIEWS[view].brief)
    assert set(VIEWS[view].order) <= VIEWS[view].kinds.keys()
    assert VIEWS[view].help.keys() <= set(table.columns)


def test_which_heads_are_sinks_of_low_rank(store: Store) -> None:
    table = run_query(store, "heads", "sink_mass >= 0.5 and k_rank95 < 16")
    assert places(table) == [(0, 2)]
    assert set(SCALAR_NAMES) <= set(table.columns)


def test_which_kernel_wins_at_32k_on_h100(store: Store) -> None:
    table = run_query(
        store, "timings", "keys = 32768 and device like '%h100%'", order_by="median_ms", limit=1
    )
    assert table.only(("approximation",)).rows == [("dense",)]


def test_what_was_planned_under_30_ms(store: Store) -> None:
    table = run_query(store, "plans", "latency_ms < 30 and feasible = true")
    assert table.only(("digest", "speedup")).rows == [("a" * 64, 3.0)]
    assert table.only(("budget",)).rows == [({"max_kl": 0.1},)]


def test_spectra_show_their_first_values(store: Store) -> None:
    table = run_query(store, "spectra", "tensor in ('k', 'a') and layer = 0", order_by="head")
    assert len(table.rows) == 6
    for tensor, rank, spectrum in table.only(("tensor", "rank95", "spectrum")).rows:
        assert rank == (8.0 if tensor == "k" else None)
        np.testing.assert_allclose(spectrum, np.linspace(1, 0, 20)[:16], atol=1e-6)


def test_runs_count_their_shards(store: Store) -> None:
    assert run_query(store, "runs").only(("shards", "status")).rows == [(1, "complete")]


def test_order_puts_missing_values_last_and_breaks_ties(store: Store) -> None:
    for text, expected in [
        ("entropy", [(0, 1), (0, 2), (1, 1), (1, 2), (0, 0), (1, 0)]),
        ("entropy DESC, head desc", [(1, 2), (1, 1), (0, 2), (0, 1), (0, 0), (1, 0)]),
    ]:
        assert places(run_query(store, "heads", order_by=text)) == expected


def test_an_integer_column_compares_with_a_fraction(store: Store) -> None:
    assert {layer for layer, _ in places(run_query(store, "heads", "layer > 0.5"))} == {1}
    assert not run_query(store, "heads", "layer in (0.5)").rows
    assert len(run_query(store, "heads", f"layer < {'9' * 400}").rows) == 6


@pytest.mark.parametrize(
    "text",
    [
        "model = 'x' or '1' = '1",
        "model = 'x'; drop table models",
        "model = 'x' -- and layer = 0",
        "layer = 0 union select * from models",
        "layer = (select 1)",
        "sink_mass > 0.5) or (1 = 1",
        "load_extension('x') = 1",
        "layer = 0 /* comment */",
        "run_id = 1",
        "fingerprint = 'f'",
        "model_1.name = 'x'",
        "layer = :param",
        "layer = ?",
    ],
)
def test_sql_is_no_filter(store: Store, text: str) -> None:
    with pytest.raises(ValueError, match=r"^filter: "):
        run_query(store, "heads", text)
    with pytest.raises(ValueError, match=r"^order: "):
        run_query(store, "heads", order_by=text)
    assert len(run_query(store, "heads").rows) == 6


@pytest.mark.parametrize(
    "value", ["' or 1=1 --", "'; drop table models; --", '"', "\\", "%", "\n", "ключ", MODEL.name]
)
def test_a_text_is_only_ever_a_value(store: Store, value: str) -> None:
    quoted = "'" + value.replace("'", "''") + "'"
    found = run_query(store, "heads", f"model = {quoted}")
    assert len(found.rows) == (6 if value == MODEL.name else 0)
    quoted = '"' + value.replace('"', '""') + '"'
    assert run_query(store, "heads", f"model in ({quoted})").rows == found.rows


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("O'BRIEN%", True), ("%\\", True), ("o'Brien", False), ("%7b%", True), ("%\\%", True)],
)
def test_like_knows_percent_and_underscore_only(store: Store, pattern: str, found: bool) -> None:
    quoted = pattern.replace("'", "''")
    assert bool(run_query(store, "heads", f"model like '{quoted}'").rows) is found
    assert bool(run_query(store, "heads", f"model not like '{quoted}'").rows) is not found


COLUMNS = {"a": NUMBER, "b": NUMBER, "name": TEXT, "ok": TRUTH}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty; write, for example"),
        ("a", "at the end (position 2): want a comparison, such as"),
        ("a >", "at the end (position 4): want a column, a number or a quoted text"),
        ("a > 1 b", "at 'b' (position 7): want 'and', 'or' or the end"),
        ("a > 1 and", "at the end (position 10): want a column"),
        ("(a > 1", "at the end (position 7): want ')'"),
        ("a > 1)", "at ')' (position 6): want 'and'"),
        ("a > 'x'", "at \"'x'\" (position 5): a is a number, this is a text"),
        ("name = 1", "at '1' (position 8): name is a text, this is a number"),
        ("ok = 1", "at '1' (position 6): ok is true or false, this is a number"),
        ("a > b > 1", "at '>' (position 7): want 'and'"),
        ("a is 1", "at '1' (position 6): want 'null'"),
        ("a in ()", "at ')' (position 7): want a column, a number"),
        ("a in (b)", "at 'b' (position 7): want a number or a quoted text"),
        ("a in (1, 'x')", "at \"'x'\" (position 10): a is a number, this is a text"),
        ("a like '1%'", "at \"'1%'\" (position 8): 'like' needs a text, a is a number"),
        ("name like name", "at 'name' (position 11): want a quoted pattern"),
        ("a not = 1", "at '=' (position 7): want 'in' or 'like'"),
        ("1 is null", "at 'is' (position 3): want a comparison after '1'"),
        ("nam = 'x'", "at 'nam' (position 1): unknown column 'nam'; did you mean 'name'? columns"),
        ("zzz = 'x'", "unknown column 'zzz'; columns of this view: a, b, name, ok"),
        ("a = null", "at 'null' (position 5): want a column"),
        ("name = 'x", 'at "\'" (position 8): this quote is not closed'),
        ("a > 1 & b > 1", "at '&' (position 7): not part of a filter"),
        ("a = 1x", "at '1' (position 5): not part of a filter"),
        ("a = 1.2.3", "at '1' (position 5): not part of a filter"),
        ("name = '\0'", "a zero byte in the text at position 8"),
        ("name = '\ud800'", "not UTF-8 at position 9"),
        ("(" * 60 + "a = 1" + ")" * 60, "at most 50 parentheses within each other"),
        (" or ".join(["a = 1"] * 500), "1999 words and signs, at most 1000 are read"),
    ],
)
def test_a_broken_filter_points_at_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^filter: .*" + re.escape(message)) as caught:
        parse_filter(text, COLUMNS)
    assert "\n" not in str(caught.value)


def test_not_binds_before_and_and_and_before_or() -> None:
    a, b, c = (parse_filter(f"a = {i}", COLUMNS) for i in range(3))
    assert parse_filter("NOT a=0 AND a == 1 Or a= 2", COLUMNS) == filters.Or(
        (filters.And((filters.Not(a), b)), c)
    )
    assert parse_filter("not (a = 0 and (a = 1 or a = 2))", COLUMNS) == filters.Not(
        filters.And((a, filters.Or((b, c))))
    )
    assert parse_filter("not not a <> -1.5e-3", COLUMNS) == filters.Compare(
        filters.Column("a"), "!=", -1.5e-3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": "head"}, "unknown view 'head'; known: heads, spectra,"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"order_by": "sink_mas"}, "order: unknown column 'sink_mas'; did you mean 'sink_mass'?"),
        ({"order_by": "layer down"}, "order: 'layer down' is not a column, or a column and asc"),
        ({"order_by": "layer,"}, "order: '' is not a column"),
    ],
)
def test_a_wrong_argument_is_named(store: Store, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_query(store, **({"view": "heads"} | arguments))


def test_what_is_not_finite_is_null_in_json() -> None:
    table = Table(("x", "y"), [(float("inf"), [1.0, float("nan")])])
    assert json.loads(table.to_json()) == [{"x": None, "y": [1.0, None]}]


# A filter as the database evaluates it, against one that knows nothing of SQL.

NAMES = {"layer": NUMBER, "sink_mass": NUMBER, "entropy": NUMBER, "mass_dropped": NUMBER}
SIGNS = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
numbers = st.sampled_from([-1, 0, 0.25, 0.5, 1, 2, 8, 16.0, 1e3])
columns = st.sampled_from(["layer", "head", "sink_mass", "entropy", "k_rank95", "a_decay"])


conditions = st.one_of(
    st.builds(
        lambda c, s, v: (f"{c} {s} {v!r}", ("compare", c, s, v)),
        columns, st.sampled_from(list(SIGNS)), numbers,
    ),
    st.builds(
        lambda v, s, c: (f"{v!r}{s}{c}", ("flipped", c, s, v)),
        numbers, st.sampled_from(list(SIGNS)), columns,
    ),
    st.builds(
        lambda c, s, d: (f"{c}{s}{d}", ("columns", c, s, d)),
        columns, st.sampled_from(list(SIGNS)), columns,
    ),
    st.builds(
        lambda c, n: (f"{c} is {'not ' * n}null", ("null", c, n)), columns, st.booleans()
    ),
    st.builds(
        lambda c, n, v: (f"{c} {'not ' * n}in ({', '.join(map(repr, v))})", ("in", c, n, v)),
        columns, st.booleans(), st.lists(numbers, min_size=1, max_size=4),
    ),
)  # fmt: skip
trees = st.recursive(
    conditions,
    lambda inner: st.one_of(
        st.builds(lambda x: (f"not ({x[0]})", ("not", x[1])), inner),
        st.builds(lambda x, y: (f"({x[0]}) and ({y[0]})", ("and", x[1], y[1])), inner, inner),
        st.builds(lambda x, y: (f"({x[0]}) OR ({y[0]})", ("or", x[1], y[1])), inner, inner),
    ),
    max_leaves=8,
)


def holds(tree: tuple[Any, ...], row: dict[str, Any]) -> bool | None:
    """Three-valued truth: None where a missing value decides."""
    match tree:
        case ("not", part):
            inner = holds(part, row)
            return None if inner is None else not inner
        case ("and", *parts):
            found = [holds(part, row) for part in parts]
            return False if False in found else None if None in found else True
        case ("or", *parts):
            found = [holds(part, row) for part in parts]
            return True if True in found else None if None in found else False
        case ("null", column, negated):
            return (row[column] is None) is not negated
        case ("in", column, negated, values):
            return None if row[column] is None else (row[column] in values) is not negated
        case ("columns", column, sign, other):
            left, right = row[column], row[other]
            return None if left is None or right is None else bool(SIGNS[sign](left, right))
        case ("flipped", column, sign, value):
            return None if row[column] is None else bool(SIGNS[sign](value, row[column]))
        case (_, column, sign, value):
            return None if row[column] is None else bool(SIGNS[sign](row[column], value))
    raise AssertionError(tree)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=trees)
def test_a_filter_keeps_the_rows_for_which_it_holds(
    store: Store, tree: tuple[str, tuple[Any, ...]]
) -> None:
    text, meaning = tree
    everything = run_query(store, "heads")
    rows = [dict(zip(everything.columns, row, strict=True)) for row in everything.rows]
    expected = [(row["layer"], row["head"]) for row in rows if holds(meaning, row)]
    assert places(run_query(store, "heads", text)) == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab ()'\"=<>!,.%0123456789andornotislikeu_;-\\\0é", max_size=40))
def test_any_text_is_a_filter_or_gets_one_sentence(text: str) -> None:
    try:
        parse_filter(text, COLUMNS)
    except ValueError as error:
        assert str(error).startswith("filter: ")


def test_statistics_are_described() -> None:
    assert set(SCALAR_NAMES) <= set(view_of("heads").help)


def test_a_query_leaves_the_file_alone(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'empty.db'}") as store:
        for view in VIEWS:
            assert run_query(store, view).rows == []
