"""The Triton engine compiles for GPUs that are not here, into the code it was written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 166912, 90: 232448}  # that one program may have: CUDA C++ guide, table 24
REGISTERS = 65536  # of a multiprocessor, on both
BY_ARCHITECTURE = {
    80: [
        "80:bf16:64:near:4096",
        "80:bf16:64:slots:4096",
        "80:bf16:128:slots:4096",
        "80:fp16:128:near:4096",
    ],
    90: [
        "90:bf16:64:near:4096",
        "90:bf16:64:slots:4096",
        "90:bf16:128:slots:4096",
        "90:fp16:128:near:4096",
    ],
}
SMALL_TILES = {80: "80:fp32:64:slots:4096", 90: "90:bf16:128:near:1"}


DECODE = {
    80: ["80:bf16:64:pages:16", "80:bf16:128:bias+pages:16", "80:fp32:64:bias:16"],
    90: [
        "90:bf16:64:bias:16",
        "90:bf16:128:bias+pages:16",
        "90:fp16:64:plain:64",
        "90:fp32:64:bias:16",
    ],
}


def compiled(script: str, wanted: dict[int, list[str]], cache: Path) -> dict[str, dict[str, int]]:
    """What a script says of every configuration; one process per architecture."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    path = str(Path(__file__).with_name(script))
    processes = [
        subprocess.Popen(
            [sys.executable, path, *names], env=environment, stdout=subprocess.PIPE, text=True
        )
        for names in wanted.values()
    ]
    found = {}
    for process, names in zip(processes, wanted.values(), strict=True):
        lines = process.communicate()[0].splitlines()
        assert process.returncode == 0
        found |= dict(zip(names, map(json.loads, lines), strict=True))
    return found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    wanted = {arch: [*names, SMALL_TILES[arch]] for arch, names in BY_ARCHITECTURE.items()}
    return compiled("aot.py", wanted, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def decode_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return compiled("aot_decode.py", DECODE, tmp_path_factory.mktemp("triton-decode"))


@pytest.mark.parametrize("name", [*BY_ARCHITECTURE[80], *BY_ARCHITECTURE[90]])
def test_compiled_code_uses_the_hardware(reports: dict[str, dict[str, int]], name: str) -> None:
    arch, report = int(name.split(":")[0]), reports[name]
    assert report["spills"] == 0
    assert report["shared_bytes"] <= SHARED_BYTES[arch]
    assert report["vector_copies"] > 0, "keys and values are copied 16 bytes at a time"
    assert report["hgmma" if arch >= 90 else "hmma"] > 0
    programs = REGISTERS // (report["registers"] * 32 * report["warps"])
    assert programs >= 2, "a second program hides the latency of the first"


@pytest.mark.parametrize("name", SMALL_TILES.values())
def test_small_tiles_fit_registers(reports: dict[str, dict[str, int]], name: str) -> None:
    """float32, which tensor cores would round to tf32, and few queries."""
    assert reports[name]["spills"] == 0


@pytest.mark.parametrize("name", [*DECODE[80], *DECODE[90]])
def test_decoding_leaves_room_for_a_second_program(
    decode_reports: dict[str, dict[str, int]], name: str
) -> None:
    """It waits for memory: another program's copies must be under way meanwhile."""
    (arch, dtype, *_), report = name.split(":"), decode_reports[name]
    assert report["spills"] == 0
    assert 2 * report["shared_bytes"] <= SHARED_BYTES[int(arch)]
    assert REGISTERS // (report["registers"] * 32 * report["warps"]) >= 2
    if dtype != "fp32":
        assert report["vector_copies"] > 0, "keys and values are copied 16 bytes at a time"
