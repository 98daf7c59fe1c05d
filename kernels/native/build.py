"""Compiles the C++ sources of this folder on first use, and loads them.

The library is kept in the user's cache folder under a digest of everything that determines it:
sources, compiler, flags and the processor's instruction sets. torch is imported before the library
is loaded, so that both share torch's OpenMP runtime and its threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  (loads libgomp before our library asks for it)

SOURCES = (
    *("attention.cpp", "decode.cpp", "token_selection.cpp", "tile_join.cpp"),
    "features.cpp",
)
HEADERS = ("vectors.h",)
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),  # inf and NaN keep meaning
)
TARGETS = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-fopenmp",),
    ("-march=native",),
    (),
)


@dataclass(frozen=True)
class Build:
    """The outcome of compiling.

    Attributes:
        library: the loaded functions, or None.
        description: which compiler and flags made it, or why there is none; one line.
    """

    library: ctypes.CDLL | None
    description: str


@functools.cache
def load() -> Build:
    """The compiled functions; compiles (a few seconds) if this machine has not done so before."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return Build(None, f"no C++ compiler on PATH (looked for {', '.join(COMPILERS)})")
    return compile_with(compiler, cache_folder())


def compile_with(compiler: str, folder: Path) -> Build:
    """Compiles with the best flags that `compiler` takes, into `folder` or from there."""
    version = _first_line([compiler, "--version"])
    here = Path(__file__).parent
    sources = [here / name for name in SOURCES]
    read = [*sources, *(here / name for name in HEADERS)]
    fixed = [version, _instruction_sets(), *(s.read_text(encoding="utf-8") for s in read)]
    error = ""
    for target in TARGETS:
        flags = [*FLAGS, *target]
        digest = hashlib.sha256("\0".join([*fixed, *flags]).encode()).hexdigest()[:24]
        path = folder / f"attention-{digest}.so"
        if not path.exists():
            error = _compile([compiler, *flags, *map(str, sources)], path)
            if error:
                continue
        try:
            library = ctypes.CDLL(str(path))
        except OSError as reason:  # a file that another program broke
            return Build(None, f"cannot load {path}: {reason}")
        return Build(library, f"{version}, {' '.join(target) or 'baseline instructions'}")
    return Build(None, f"{compiler} failed: {error}")


def cache_folder() -> Path:
    """Where compiled libraries are kept: the user's cache, or a private folder of this process."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "attnplan" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass  # a home that cannot be written to: compile once per process
    return Path(tempfile.mkdtemp(prefix="attnplan-"))


def _compile(command: list[str], path: Path) -> str:
    """Runs the compiler; the library appears at `path` whole or not at all. Returns the error."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        os.replace(output, path)
    return ""


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or [command[0]])[0]


def _instruction_sets() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join([platform.machine(), platform.processor(), *found])
