"""Compile the Triton kernels of feature maps and indices for a GPU that is not there; see `aot`.

    python tests/aot_index.py 90:bf16:64:chunks:128 80:fp32:64:nearest:16

names architecture, dtype, head_dim, kernel (of a map with squares `squares`, `chunks`,
`prefix` and `read`; `nearest`, `hash`; `merge`; `centroid_t`, `multipole`; `means`, `choose`) and
how many features, centres, columns of a round, keys of a chunk, rows or key blocks it has.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import aot

from attnplan.kernels.engines import (
    cluster_triton,
    index_triton,
    linear_triton,
    part_triton,
    select_triton,
)
from attnplan.kernels.far.centroid_t import CentroidT
from attnplan.kernels.far.multipole import Multipole

CHUNK = 256
FAR = {cls.name: cls for cls in (CentroidT, Multipole)}
NUMBERS = {
    "length",
    "keys",
    "chunks",
    "first",
    "queries",
    "blocks",
    "heads",
    "count",
    "clusters",
    "columns",
    "part_length",
    "offset",
}
INTEGERS = {"start": "*i32", "x_head": "*i32", "kv_head": "*i32", "sinks": "*i32", "out": "*i64"}
INTEGERS |= {"names": "*i32"}
OWN = {
    "means": {"head": "*i32", "out": "*fp32"},
    "choose": {"scores": "*fp32", "out": "*i32"} | dict.fromkeys(("place", "top", "local"), "*i32"),
}
"""Of kernels whose names for tensors mean other types."""
INTEGERS |= {"block": "*i64", "floor": "*i64"}
FLOATS = {"terms", "affine", "mean", "means", "log_mass", "state_log_mass"}
FLOATS |= {"metric", "log_weight", "weight", "made_key", "made_value"}
FLOATS |= {"numerators", "masses", "shifts"}


def kernel_of(dtype: str, head_dim: int, name: str, count: int) -> tuple[Any, Any, Any]:
    """The kernel, its constants, and its options."""
    number = aot.DTYPES[dtype]
    if name == "nearest":
        made = index_triton.nearest_constants(head_dim, count, number)
        return index_triton._nearest_centres, *made
    if name in FAR:
        far = FAR[name]
        how = cluster_triton.Clustering(count, 16, far.steps, far.uniform, far.by_root)
        has = far.mean_name is not None, far.metric_name is not None
        return cluster_triton._cluster, *cluster_triton.constants(how, has, head_dim, head_dim)
    if name == "means":
        return select_triton._block_means, *select_triton.means_constants(head_dim, count or None)
    if name == "choose":
        return select_triton._choose_blocks, *select_triton.choose_constants(count, True)
    if name == "merge":
        return part_triton._merge_part, *part_triton.merge_constants(head_dim)
    if name == "hash":
        made = index_triton.hash_constants(head_dim, count, number)
        return index_triton._hash_codes, *made
    kind = linear_triton._Kind(head_dim, head_dim, count, True, CHUNK, number)
    if name == "prefix":
        return linear_triton._prefix_sums, *linear_triton.prefix_constants(kind)
    if name == "squares":
        return linear_triton._squares, *linear_triton.squares_constants(kind)
    if name == "chunks":
        return linear_triton._chunk_sums, *linear_triton.states_constants(kind)
    return linear_triton._read, *linear_triton.read_constants(kind)


def report(arch: int, dtype: str, head_dim: int, name: str, count: int) -> dict[str, int]:
    """What the compiler made of one configuration, whose tensors and strides are aligned."""
    function, constants, options = kernel_of(dtype, head_dim, name, count)
    signature, attributes = {}, {}
    for position, argument in enumerate(function.arg_names):
        is_stride = re.fullmatch(r"(query|key|value|output)_(batch|head|row)|\w+_stride", argument)
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in OWN.get(name, {}):
            signature[argument] = OWN[name][argument]
        elif argument in NUMBERS or is_stride:
            signature[argument] = "i32"
        elif argument == "scale":
            signature[argument] = "fp32"
        elif argument in FLOATS:
            signature[argument] = "*fp32"
        else:
            signature[argument] = INTEGERS.get(argument, f"*{dtype}")
        if signature[argument].startswith("*") or is_stride:
            attributes[(position,)] = [["tt.divisibility", 16]]
    made = ASTSource(function, signature, constants, attributes)
    kernel = compile(made, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.kernel)
        file.flush()
        usage = aot._output_of(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        assembly = aot._output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = {key: len(re.findall(p, assembly)) for key, p in aot.INSTRUCTIONS.items()}
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "vector_copies": len(re.findall(r"cp\.async\S* .*, 0x10", kernel.asm["ptx"])),
        "wide_loads": len(re.findall(r"\bLDG\S*\.128\b", assembly)),
        **found,
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        arch, dtype, head_dim, name, count = argument.split(":")
        made = report(int(arch), dtype, int(head_dim), name, int(count))
        print(json.dumps(made), flush=True)
