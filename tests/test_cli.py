"""The command line, on a tiny random model: every command, and every error in one sentence."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_model

from attnplan.cli import app as cli
from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.window import Window
from attnplan.models.load import load_model
from attnplan.pipeline.verify import unjudged
from attnplan.plan.plan import Plan, Target
from attnplan.search.candidates import candidates

SMALL = ("--context", "256", "--sequences", "1")
QUICK = (*SMALL, "--trials", "2", "--swaps", "1", "--repeats", "1")
DENSE, NARROW = catalog.DENSE, Approximation(Window(32))
WHOLE = Approximation(Window(4096))


@dataclass(frozen=True)
class Result:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny kernels on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models; commands run in it."""
    path = tmp_path_factory.mktemp("cli")
    tiny_model.save(path / "tiny")
    tiny_model.save(path / "other", seed=1)
    return path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the console script in this process."""
    monkeypatch.chdir(folder)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["attnplan", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def profiled(run: Run, folder: Path) -> str:
    """URL of a database with one profile."""
    url = f"sqlite:///{folder}/profiled.db"
    if not (folder / "profiled.db").exists():
        assert run("profile", "tiny", *SMALL, "--db", url).code == 0
    return url


def rows(database: Path, of: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(f"select * from {of} order by 1, 2, 3").fetchall()


TABLES = (
    "profile_runs",
    "profile_shards",
    "head_profiles",
    "fitted",
    "candidate_scores",
    "score_shards",
    "kernel_timings",
    "measurements",
)


def content(database: Path) -> dict[str, list[tuple[Any, ...]]]:
    return {table: rows(database, table) for table in TABLES}


def plan_file(folder: Path, name: str, approximation: Approximation) -> Path:
    """A hand-made plan for prefills of 16 to 300 tokens."""
    path = folder / name
    if not path.exists():
        plan = Plan.from_assignment(
            [[approximation] * 4, [approximation, DENSE, approximation, approximation]],
            model=load_model(str(folder / "tiny")).identity,
            target=Target("here", "cpu", "float32", "cpu", {}),
            context=(16, 300),
        )
        plan.save(path)
    return path


def assert_one_sentence(found: Result, message: str, code: int = 2) -> None:
    """An error: nothing on standard output, and one line at the end of standard error."""
    assert found.code == code, found.err
    assert found.out == ""
    assert "Traceback" not in found.err
    last = found.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("attnplan: ")
    assert message in last


# The commands


def test_profile_fills_the_store(run: Run, profiled: str) -> None:
    found = run("query", "heads", "--db", profiled, "--format", "json")
    heads = json.loads(found.out)
    assert [(h["layer"], h["head"]) for h in heads] == [(i, j) for i in range(2) for j in range(4)]
    for head in heads:
        assert 0 < head["sink_local_mass"] <= 1
        assert 0 < head["effective_keys"] <= 256
        assert head["fisher_total"] > 0
        assert all(math.isfinite(v) for v in head.values() if isinstance(v, float))


def test_a_second_profile_does_nothing_new(run: Run, folder: Path, profiled: str) -> None:
    before = content(folder / "profiled.db")
    found = run("profile", "tiny", *SMALL, "--db", profiled)
    assert found.code == 0
    assert "profile run 1: mean over the heads of each layer" in found.out
    assert content(folder / "profiled.db") == before


@pytest.mark.parametrize("view", ["heads", "spectra", "timings", "scores", "plans", "runs"])
def test_every_view_answers_in_every_format(run: Run, searched: Path, view: str) -> None:
    url = f"sqlite:///{searched}"
    listed = json.loads(run("query", view, "--db", url, "--format", "json").out)
    assert listed or view == "plans"
    written = run("query", view, "--db", url, "--format", "csv")
    assert len(list(csv.DictReader(io.StringIO(written.out)))) == len(listed)
    shown = run("query", view, "--db", url, "--limit", "3")
    assert (written.code, shown.code, shown.err) == (0, 0, "")
    assert "┃" in shown.out


def test_filters_and_orders_reach_the_store(run: Run, profiled: str) -> None:
    arguments = ("--where", "layer = 1 and sink_mass > 0", "--order-by", "sink_mass desc")
    found = run("query", "heads", *arguments, "--limit", 2, "--db", profiled, "--format", "json")
    masses = [head["sink_mass"] for head in json.loads(found.out)]
    assert len(masses) == 2 and masses == sorted(masses, reverse=True)
    assert {head["layer"] for head in json.loads(found.out)} == {1}


KEYS = {
    "kl_per_token": float,
    "perplexity": float,
    "perplexity_dense": float,
    "tokens": int,
    "density": float,
    "latency_ms": {"plan", "dense"},
    "speedup": float,
    "kv_bytes": {"plan", "dense"},
    "peak_bytes": {"plan", "dense"},
    "kl_last_quarter": float,
    "continuation_kl": float,
    "continuation_perplexity": {"plan", "dense"},
    "decode_ms_per_token": {"plan", "dense"},
    "induction_accuracy": {"plan", "dense"},
}


def evaluated(run: Run, *more: object) -> dict[str, Any]:
    found = run("evaluate", "tiny", *SMALL, "--repeats", 1, "--json", *more)
    assert found.code == 0, found.err
    assert found.out.count("\n") == 1
    answer: dict[str, Any] = json.loads(found.out)
    for key, kind in KEYS.items():
        if isinstance(kind, set):
            assert set(answer[key]) == kind
        else:
            assert isinstance(answer[key], kind)
    return answer


def test_evaluating_a_narrow_plan_tells_what_it_loses(run: Run, folder: Path) -> None:
    found = evaluated(run, "--plan", plan_file(folder, "narrow.yaml", NARROW))
    assert 1 / 8 < found["density"] < 0.6
    assert found["kl_per_token"] > 1e-3
    assert found["perplexity"] != found["perplexity_dense"]
    assert found["tokens"] == 255
    assert found["planned_layers"] == 2
    assert found["notes"] == [unjudged(found["induction_accuracy"]["dense"])]  # nothing is learnt
    # keys and values of two layers, two kv heads, 256 tokens, 16 dimensions, float32
    assert found["kv_bytes"] == {"plan": 131072, "dense": 131072}
    milliseconds = found["latency_ms"]
    assert found["speedup"] == pytest.approx(milliseconds["dense"] / milliseconds["plan"])


def test_a_memory_budget_ends_with_a_cache_that_holds_less(run: Run, folder: Path) -> None:
    """Searched, written, loaded, and counted from storage; the tokens after it are compared."""
    url = f"sqlite:///{folder}/memory.db"
    found = run(
        *("search", "tiny", *SMALL, "--trials", 2, "--max-memory", "0.8x", "--json"),
        *("--out", "memory.yaml", "--db", url),
    )
    assert found.code == 0, found.err
    told = json.loads(found.out)["memory"]
    assert all(a <= 0.8 * b for a, b in zip(told["kv_bytes"], told["kv_bytes_dense"], strict=True))
    again = evaluated(run, "--plan", folder / "memory.yaml")
    assert again["kv_bytes"]["plan"] <= 0.8 * again["kv_bytes"]["dense"]
    assert again["continuation_kl"] > 0
    perplexity = again["continuation_perplexity"]
    assert perplexity["plan"] != perplexity["dense"]
    assert any("never reads a condensed cache" in note for note in again["notes"])
    assert any("retrieval could not be judged: the texts are too" in n for n in again["notes"])
    assert again["kl_per_token"] == pytest.approx(0, abs=1e-6)  # prefill is dense
    shown = run("show", "memory.yaml")
    assert "decoding keeps everything in" in shown.out
    (stored,) = json.loads(run("query", "plans", "--db", url, "--format", "json").out)
    assert stored["path"] == "memory.yaml" and stored["status"] == "complete"
    assert stored["kv_bytes"] == told["kv_bytes"][0]
    with sqlite3.connect(folder / "memory.db") as connection:
        (text,) = connection.execute("select yaml from plans").fetchone()
    assert text == (folder / "memory.yaml").read_text()


def test_budgets_of_memory_and_decoding_make_one_plan(run: Run, folder: Path) -> None:
    """Both are searched together and in the file; what no plan can do is said beforehand."""
    url = f"sqlite:///{folder}/together.db"
    arguments = ("search", "tiny", *SMALL, "--trials", 1, "--db", url, "--out", "both.yaml")
    found = run(*arguments, "--max-memory", "0.8x", "--max-decode", "100x", "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["budget"]["max_decode"] == "100.0x"
    assert min(told["memory"]["decode_ms"]) > 0
    assert "max_decode: 100.0x" in (folder / "both.yaml").read_text()
    (stored,) = json.loads(run("query", "plans", "--db", url, "--format", "json").out)
    assert stored["path"] == "both.yaml" and stored["budget"]["max_decode"] == "100.0x"
    ignored = run(*arguments, "--max-memory", "0.8x", "--max-ppl-ratio", 1.01)
    assert ignored.code == 2 and "--max-ppl-ratio 1.01 is about the prefill" in ignored.err
    refused = run(*arguments, "--max-decode", "0.000001ms")
    assert refused.code == 1
    assert "no plan generates a token in 1e-06ms: the fastest needs" in refused.err


def test_evaluating_a_plan_that_keeps_everything_loses_nothing(run: Run, folder: Path) -> None:
    found = evaluated(run, "--plan", plan_file(folder, "whole.yaml", WHOLE))
    assert found["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert found["perplexity"] == pytest.approx(found["perplexity_dense"], rel=1e-4)
    assert found["density"] == pytest.approx(1)


def test_outside_its_context_a_plan_is_evaluated_as_dense(run: Run, folder: Path) -> None:
    narrow = plan_file(folder, "narrow.yaml", NARROW)
    with pytest.warns(UserWarning, match="tokens, but the plan was verified up to 300"):
        found = evaluated(run, "--plan", narrow, "--context", 310)
    assert (found["kl_per_token"], found["density"], found["planned_layers"]) == (0, 1, 0)
    why = "no layer ran the plan, all ran dense: it is for 16 to 300 tokens, not for 310"
    assert found["notes"][0] == why


def test_evaluating_without_a_plan_compares_the_model_with_itself(run: Run, folder: Path) -> None:
    (folder / "text.txt").write_text("All work and no play makes a dull day. " * 60)
    found = evaluated(run, "--data", "text.txt", "--offset", 100)
    assert (found["kl_per_token"], found["density"]) == (0, 1)
    assert found["perplexity"] == found["perplexity_dense"]


def test_evaluate_prints_a_table_for_people(run: Run, folder: Path) -> None:
    narrow = plan_file(folder, "narrow.yaml", NARROW)
    found = run("evaluate", "tiny", *SMALL, "--repeats", 1, "--plan", narrow)
    assert found.code == 0
    assert all(key in found.out for key in KEYS)
    assert "induction could not be judged" in found.out


def test_show_and_validate_tell_what_a_plan_does(run: Run, folder: Path) -> None:
    narrow = plan_file(folder, "narrow.yaml", NARROW)
    shown = run("show", narrow)
    assert shown.code == 0
    assert "prefill of 16 to 300 tokens" in shown.out
    assert "window: 0, 2, 3; dense: 1" in shown.out
    assert "window(window=32, sinks=4)" in shown.out
    valid = run("validate", narrow, "--model", "tiny")
    assert valid.code == 0
    assert valid.out.startswith(f"{narrow} is valid: tiny on here in float32")


def test_doctor_says_what_runs_here(run: Run) -> None:
    found = run("doctor")
    assert found.code == 0
    assert "cpu engine" in found.out
    assert all(method in found.out for method in (*catalog.NEAR, *catalog.FAR))


def test_bench_times_every_candidate_and_travels(run: Run, folder: Path) -> None:
    first, second = (f"sqlite:///{folder}/bench{i}.db" for i in range(2))
    table = folder / "table.jsonl"
    arguments = ("--context", 128, "--repeats", 1, "--db", first, "--export", table)
    found = run("bench", "tiny", *arguments)
    assert found.code == 0, found.err
    assert "128 tokens" in found.out and "window(window=32, sinks=4)" in found.out
    imported = run("bench", "--import", table, "--db", second)
    assert imported.code == 0
    assert "timings read from" in imported.err and imported.out == ""
    timings = [
        json.loads(run("query", "timings", "--db", url, "--format", "json").out)
        for url in (first, second)
    ]
    assert len(timings[0]) == len(timings[1]) > 5
    assert not list((folder / ".attnplan").glob("*/*.partial"))


def test_bench_times_only_the_methods_that_are_named(run: Run, folder: Path) -> None:
    url = f"sqlite:///{folder}/some.db"
    arguments = ("bench", "tiny", "--context", 128, "--repeats", 1, "--db", url)
    found = run(*arguments, "--methods", "window,strided")
    assert found.code == 0, found.err
    assert "window(window=32, sinks=4)" in found.out
    others = {*catalog.NEAR, *catalog.FAR} - {"dense", "window", "strided"}
    assert not [name for name in others if f" {name}(" in found.out]
    for more, message in (
        (("--methods", "windows"), "unknown method 'windows'"),
        (("--methods", "window", "--decode"), "which --decode does not time"),
    ):
        refused = run(*arguments, *more)
        assert refused.code == 2 and message in refused.err


def test_bench_times_generated_tokens(run: Run, folder: Path) -> None:
    """Every keeper beside the dense cache, from the store the second time."""
    arguments = ("bench", "tiny", "--decode", "--context", 256, "--repeats", 1)
    url = f"sqlite:///{folder}/decode.db"
    found, again = (run(*arguments, "--db", url) for _ in range(2))
    assert found.code == 0, found.err
    assert found.out == again.out
    assert "a token after 256, one layer" in found.out
    assert "recent(window=92, sinks=4)" in found.out and "2 x full()" in found.out


def test_a_plan_for_another_device_comes_from_its_table(run: Run, folder: Path) -> None:
    """Times are predicted and said to be; quality is measured; what is missing is named."""
    url, table = f"sqlite:///{folder}/there.db", folder / "there.jsonl"
    bench = ("bench", "tiny", "--context", 256, "--repeats", 1, "--db", url, "--export", table)
    assert run(*bench).code == 0
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    for line in lines:
        line["device"] |= {"name": "Faraway 9000", "kind": "cuda", "threads": 0}
        own = line["timing"]  # dense attention is slow there
        if "dense" in own["approximation"] and "|" not in own["approximation"]:
            for name in ("median_ms", "q25_ms", "q75_ms"):
                own[name] *= 50
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))

    search = ("search", "tiny", *SMALL, "--trials", 1, "--swaps", 0, "--target", table)
    files = ("--db", f"sqlite:///{folder}/here.db", "--out", "there.yaml")
    found = run(*search, *files, "--max-density", 0.9, "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert (told["times"], told["device"]) == ("predicted", "Faraway 9000")
    # what was timed is the engine of a CPU, which is another one than that of a GPU
    (note,) = (note for note in told["notes"] if "are of another engine" in note)
    assert f"{len(lines)} of {len(lines)} timings" in note and "dense" in note
    plan = Plan.load(folder / "there.yaml")
    assert (plan.target.device, plan.target.kind) == ("Faraway 9000", "cuda")
    assert "latency_ms" not in plan.evidence["measured"]
    assert plan.evidence["measured"]["kl_per_token"] >= 0
    predicted = plan.evidence["predicted"]
    assert predicted["latency_ms"] < predicted["latency_dense_ms"]
    told = run(*search, *files, "--max-density", 0.9)
    assert "attention as predicted for Faraway 9000" in told.out

    elsewhere = run(*search, *files, "--max-density", 0.9, "--context", 250)
    assert elsewhere.code == 2
    assert "Faraway 9000 has no timings of 4 heads, 2 kv heads of 16 in float32 at 250" in (
        elsewhere.err.replace("\n", " ")
    )
    # a table without mixtures: nothing to hold the cost model against
    alike = [line for line in table.read_text().splitlines() if " | " not in line]
    assert 2 < len(alike) < len(lines)
    table.write_text("".join(f"{line}\n" for line in alike))
    few = run(*search, *files, "--max-density", 0.9)
    assert few.code == 0, few.err
    assert "cost model: error unknown" in few.out
    assert "cost_model_error" not in Plan.load(folder / "there.yaml").evidence
    memory = run(*search, *files, "--max-memory", "0.5x")
    assert memory.code == 2 and "--target plans the prefill alone" in memory.err
    table.write_text("")
    empty = run(*search, *files, "--max-density", 0.9)
    assert empty.code == 2 and "a target is one device, this table has 0: none" in empty.err


def test_help_names_every_command(run: Run) -> None:
    found = run("--help")
    assert found.code == 0
    for command in (
        "profile", "bench", "search", "evaluate", "compare", "query", "show", "validate",
        "doctor", "demo",
    ):  # fmt: skip
        assert f" {command} " in found.out


# The whole job


def test_compare_lists_every_method(run: Run, folder: Path) -> None:
    url = f"sqlite:///{folder}/league.db"
    arguments = ("compare", "tiny", *SMALL, "--density", 0.8, "--repeats", 1, "--db", url)
    found = run(*arguments, "--json")
    assert found.code == 0
    entries = {entry["name"]: entry for entry in json.loads(found.out)["entries"]}
    shape = AttentionShape(1, 4, 2, 256, 256, 16)
    assert set(entries) == {a.name for a in candidates(shape) if not a.is_dense}
    assert sum(entry["wins"] for entry in entries.values()) == 2 * 4
    measured = [entry for entry in entries.values() if entry["setting"]]
    assert measured and all(e["kl"] >= 0 and e["speedup"] > 0 for e in measured)
    again = run(*arguments)  # from the store, as a table
    assert again.code == 0 and all(name in again.out for name in ("window", "loki"))


def test_compare_refuses_a_density_out_of_range(run: Run) -> None:
    found = run("compare", "tiny", *SMALL, "--density", 1.5)
    assert found.code == 2 and "density must be more than 0 and at most 1, got 1.5" in found.err


@pytest.fixture
def searched(run: Run, folder: Path) -> Path:
    """The database of one search, whatever it found."""
    database = folder / "searched.db"
    if not database.exists():
        out = folder / "first.yaml"
        arguments = ("--max-density", 0.6, "--db", f"sqlite:///{database}", "--json")
        assert_outcome(run("search", "tiny", *QUICK, "--out", out, *arguments), out)
    return database


def assert_outcome(found: Result, out: Path) -> dict[str, Any] | None:
    """A search ends with a plan that is valid, or with one sentence that says why there is none."""
    if found.code == 0:
        answer: dict[str, Any] = json.loads(found.out)
        assert answer["plan"] == str(out)
        assert [row["name"] for row in answer["rows"]][-1] == "per head"
        plan = Plan.load(out)
        assert plan.evidence["store"]["search"] >= 1
        low, high = plan.prefill[0].context
        assert low <= high == 256
        return answer
    assert found.code == 1, found.err
    last = found.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("attnplan: no plan within the budget ")
    assert not out.exists()
    return json.loads(found.out) if found.out else None


def test_a_search_leaves_scores_timings_and_no_captured_tensors(
    folder: Path, searched: Path
) -> None:
    scores = rows(searched, "candidate_scores")
    shards = rows(searched, "score_shards")
    assert len(shards) == 2 + 2 * 2  # two layers: scouted, on a text, on the string
    first = [row for row in scores if row[1] == 0]  # no head is left out on the first text
    assert len(first) % 4 == 0 and len(first) > 0
    assert rows(searched, "kernel_timings")
    assert not list((folder / ".attnplan").glob("*/*.partial"))


def test_another_budget_starts_from_the_solver(
    run: Run, folder: Path, searched: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = content(searched)
    monkeypatch.chdir(tmp_path)
    Path(".attnplan").write_text("in the way of captured tensors")
    arguments = ("--max-density", 0.7, "--db", f"sqlite:///{searched}", "--json")
    out = tmp_path / "second.yaml"
    found = run("search", folder / "tiny", *QUICK, "--out", out, *arguments)
    answer = assert_outcome(found, out)
    after = content(searched)
    for table in set(TABLES) - {"measurements"}:
        assert after[table] == before[table], table
    assert answer is None or answer["solver_seconds"] < 5


def test_the_same_search_again_reads_everything_back(
    run: Run, folder: Path, searched: Path
) -> None:
    arguments = ("--max-density", 0.6, "--db", f"sqlite:///{searched}", "--json")
    out = folder / "again.yaml"
    before = content(searched)
    assert_outcome(run("search", "tiny", *QUICK, "--out", out, *arguments), out)
    assert content(searched) == before
    first = folder / "first.yaml"
    if first.exists():
        assert Plan.load(first).prefill == Plan.load(out).prefill


def test_show_explains_a_head_of_a_searched_plan(run: Run, folder: Path, searched: Path) -> None:
    """The plan is made by hand with the search's evidence: a search may find none."""
    plan = Plan.from_assignment(
        [[NARROW] * 4, [DENSE] * 4],
        model=load_model(str(folder / "tiny")).identity,
        target=Target("here", "cpu", "float32", "cpu", {}),
        context=(16, 256),
        evidence={"store": {"profile_run": 1, "search": 1}},
    )
    plan.save(folder / "explained.yaml")
    arguments = ("--layer", 0, "--head", 3, "--db", f"sqlite:///{searched}")
    found = run("show", folder / "explained.yaml", *arguments)
    assert found.code == 0, found.err
    assert "layer 0, head 3: window(window=32, sinks=4)" in found.out
    assert "sink_mass" in found.out
    chosen = [line for line in found.out.split("\n") if "chosen" in line]
    assert len(chosen) == 1 and "window(window=32, sinks=4)" in chosen[0]


