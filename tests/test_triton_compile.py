"""The Triton engine compiles for GPUs that are not here, into the code it was written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # of a program: CUDA C++ guide, table 24
REGISTERS = 65536  # of a multiprocessor, on all of them
PREFILL = {
    80: [
        "80:bf16:64:near:4096",
        "80:fp16:128:near:4096",
        "80:bf16:128:near+gather+slots:4096",
    ],
    90: [
        "90:bf16:64:near+chosen:4096",
        "90:bf16:64:near+gather+slots:4096",
        "90:bf16:64:near+gather+slots+members:4096",
        "90:fp16:128:near+chosen:4096",
        "90:bf16:128:near+gather+slots:4096",
        "90:bf16:256:near+chosen:4096",
    ],
    100: [
        "100:bf16:64:near+chosen:4096",
        "100:fp16:128:near+chosen:4096",
    ],
}
SMALL_TILES = {
    80: ["80:fp32:64:near+gather+slots:4096"],
    90: ["90:bf16:128:near:1", "90:fp32:128:near+gather+slots:4096"],
    100: [],
}
PROGRAMS = {  # that share a multiprocessor; what is not named: 2
    "90:bf16:64:near+chosen:4096": 5,
    "90:bf16:64:near+gather+slots:4096": 3,
    "90:bf16:256:near+chosen:4096": 1,
}
SPILLS = {"90:bf16:64:near+chosen:4096": 12}
"""Instructions outside the loops that triton 3.9 needs for five programs; 3.6 needs none."""
MATRIX = {80: "hmma", 90: "hgmma", 100: "utcmma"}
"""The tensor cores' instructions."""


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
    wanted = {arch: [*names, *SMALL_TILES[arch]] for arch, names in PREFILL.items()}
    return compiled("aot.py", wanted, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def decode_reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return compiled("aot_decode.py", DECODE, tmp_path_factory.mktemp("triton-decode"))


@pytest.mark.parametrize("name", [name for names in PREFILL.values() for name in names])
def test_compiled_code_uses_the_hardware(reports: dict[str, dict[str, int]], name: str) -> None:
    arch, report = int(name.split(":")[0]), reports[name]
    assert report["spills"] <= SPILLS.get(name, 0)
    assert report["shared_bytes"] <= SHARED_BYTES[arch]
    if arch >= 90:
        assert report["tile_copies"] > 0, "keys and values are copied by whole tiles"
    else:
        assert report["vector_copies"] > 0, "keys and values are copied 16 bytes at a time"
    assert report[MATRIX[arch]] > 0
    by_registers = REGISTERS // (-(-report["registers"] // 8) * 8 * 32 * report["warps"])
    by_memory = (SHARED_BYTES[arch] + 1024) // (report["shared_bytes"] + 1024)
    assert min(by_registers, by_memory) >= PROGRAMS.get(name, 2)


@pytest.mark.parametrize("name", [name for names in SMALL_TILES.values() for name in names])
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
