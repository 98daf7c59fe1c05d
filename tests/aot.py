"""Compile the Triton engine for a GPU that is not there, and print what the compiler made of it.

    python tests/aot.py 90:bf16:64:slots:4096 80:fp16:128:near:1

prints a JSON object per configuration: architecture, dtype, head_dim, kinds of tiles (near, and
chosen, gather or slots too, joined by +), queries. It runs in a process of its own:
`TRITON_INTERPRET` must not be set when a kernel is defined.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from attnplan.kernels.engines.gpu import prefill as engine

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INSTRUCTIONS = {
    "hgmma": r"\bHGMMA\b",
    "hmma": r"\bHMMA\b",
    "utcmma": r"\bUTC\w*MMA\b",
    "tile_copies": r"\bUTMALDG\b",
    "spills": r"\b(?:LDL|STL)\b",
}
INTEGERS = {"work", "index", "mask", "chosen", "gather", "masks", "slot_head", "slot_member"}
FLOATS = {"log_mass", "slot_log_weight", "slot_weight", "slot_share"}
NUMBERS = {"heads", "queries", "keys", "slot_heads", "slots"}


def source(arch: int, dtype: str, head_dim: int, kind: str, queries: int) -> ASTSource:
    """The kernel as a launch specialises it whose tensors and strides are multiples of 16."""
    rows = engine.rows_of_program(queries, DTYPES[dtype])
    constants = engine.constants(
        head_dim,
        head_dim,
        rows=rows,
        gather="gather" in kind,
        slots="slots" in kind,
        chosen="chosen" in kind,
        copies=arch >= 90 and dtype != "fp32",
        members="members" in kind,
    )
    signature, attributes = {}, {}
    for position, name in enumerate(engine._forward.arg_names):
        is_stride = re.fullmatch(r"(query|key|value)_(batch|head|row)", name)
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale_log2":
            signature[name] = "fp32"
        elif name in NUMBERS or is_stride:
            signature[name] = "i32"
        elif name in INTEGERS:
            signature[name] = "*i32"
        else:
            signature[name] = "*fp32" if name in FLOATS else f"*{dtype}"
        if signature[name].startswith("*") or is_stride:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(engine._forward, signature, constants, attributes)


def report(arch: int, dtype: str, head_dim: int, kind: str, queries: int) -> dict[str, int]:
    """What the compiler made of one configuration."""
    options = engine.launch_options(
        head_dim,
        DTYPES[dtype],
        gather="gather" in kind,
        slots="slots" in kind,
        copies=arch >= 90 and dtype != "fp32",
        generation=arch // 10,
        members="members" in kind,
    )
    target = GPUTarget("cuda", arch, 32)
    made = source(arch, dtype, head_dim, kind, queries)
    kernel = compile(made, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.kernel)
        file.flush()
        usage = _output_of(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        assembly = _output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = {name: len(re.findall(pattern, assembly)) for name, pattern in INSTRUCTIONS.items()}
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "vector_copies": len(re.findall(r"cp\.async\S* .*, 0x10", kernel.asm["ptx"])),
        **found,
    }


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        arch, dtype, head_dim, kind, queries = argument.split(":")
        print(json.dumps(report(int(arch), dtype, int(head_dim), kind, int(queries))), flush=True)