# Errors


def broken(folder: Path, name: str, old: str, new: str) -> Path:
    text = plan_file(folder, "narrow.yaml", NARROW).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    return folder / name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("methods:", "methods: [", "broken.yaml: "),
        ("name: window", "name: slidingwindow", "unknown approximation 'slidingwindow'; known: "),
        ("'0, 2-3'", "'0-1, 2-3'", "head 1 is listed twice"),
        ("layers: 2", "layers: 3", "layer"),
        ("attnplan: 1", "attnplan: 99", "99"),
        ("window: 32", "window: many", "window must be a whole number, got 'many'"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "show", "evaluate"])
def test_a_broken_plan_is_refused(
    run: Run, folder: Path, command: str, old: str, new: str, message: str
) -> None:
    plan = broken(folder, "broken.yaml", old, new)
    arguments = ["tiny", *SMALL, "--plan", plan] if command == "evaluate" else [plan]
    assert_one_sentence(run(command, *arguments), message)


def test_a_plan_for_another_model_is_refused(run: Run, folder: Path) -> None:
    narrow = plan_file(folder, "narrow.yaml", NARROW)
    for arguments in (
        ("evaluate", "other", *SMALL, "--plan", narrow),
        ("validate", narrow, "--model", "other"),
    ):
        assert_one_sentence(run(*arguments), "the plan is for tiny")


