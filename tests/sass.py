"""What the machine code of a kernel uses and must not: read from a cubin, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from triton import knobs

SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}
"""That one program may have: CUDA C++ programming guide, table of compute capabilities."""
MULTIPROCESSOR_SHARED = {80: 167936, 90: 233472, 100: 233472}
RESERVED = 1024  # shared bytes that the system keeps per program
REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 256  # a warp gets a multiple of so many
WARPS = 64  # of a multiprocessor
MATRIX = {80: "hmma", 90: "hgmma", 100: "utcmma"}
"""The instructions that the tensor cores of an architecture are made for."""
SPILL = r"\b(?:LDL|STL)\b"


@dataclass(frozen=True)
class Loop:
    """An innermost loop that multiplies matrices by HGMMA instructions.

    Attributes:
        flops: of a program, by those instructions, in one turn.
        spills: loads from and stores to memory of a thread's own.
    """

    flops: int
    spills: int


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        arch: 80, 90 or 100.
        registers: of a thread.
        warps: of a program.
        shared_bytes: of a program.
        spills: loads from and stores to memory of a thread's own.
        hgmma, hmma, utcmma: matrix instructions, by kind.
        loops: innermost ones with HGMMA instructions, in order.
        wide_copies: asynchronous copies of 16 bytes by a thread.
        tile_copies: copies of whole tiles.
    """

    arch: int
    registers: int
    warps: int
    shared_bytes: int
    spills: int
    hgmma: int
    hmma: int
    utcmma: int
    loops: tuple[Loop, ...]
    wide_copies: int
    tile_copies: int

    @property
    def programs(self) -> int:
        """How many a multiprocessor holds; 0 if not one."""
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // per_warp // self.warps
        by_shared = MULTIPROCESSOR_SHARED[self.arch] // (self.shared_bytes + RESERVED)
        return min(by_registers, by_shared, WARPS // self.warps)


def read(cubin: bytes, *, arch: int, shared_bytes: int, warps: int) -> Code:
    """A compiled kernel; what its cubin does not say is given."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        assembly = _output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return parse(assembly, arch=arch, registers=registers, shared_bytes=shared_bytes, warps=warps)


def parse(assembly: str, *, arch: int, registers: int, shared_bytes: int, warps: int) -> Code:
    """`read`, from what nvdisasm prints."""

    def count(pattern: str) -> int:
        return len(re.findall(pattern, assembly))

    return Code(
        arch=arch,
        registers=registers,
        warps=warps,
        shared_bytes=shared_bytes,
        spills=count(SPILL),
        hgmma=count(r"\bHGMMA\b"),
        hmma=count(r"\bHMMA\b"),
        utcmma=count(r"\bUTC\w*MMA\b"),
        loops=_loops(assembly.splitlines(), max(warps // 4, 1)),
        wide_copies=count(r"\bLDGSTS[\w.]*\.128\b"),
        tile_copies=count(r"\bUTMALDG\b"),
    )


def violations(
    code: Code,
    *,
    loop_flops: int | None = None,
    programs: int = 1,
    matrix: bool = True,
    spills: int = 0,
) -> list[str]:
    """What is wrong with a kernel, in words; nothing if it is as it should be.

    Args:
        code: the kernel.
        loop_flops: what every innermost loop with HGMMA instructions must compute.
        programs: a multiprocessor must hold at least so many.
        matrix: the kernel multiplies matrices, which tensor cores must do.
        spills: loads and stores of spilled registers that are tolerated, but never in the first
            loop.
    """
    found = []
    if code.spills > spills:
        found.append(f"{code.spills} loads and stores of spilled registers")
    elif code.loops and code.loops[0].spills:
        found.append("the first loop spills registers")
    limit = SHARED_BYTES[code.arch]
    if code.shared_bytes > limit:
        found.append(f"{code.shared_bytes} bytes of shared memory, a program may have {limit}")
    elif code.programs < programs:
        found.append(f"a multiprocessor holds {code.programs} programs, wanted {programs}")
    kind = MATRIX[code.arch]
    if matrix and not getattr(code, kind):
        found.append(f"no {kind.upper()} instruction: tensor cores do not do the work")
    if not code.wide_copies and not code.tile_copies:
        found.append("no copy of 16 bytes or of a tile: loads are too small")
    wrong = [loop.flops for loop in code.loops if loop.flops != loop_flops]
    if loop_flops is not None and code.arch == 90 and (wrong or not code.loops):
        found.append(f"loops compute {wrong or 'nothing'} by HGMMA, wanted {loop_flops}")
    return found


def _loops(lines: Sequence[str], warp_groups: int) -> tuple[Loop, ...]:
    """Innermost loops with HGMMA instructions: no other jump back lies within."""
    label = {
        match[1]: number
        for number, line in enumerate(lines)
        if (match := re.match(r"(\.L\w+):", line.strip()))
    }
    loops = set()
    for number, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if match and label.get(match[1], number) < number:
            loops.add((label[match[1]], number))
    innermost = [
        (begin, end)
        for begin, end in sorted(loops)
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    found = []
    for begin, end in innermost:
        body = "\n".join(lines[begin:end])
        shapes = re.findall(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", body)
        if shapes:
            each = sum(2 * int(m) * int(n) * int(k) for m, n, k in shapes)
            found.append(Loop(each * warp_groups, len(re.findall(SPILL, body))))
    return tuple(found)


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
