"""Compile the Triton decode engine for a GPU that is not there; see `aot`.

    python tests/aot_decode.py 90:bf16:64:bias:16

names architecture, dtype, head_dim, with `bias`, `pages`, both (`bias+pages`) or neither (`plain`),
rows of a program.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import aot

from attnplan.kernels.engines.gpu import decode as engine


def source(dtype: str, head_dim: int, kind: str, rows: int) -> ASTSource:
    """The kernel that reads one run of several, as a launch specialises it."""
    constants = engine.constants(
        head_dim,
        head_dim,
        rows=rows,
        group=4,
        kv_heads=8,
        aligned=True,
        bias="bias" in kind,
        pages="pages" in kind,
        runs=True,
    )
    types = {"scale_log2": "fp32", "table": "*i64", "query": f"*{dtype}"}
    types |= {"output": "*fp32", "log_mass": "*fp32"}
    signature, attributes = {}, {}
    for position, name in enumerate(engine._attend.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name.startswith("query_"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(engine._attend, signature, constants, attributes)


def report(arch: int, dtype: str, head_dim: int, kind: str, rows: int) -> dict[str, int]:
    """What the compiler made of one configuration."""
    options = engine.launch_options(head_dim, aot.DTYPES[dtype], rows=rows)
    made = source(dtype, head_dim, kind, rows)
    kernel = compile(made, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.kernel)
        file.flush()
        usage = aot._output_of(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        assembly = aot._output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "vector_copies": len(re.findall(r"cp\.async\S* .*, 0x10", kernel.asm["ptx"])),
        "spills": len(re.findall(aot.INSTRUCTIONS["spills"], assembly)),
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        arch, dtype, head_dim, kind, rows = argument.split(":")
        made = report(int(arch), dtype, int(head_dim), kind, int(rows))
        print(json.dumps(made), flush=True)
