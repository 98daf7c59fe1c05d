"""The gates that compiled kernels must pass find the faults that they are there to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests import sass

PLANTED = {
    "spills:80": "loads and stores of spilled registers",
    "spills beside hgmma:90": "loads and stores of spilled registers",
    "shared:80": "bytes of shared memory, a program may have 166912",
    "shared:90": "bytes of shared memory, a program may have 232448",
    "shared:100": "bytes of shared memory, a program may have 232448",
    "scalar:80": "no copy of 16 bytes or of a tile",
    "scalar:90": "no copy of 16 bytes or of a tile",
    "scalar cores:80": "no HMMA instruction",
    "scalar cores:90": "no HGMMA instruction",
    "scalar cores:100": "no UTCMMA instruction",
    "other tiles:90": "loops compute [2097152] by HGMMA, wanted 1048576",
}
SOUND = ["sound:80", "sound:90", "sound:100"]
ENGINE = [f"engine-{dim}:{arch}" for arch in (80, 90, 100) for dim in (64, 128)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the gates say of every kernel; compiled by two processes."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton-gates"))
    path = str(Path(__file__).with_name("compile_faults.py"))
    names = [*PLANTED, *SOUND, *ENGINE]
    shares = [names[::2], names[1::2]]
    processes = [
        subprocess.Popen(
            [sys.executable, path, *share], env=environment, stdout=subprocess.PIPE, text=True
        )
        for share in shares
    ]
    answers = {}
    for process, share in zip(processes, shares, strict=True):
        lines = process.communicate()[0].splitlines()
        assert process.returncode == 0
        answers |= dict(zip(share, map(json.loads, lines), strict=True))
    return answers


@pytest.mark.parametrize(("name", "message"), PLANTED.items())
def test_a_planted_fault_is_found(found: dict[str, list[str]], name: str, message: str) -> None:
    assert any(message in violation for violation in found[name]), found[name]


@pytest.mark.parametrize("name", [*SOUND, *ENGINE])
def test_a_kernel_without_a_fault_passes(found: dict[str, list[str]], name: str) -> None:
    assert found[name] == []


LISTING = """
.L_x_0:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT, gsb0 ;
        LDL R1, [R2] ;
.L_x_1:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        UTMALDG.2D [UR8], [UR4] ;
   @P1 BRA `(.L_x_1) ;
   @P2 BRA `(.L_x_0) ;
        STL [R2], R1 ;
   @P3 BRA `(.L_x_2) ;
.L_x_2:
"""


def test_only_innermost_loops_are_counted() -> None:
    code = sass.parse(LISTING, arch=90, registers=168, shared_bytes=40000, warps=8)
    assert code.loops == (sass.Loop(2 * (2 * 64 * 128 * 16), 0),)
    assert (code.hgmma, code.spills, code.tile_copies) == (2, 2, 1)


def test_spills_may_be_tolerated_outside_the_first_loop() -> None:
    code = sass.parse(LISTING, arch=90, registers=168, shared_bytes=40000, warps=8)
    assert sass.violations(code) == ["2 loads and stores of spilled registers"]
    assert sass.violations(code, spills=2) == []
    inside = replace(code, loops=(sass.Loop(code.loops[0].flops, 1),))
    assert sass.violations(inside, spills=2) == ["the first loop spills registers"]


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "programs"), [(96, 42272, 5), (168, 90000, 2), (255, 1000, 2)]
)
def test_programs_of_a_multiprocessor(registers: int, shared_bytes: int, programs: int) -> None:
    code = sass.parse("", arch=90, registers=registers, shared_bytes=shared_bytes, warps=4)
    assert code.programs == programs
    told = sass.violations(code, programs=programs + 1, matrix=False)
    assert f"a multiprocessor holds {programs} programs, wanted {programs + 1}" in told
