"""Every file that was there before a command is byte for byte what it was after it."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests import tiny_model
from tests.test_plan import DENSE, FITTED, NARROW, fit, plan

from attnplan.cli import app as cli
from attnplan.models.load import load_model
from attnplan.plan.output import check_plan, data_file
from attnplan.plan.plan import Plan, PlanError, Target
from attnplan.profiles.store.database import Store
from attnplan.report import league_page

FITTED_ROWS = [[FITTED] * 6] * 3
STORE = "sqlite:///model/mine.db"

Contents = dict[str, str]
Run = Callable[..., int]


def contents(folder: Path) -> Contents:
    """Digest of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with what people keep beside one, and plans that are named like it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("outputs")
    tiny_model.save(folder / "model")
    identity = load_model(str(folder / "model")).identity
    small = Plan.from_assignment(
        [[NARROW] * 4] * 2,
        model=identity,
        target=Target("here", "cpu", "float32", "cpu", {}),
        context=(16, 128),
    )
    small.save(folder / "model/model.yaml")
    (folder / "model/notes.md").write_text("# Notes\n\nnot a league table\n")
    (folder / "model/page.html").write_text("<!doctype html><p>not a league table")
    (folder / "model/rows.jsonl").write_text('{"mine": 1}\n')
    (folder / "model/text.txt").write_text("a text to measure on, long enough for this. " * 40)
    for name in ("other.db", "wal.db"):
        with sqlite3.connect(folder / "model" / name) as connection:
            connection.execute("create table songs (title)")
        connection.close()
    Store(f"sqlite:///{folder}/model/filled.db").close()
    safetensors.torch.save_file({"0.weight": torch.ones(3)}, folder / "model/third.safetensors")
    (folder / "model/taken.plan.safetensors").write_bytes(b"somebody else's")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which commands run."""
    shutil.copytree(original, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the console script in this process; errors are one sentence."""

    def call(command: str) -> int:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["attnplan", *command.split()])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = int(exit_.value.code or 0)
        told = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert code == 0 or told.startswith("attnplan: "), told
        return code

    return call