WITH_DATA = ("profile", "evaluate", "search")


@pytest.mark.parametrize("command", WITH_DATA)
def test_texts_that_cannot_be_used_are_refused(run: Run, folder: Path, command: str) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("three small words")
    budget = ["--out", "plan.yaml", "--max-density", 0.5] if command == "search" else []
    for data, context, message in (
        ("empty.txt", 256, "empty.txt: the file is empty"),
        ("short.txt", 256, "tokens, but 1 x 256 are wanted"),
        ("absent.txt", 256, "absent.txt: cannot be read"),
        ("builtin", 513, "context 513 is longer than the 512 tokens that tiny was made for"),
        ("builtin", 0, "context must be at least 1 token, got 0"),
        ("builtin", 1, "context must be at least"),
    ):
        arguments = ("--data", data, "--context", context, "--sequences", 1)
        assert_one_sentence(run(command, "tiny", *budget, *arguments), message)
    assert not (folder / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("search tiny --out long.yaml --max-memory 0.5x --context 512", "that fits is 511"),
        ("search tiny --out long.yaml --max-decode 0.5x --context 512", "that fits is 511"),
        ("search tiny --out long.yaml --max-memory 0.5x --context 34", "at least 35 tokens"),
        ("search tiny --out a.yaml --max-memory 0.5x --target h100", "--target plans the prefill"),
        ("evaluate tiny --context 34", "context must be at least 35 tokens to time generated"),
    ],
)
def test_lengths_that_cannot_be_measured_are_refused_before_any_work(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    for work in (
        "profiling.profiling.captured_text",
        "pipeline.assess.Reference",
        "pipeline.measured.Reference",
    ):
        monkeypatch.setattr(f"attnplan.{work}", lambda *_: pytest.fail("work was done"))
    before = {path.name for path in folder.iterdir()}
    assert_one_sentence(run(*command.split(), "--sequences", 1), message)
    assert {path.name for path in folder.iterdir()} - {"attnplan.db"} <= before


@pytest.mark.parametrize("command", WITH_DATA)
def test_models_and_devices_that_are_not_there_are_refused(run: Run, command: str) -> None:
    budget = ["--out", "plan.yaml", "--max-density", 0.5] if command == "search" else []
    for model, device, message in (
        ("./nowhere", "cpu", "there is no file or directory ./nowhere"),
        ("tiny", "abacus", "unknown device 'abacus'; use cpu, cuda or cuda:N"),
        ("tiny", "cuda:99", "there is no device 'cuda:99'"),
        ("tiny", "meta", "no attention engine for device 'meta'"),
    ):
        assert_one_sentence(run(command, model, *budget, *SMALL, "--device", device), message)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ((), "a budget needs a limit: --max-density, --max-latency"),
        (("--max-latency", "fast"), "latency must be a factor of dense such as 0.6x or 25ms"),
        (("--max-memory", "1 elephant"), "memory must be a factor of dense such as 0.5x"),
        (("--max-density", 2), "max density must be above 0 and at most 1, got 2.0"),
        (("--max-kl", 0.1, "--minimize", "memory"), "memory can be limited but not minimized"),
        (("--max-density", 0.5, "--minimize", "speed"), "can minimize kl, latency or memory"),
        (("--max-density", 0.5, "--out", "tiny"), "--out names the YAML file of the plan"),
        (("--max-density", 0.5, "--out", "x.safetensors"), "--out names the YAML file"),
        (("--max-density", 0.5, "--holdout", "absent.txt"), "absent.txt: cannot be read"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    run: Run, limit: tuple[object, ...], message: str
) -> None:
    found = run("search", "tiny", *SMALL, "--out", "plan.yaml", *limit)
    assert_one_sentence(found, message)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            ("--max-density", 0.001, "--methods", "window,loki"),
            "no assignment has density of at most 0.001",
        ),
        (("--max-latency", "0.001ms"), "no assignment has latency_ms of at most 0.001"),
        (("--max-memory", "1KiB"), "sinks and the smallest window need "),
    ],
)
def test_a_budget_that_cannot_be_met_exits_with_one(
    run: Run, folder: Path, searched: Path, limit: tuple[object, ...], message: str
) -> None:
    url = f"sqlite:///{searched}"
    found = run("search", "tiny", *QUICK, "--out", "never.yaml", "--db", url, *limit)
    assert_one_sentence(found, "no ", code=1)
    assert message in found.err or "predicted to be faster than dense" in found.err
    assert not (folder / "never.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "tails"), "unknown view 'tails'; known: heads"),
        (("query", "heads", "--where", "sink_mass >"), "filter: at the end"),
        (("query", "heads", "--where", "sink = 1"), "sink"),
        (("query", "heads", "--where", "1; drop table models"), "filter: "),
        (("query", "heads", "--format", "xml"), "unknown format 'xml'; known: table, json, csv"),
        (("query", "heads", "--order-by", "beauty"), "beauty"),
        (("query", "heads", "--limit", 0), "limit must be at least 1, got 0"),
        (("bench",), "nothing to do: name a MODEL to time, or use --kernels, --export or --import"),
        (("bench", "--import", "absent.jsonl"), "absent.jsonl: No such file or directory"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(
    run: Run, profiled: str, arguments: tuple[object, ...], message: str
) -> None:
    assert_one_sentence(run(*arguments, "--db", profiled), message)


def test_a_database_that_is_not_there_is_not_made(run: Run, folder: Path) -> None:
    missing = folder / "missing.db"
    found = run("query", "heads", "--db", f"sqlite:///{missing}")
    assert_one_sentence(found, "there is no database at")
    assert not missing.exists()


def test_show_needs_a_layer_and_a_head_that_exist(run: Run, folder: Path, profiled: str) -> None:
    narrow = plan_file(folder, "narrow.yaml", NARROW)
    for arguments, message in (
        (("--layer", 1), "give both --layer and --head, or neither"),
        (("--layer", 1, "--head", 4), "there is no layer 1, head 4: tiny has 2 layers of 4 heads"),
        (("--layer", 1, "--head", 3), "the plan's evidence names no profile run"),
    ):
        assert_one_sentence(run("show", narrow, *arguments, "--db", profiled), message)


# Killed processes


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """The command as a process of its own, which Ctrl-C stops even where it does not stop ours."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import runpy; runpy.run_module('attnplan', run_name='__main__', alter_sys=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_when(
    process: subprocess.Popen[str], database: Path, statement: str, how: signal.Signals
) -> str:
    """Send a signal as soon as a query has a row; what the process printed on standard error."""
    until = time.monotonic() + 500  # a starved machine takes long to start a process
    while process.poll() is None and time.monotonic() < until:
        if answer(database, statement):
            break
        time.sleep(0.005)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    return err


def answer(database: Path, statement: str) -> list[tuple[Any, ...]]:
    """What a query finds; nothing while there is no such table."""
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return connection.execute(statement).fetchall()
    except sqlite3.OperationalError:
        return []


def assert_whole_profile(database: Path, texts: int) -> None:
    """One run that is complete, with all its parts, each once."""
    assert answer(database, "select status from profile_runs") == [("complete",)]
    shards = answer(database, "select sequence from profile_shards order by 1")
    assert shards == [(text,) for text in range(texts)]
    heads = answer(database, "select layer, head from head_profiles order by 1, 2")
    assert heads == [(layer, head) for layer in range(2) for head in range(4)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_profile_goes_on_where_it_stopped(
    run: Run, folder: Path, how: signal.Signals
) -> None:
    database = folder / f"profile-{how.name}.db"
    arguments = ("tiny", "--context", 256, "--sequences", 9, "--db", f"sqlite:///{database}")
    process = start(folder, "profile", *arguments)
    err = stop_when(process, database, "select 1 from profile_shards", how)
    if how is signal.SIGKILL:
        assert process.returncode == -how, "it was done before it could be killed"
    else:
        assert process.returncode not in (0, -how)
        assert "interrupted; the same command goes on where this one stopped" in err
        assert "Traceback" not in err
    done = rows(database, "profile_shards")
    assert 1 <= len(done) < 9
    assert run("profile", *arguments).code == 0
    assert_whole_profile(database, 9)
    assert rows(database, "profile_shards")[: len(done)] == done


@pytest.mark.parametrize(
    ("when", "statement"),
    [
        ("scoring", "select 1 from score_shards"),
        ("timing", "select 1 from kernel_timings"),
        ("searching", "select 1 from trials where state = 'COMPLETE'"),
    ],
)
def test_a_killed_search_goes_on_where_it_stopped(
    run: Run, folder: Path, when: str, statement: str
) -> None:
    database, out = folder / f"killed-{when}.db", folder / f"killed-{when}.yaml"
    arguments = ("tiny", *QUICK, "--out", out, "--max-density", 0.6, "--json", "--trials", 12)
    url = ("--db", f"sqlite:///{database}")
    process = start(folder, "search", *arguments, *url)
    stop_when(process, database, statement, signal.SIGKILL)
    # 1: by the cost model nothing is faster than dense, and the search ended before its study
    assert process.returncode == -signal.SIGKILL or (process.returncode, when) == (1, "searching")
    before = content(database)
    assert_outcome(run("search", *arguments, *url), out)
    assert_whole_profile(database, 1)
    after = content(database)
    for table in set(TABLES) - {"profile_runs"}:
        assert [row for row in after[table] if row in before[table]] == before[table], table
    each = "sequence || ' ' || layer || ' ' || head || ' ' || approximation"
    counts = f"select count(*), count(distinct {each}) from candidate_scores"
    count, distinct = answer(database, counts)[0]
    assert count == distinct > 0
    shards = answer(database, "select distinct sequence, layer from score_shards order by 1, 2")
    assert shards == [(text, layer) for text in range(2) for layer in range(2)]
    assert not answer(database, "select 1 from trials where state = 'RUNNING'")
    assert not answer(database, "select 1 from searches where status = 'running'")
