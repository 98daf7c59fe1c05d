"""Compile small attention kernels, with and without a planted fault; see `test_compile_gates`.

    python tests/compile_faults.py sound:90 spills:90 engine-64:90

prints, for each, a JSON list of what `sass.violations` finds. It runs in a process of its own:
`TRITON_INTERPRET` must not be set when a kernel is defined.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import aot, sass

POINTERS = ("query", "key", "value", "output")
STRIDES = ("key_row", "value_row")


@triton.jit
def attend(
    query, key, value, output, key_row, value_row, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r, c, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DIM)
    query += tl.program_id(0) * ROWS * DIM
    q = tl.load(query + r[:, None] * DIM + d[None, :])
    mass = tl.zeros([ROWS], tl.float32)
    numerator = tl.zeros([ROWS, DIM], tl.float32)
    for tile in tl.range(0, tiles):
        j = tile * COLUMNS + c
        k = tl.load(key + j[:, None] * key_row + d[None, :])
        weights = tl.math.exp2(tl.dot(q, k.T, input_precision=PRECISION))
        mass += tl.sum(weights, 1)
        v = tl.load(value + j[:, None] * value_row + d[None, :])
        numerator = tl.dot(weights.to(v.dtype), v, numerator, input_precision=PRECISION)
    output += tl.program_id(0) * ROWS * DIM
    result = numerator / mass[:, None]
    tl.store(output + r[:, None] * DIM + d[None, :], result.to(output.dtype.element_ty))


SOUND: dict[str, Any] = {
    "dtype": "bf16", "columns": 64, "dim": 64, "precision": "ieee", "aligned": POINTERS + STRIDES,
    "options": {"num_warps": 4, "num_stages": 3},
}  # fmt: skip
FAULTS: dict[str, dict[str, Any]] = {
    "sound": {},
    "spills": {"options": {"num_warps": 4, "num_stages": 3, "maxnreg": 32}},
    # below 62 registers HGMMA does not compile at all
    "spills beside hgmma": {"options": {"num_warps": 4, "num_stages": 3, "maxnreg": 64}},
    "shared": {"columns": 256, "dim": 128, "options": {"num_warps": 8, "num_stages": 4}},
    "scalar": {"aligned": POINTERS},
    "scalar cores": {"dtype": "fp32", "options": {"num_warps": 8, "num_stages": 2}},
    "other tiles": {"columns": 128},
}


def planted(fault: str, arch: int) -> list[str]:
    """What is found wrong with one of the kernels."""
    made = SOUND | FAULTS[fault]
    constants = {
        "ROWS": 64,
        "COLUMNS": made["columns"],
        "DIM": made["dim"],
        "PRECISION": made["precision"],
    }
    names = attend.arg_names
    signature = {name: "i32" for name in names}
    signature |= {name: f"*{made['dtype']}" for name in POINTERS}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in made["aligned"]}
    source = ASTSource(attend, signature, constants, attributes)
    flops = 4 * 64 * 64 * 64 if fault in ("sound", "other tiles") else None
    return sass.violations(_compiled(source, arch, made["options"]), loop_flops=flops)


def engine(head_dim: int, arch: int) -> list[str]:
    """What is found wrong with the engine's own kernel."""
    copies = arch >= 90
    options = aot.engine.launch_options(
        head_dim,
        aot.DTYPES["bf16"],
        gather=False,
        slots=False,
        copies=copies,
        generation=arch // 10,
    )
    code = _compiled(aot.source(arch, "bf16", head_dim, "near", 4096), arch, options)
    programs = {64: 5, 128: 2}[head_dim] if arch == 90 else 1
    # under the limit that five programs take, some numbers are kept outside registers
    spills = 16 if (arch, head_dim) == (90, 64) else 0
    return sass.violations(
        code, loop_flops=4 * 64 * 64 * head_dim, programs=programs, spills=spills
    )


def _compiled(source: ASTSource, arch: int, options: dict[str, Any]) -> sass.Code:
    kernel = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    made = kernel.metadata
    return sass.read(kernel.kernel, arch=arch, shared_bytes=made.shared, warps=made.num_warps)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, arch = argument.split(":")
        if name.startswith("engine-"):
            found = engine(int(name.removeprefix("engine-")), int(arch))
        else:
            found = planted(name, int(arch))
        print(json.dumps(found), flush=True)