OWN = {"model/mine.db"}
SMALLEST = f"model --context 128 --sequences 1 --db {STORE}"
QUICK = f"{SMALLEST} --trials 0 --swaps 0 --repeats 1"
COMMANDS: dict[str, tuple[str, set[str]]] = {
    "profile": (f"profile {SMALLEST}", OWN),
    "search": (
        f"search {QUICK} --methods window --max-density 0.9 --out model/a.yaml",
        {*OWN, "model/a.yaml", "model/a.plan.safetensors"},
    ),
    "search for memory, named like the model": (
        f"search {QUICK} --max-memory 0.9x --out model/model.yml",
        {*OWN, "model/model.yml", "model/model.yml.data.plan.safetensors"},
    ),
    "evaluate": (
        "evaluate model --context 128 --sequences 1 --plan model/model.yaml",
        set(),
    ),
    "bench": (
        f"bench model --context 128 --methods window --repeats 1 --db {STORE} --export model/t",
        {*OWN, "model/t"},
    ),
    "bench --decode": (f"bench model --decode --context 128 --repeats 1 --db {STORE}", OWN),
    "bench --kernels": (
        "bench --kernels --parts host --lengths 64 --head-dims 16 --repeats 1 --out model/s.jsonl",
        {"model/s.jsonl"},
    ),
    "show": ("show model/model.yaml", set()),
    "validate": ("validate model/model.yaml --model model", set()),
    "doctor": ("doctor", set()),
    "compare": (f"compare {SMALLEST} --repeats 1 --out model/league.md", {*OWN, "model/league.md"}),
    "query": ("query runs --db sqlite:///model/filled.db", set()),
    "demo": (
        f"demo --context 128 --db {STORE} --out model/demo.yaml",
        {*OWN, "model/demo.yaml", "model/demo.plan.safetensors"},
    ),
}
CERTAIN = COMMANDS.keys() - {"search", "demo"}
"""Those that end with 0: a search may find that nothing is faster than dense, and end with 1."""


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_change_nothing_but_what_was_named(
    folder: Path, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnplan.cli.demo.DEMO", "model")
    command, written = COMMANDS[name]
    before = contents(folder)
    assert run(command) in ((0,) if name in CERTAIN else (0, 1))
    after = {k: v for k, v in contents(folder).items() if not k.startswith(".attnplan/")}
    assert {k: after.get(k) for k in before} == before
    assert after.keys() - before.keys() <= written


SEARCH = f"search {QUICK} --max-density 0.9 --out"
REFUSED = {
    "the weights": f"{SEARCH} model/model.safetensors",
    "the configuration": f"{SEARCH} model/config.json",
    "the tokenizer": f"{SEARCH} model/tokenizer.json",
    "the folder": f"{SEARCH} model",
    "the text": f"{SEARCH} model/text.txt --data model/text.txt",
    "data of nobody": f"{SEARCH} model/taken.yaml",
    "under a file": f"{SEARCH} model/config.json/plan.yaml",
    "a database as a plan": f"{SEARCH} model/other.db",
    "store and plan": f"{SEARCH} x.yaml --db sqlite:///x.yaml",
    "store and data": f"{SEARCH} x.yaml --db sqlite:///x.plan.safetensors",
    "weights as a store": f"profile {SMALLEST} --db sqlite:///model/model.safetensors",
    "a store of others": f"profile {SMALLEST} --db sqlite:///model/other.db",
    "a question to it": "query heads --db sqlite:///model/other.db",
    "why, of it": "show model/model.yaml --layer 0 --head 0 --db sqlite:///model/other.db",
    "demo over a text": "demo --out model/text.txt",
    "notes as a league table": f"compare {SMALLEST} --out model/notes.md",
    "a page as a league table": f"compare {SMALLEST} --out model/page.html",
    "rows as a table": f"bench --export model/rows.jsonl --db {STORE}",
    "weights as a table": f"bench --export model/model.safetensors --db {STORE}",
    "a table of nothing": f"bench --import model/rows.jsonl --db {STORE}",
    "rows of a sweep": "bench --kernels --out model/rows.jsonl",
    "weights as rows": "bench --kernels --out model/model.safetensors",
}


def test_every_command_is_looked_at() -> None:
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert known == {line.split()[0] for line, _ in COMMANDS.values()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_destroy_a_file_is_refused_before_any_work(
    folder: Path, run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in (
        "profiling.profiling.captured_text",
        "bench.sweep._measured",
        "profiling.profiling.capture",
    ):
        monkeypatch.setattr(f"attnplan.{work}", lambda *_, **__: pytest.fail("work was done"))
    before = contents(folder)
    assert run(REFUSED[name]) == 2
    after = contents(folder)
    assert {k: after.get(k) for k in before} == before
    assert after.keys() - before.keys() <= OWN


# Plans and their data


def test_plans_of_one_stem_keep_their_own_data(tmp_path: Path) -> None:
    checkpoint = tmp_path / "a.safetensors"
    checkpoint.write_bytes(b"weights")
    plans = {}
    for scale, name in enumerate(("a.yaml", "a.yml", "a")):
        data = {i: {k: v + scale for k, v in of.items()} for i, of in fit().items()}
        plans[name] = plan(FITTED_ROWS, fitted=data)
        plans[name].save(tmp_path / name)
    for name, made in plans.items():
        found = Plan.load(tmp_path / name)
        assert found == made
        for key, tensor in found.fitted[0].items():
            assert torch.equal(tensor, made.fitted[0][key])
    assert checkpoint.read_bytes() == b"weights"
    assert data_file(tmp_path / "a.yaml").name == "a.plan.safetensors"
    assert len(list(tmp_path.iterdir())) == 7


def test_a_plan_replaces_itself_and_its_data(tmp_path: Path) -> None:
    path, data = tmp_path / "a.yaml", tmp_path / "a.plan.safetensors"
    fitted = plan(FITTED_ROWS, fitted=fit())
    fitted.save(path)
    before = data.read_bytes()
    other = {i: {k: v + 1 for k, v in of.items()} for i, of in fit().items()}
    replace(fitted, fitted=other, digest=None).save(path)
    assert data.read_bytes() != before
    plan([[DENSE] * 6] * 3).save(path)  # needs no data: what is not read any more goes
    assert not data.exists() and Plan.load(path).digest is None
    fitted.save(path)
    assert data.read_bytes() == before and Plan.load(path) == fitted


def test_a_plan_with_data_of_an_older_name_loads_and_leaves_it(tmp_path: Path) -> None:
    path, old = tmp_path / "a.yaml", tmp_path / "a.safetensors"
    made = plan(FITTED_ROWS, fitted=fit())
    made.save(path)
    data_file(path).rename(old)
    path.write_text(path.read_text().replace("a.plan.safetensors", "a.safetensors"))
    before = old.read_bytes()
    assert Plan.load(path) == made
    Plan.load(path).save(path)
    assert Plan.load(path) == made and data_file(path).exists() and old.read_bytes() == before


def test_data_that_is_not_the_plans_own_is_left_alone(tmp_path: Path) -> None:
    path, made = tmp_path / "a.yaml", plan(FITTED_ROWS, fitted=fit())
    data = data_file(path)
    data.write_bytes(b"a checkpoint of that name")
    with pytest.raises(PlanError, match=r"a\.plan\.safetensors is in the way"):
        made.save(path)
    assert not path.exists()
    plan().save(path)  # has no data
    with pytest.raises(PlanError, match="is in the way"):
        made.save(path)
    data.unlink()
    made.save(path)
    data.write_bytes(b"replaced since")
    with pytest.raises(PlanError, match="is in the way"):
        made.save(path)
    assert data.read_bytes() == b"replaced since"
    data.unlink()
    data.symlink_to(tmp_path / "nowhere")
    with pytest.raises(PlanError, match="is in the way"):
        made.save(path)


def test_data_that_a_copy_of_the_plan_reads_is_left_alone(tmp_path: Path) -> None:
    path, made = tmp_path / "a.yaml", plan(FITTED_ROWS, fitted=fit())
    made.save(path)
    (tmp_path / "b.yaml").write_text(path.read_text())
    with pytest.raises(PlanError, match=r"and b\.yaml reads it too"):
        made.save(path)
    Plan.load(tmp_path / "b.yaml").save(tmp_path / "b.yaml")  # its own from now on
    made.save(path)
    assert Plan.load(tmp_path / "b.yaml") == made


@pytest.mark.parametrize("content", [b"attnplan: yes\n", b"{}", b"\x00\xff", b"- 1\n"])
def test_only_a_plan_is_replaced_by_a_plan(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"a\.yaml is there and is not a plan"):
        plan().save(path)
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(b"")  # as mktemp leaves it
    check_plan(path)
    plan().save(path)


def test_a_plan_goes_into_no_device_and_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "no regular file"), ("", "a folder")):
        with pytest.raises(PlanError, match=message):
            plan().save(tmp_path / name)


def test_a_league_table_is_replaced_by_another(tmp_path: Path) -> None:
    for name in ("a.md", "a.html"):
        league_page.write(tmp_path / name, [], "tiny", "attnplan compare tiny")
        league_page.write(tmp_path / name, [], "tiny again", "attnplan compare tiny")
        assert "tiny again" in (tmp_path / name).read_text()
