"""Captured tensors of runs side by side, of runs that were killed, and of runs that go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tests import tiny_model

from attnplan.models.load import load_model
from attnplan.profiles.capture.capture import LayerCapture, SequenceCapture
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.profiling.profiling import Workload, captures, repeated_string

NAME = "0123456789abcdef"
"""As the folder of a run is called."""


def captured(value: float = 0.0) -> SequenceCapture:
    tensor = torch.full((2, 5, 4), value)
    layer = LayerCapture(0, "layer", tensor, tensor, tensor, torch.empty(0), 0.5, tensor)
    return SequenceCapture(torch.arange(5), None, (layer,))


def first(files: CaptureFiles, text: int = 0) -> float:
    """The first number of what was kept."""
    return float(next(files.layers(text)).query.flatten()[0])


def test_runs_side_by_side_do_not_see_each_other(tmp_path: Path) -> None:
    mine, other, third = (CaptureFiles(tmp_path / NAME) for _ in range(3))
    mine.save(0, captured(1))
    assert not other.has(0)
    other.save(0, captured(2))
    assert (first(mine), first(other)) == (1, 2)
    reading = mine.layers(0)
    other.discard()  # once its candidates are scored
    assert mine.has(0) and next(reading).layer == 0
    third.discard()  # had nothing
    assert mine.has(0)
    mine.discard()
    assert not list(tmp_path.iterdir())


def test_threads_side_by_side_keep_their_own(tmp_path: Path) -> None:
    found: list[bool] = []

    def run(number: int) -> None:
        for _ in range(20):
            files = CaptureFiles(tmp_path / NAME)
            files.save(0, captured(number))
            found.append(first(files) == number)
            files.discard()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_what_it_left(tmp_path: Path) -> None:
    files = CaptureFiles(tmp_path / NAME)
    files.save(0, captured(3))
    files.release()
    again = CaptureFiles(tmp_path / NAME)
    assert again.has(0) and not again.has(1) and first(again) == 3
    del again  # a run that forgot to let go
    assert first(CaptureFiles(tmp_path / NAME)) == 3


HOLD = """
import sys, time
from pathlib import Path
from tests.test_capture_files import captured
from attnplan.profiles.capture.capture_files import CaptureFiles
files = CaptureFiles(Path(sys.argv[1]))
files.save(0, captured(7))
Path(files.folder, "1.99.partial").touch()
print("there", flush=True)
time.sleep(600)
"""


def test_what_a_killed_run_left_is_taken_up_or_removed(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    line = [sys.executable, "-c", HOLD, str(tmp_path / NAME)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        mine = CaptureFiles(tmp_path / NAME)
        assert not mine.has(0)  # it is another's as long as that one lives
        mine.save(0, captured(8))
        other = CaptureFiles(tmp_path / NAME[::-1])
        other.save(0, captured(9))
        assert {p.name for p in tmp_path.iterdir()} == {NAME, f"{NAME}-1", NAME[::-1]}
        process.send_signal(signal.SIGKILL)
    mine.release()
    same = CaptureFiles(tmp_path / NAME)
    assert same.has(0) and first(same) == 7
    assert {p.name for p in tmp_path.iterdir()} == {NAME, NAME[::-1]}
    assert [path.name for path in same.folder.iterdir()] == ["0.safetensors"]
    same.release()
    (tmp_path / NAME / "notes.txt").write_text("not ours")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/0.safetensors").touch()
    other.release()
    another = CaptureFiles(tmp_path / ("f" * 16))
    another.save(0, captured())
    assert not (tmp_path / NAME[::-1]).exists()
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["notes.txt"]
    assert (tmp_path / "photos/0.safetensors").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("side by side") / "tiny"
    tiny_model.save(folder)
    return folder


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_captures_stay_where_a_run_is_interrupted(
    model: Path, tmp_path: Path, error: type[BaseException] | None
) -> None:
    from attnplan.profiles.text.calibration import TokenSet, load_sequences

    loaded = load_model(str(model))
    tokens: TokenSet = load_sequences(
        loaded.tokenizer, "builtin", context=64, sequences=1, split="calibration"
    )
    assert len(repeated_string(64, 256, 0)) == 64
    work, folder = Workload(tokens, 0), tmp_path / ".attnplan"
    try:
        with captures(loaded, work, folder) as files:
            files.save(0, captured(5))
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert folder.exists() == (error is KeyboardInterrupt)
    with captures(loaded, work, folder) as files:
        assert files.has(0) == (error is KeyboardInterrupt)
    with captures(loaded, work, folder, keep=True) as files:
        files.save(0, captured(6))
    assert folder.exists()


def test_two_searches_in_one_folder(model: Path) -> None:
    folder = model.parent
    line = (
        "-m attnplan search tiny --context 128 --sequences 1 --trials 0 --swaps 0 --repeats 1 "
        "--methods window --max-density 0.9 --db sqlite:///{0}.db --out {0}.yaml"
    )
    (folder / ".attnplan" / NAME).mkdir(parents=True)
    (folder / ".attnplan" / NAME / "0.safetensors").touch()  # of a killed run
    searches = [
        subprocess.Popen(
            [sys.executable, *line.format(name).split()],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for search in searches:
        _, err = search.communicate(timeout=500)
        # 1: no plan is faster than dense here
        assert search.returncode == 0 or "no plan within the budget" in err, err
    assert not (folder / ".attnplan").exists()
