"""The Triton engine compiles for GPUs that are not here, into the code it was written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 166912, 90: 232448}  # most of one program: CUDA C++ guide, table 24
REGISTERS = 65536  # of a multiprocessor, both
CONFIGURATIONS = [
    (arch, dtype, head_dim, kind)
    for arch in SHARED_BYTES
    for dtype, head_dim, kind in (
        ("bf16", 64, "near"),
        ("bf16", 64, "slots"),
        ("bf16", 128, "near"),
        ("bf16", 128, "slots"),
    )
] + [(90, "fp16", 64, "slots"), (80, "fp16", 128, "near")]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, int, str], dict]:
    """What `aot.py` says of every configuration: two processes, one per architecture."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = str(Path(__file__).with_name("aot.py"))
    running = {}
    for arch in SHARED_BYTES:
        wanted = [":".join(map(str, c)) for c in CONFIGURATIONS if c[0] == arch]
        running[arch] = subprocess.Popen(
            [sys.executable, script, *wanted], env=environment, stdout=subprocess.PIPE, text=True
        )
    found = {}
    for arch, process in running.items():
        lines = process.communicate()[0].splitlines()
        assert process.returncode == 0
        configurations = [c for c in CONFIGURATIONS if c[0] == arch]
        found.update(zip(configurations, map(json.loads, lines), strict=True))
    return found


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_compiled_code_keeps_to_the_hardware(
    reports: dict[tuple[int, str, int, str], dict], configuration: tuple[int, str, int, str]
) -> None:
    arch = configuration[0]
    report = reports[configuration]
    assert report["spills"] == 0
    assert report["shared_bytes"] <= SHARED_BYTES[arch]
    assert report["vector_copies"] > 0, "keys and values must be copied 16 bytes at a time"
    assert report["hgmma" if arch >= 90 else "hmma"] > 0
    programs = REGISTERS // (report["registers"] * 32 * report["warps"])
    assert programs >= 2, "a second program hides the latency of the first"
