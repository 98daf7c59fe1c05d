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

from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.compressors.multipole import Multipole
from attnplan.kernels.engines.gpu import cluster as gpu_cluster
from attnplan.kernels.engines.gpu import feature_sums, merge_partial, top_blocks
from attnplan.kernels.engines.gpu import nearest as gpu_nearest

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
        made = gpu_nearest.nearest_constants(head_dim, count, number)
        return gpu_nearest._nearest_centres, *made
    if name in FAR:
        far = FAR[name]
        how = gpu_cluster.Clustering(count, 16, far.steps, far.uniform, far.by_root)
        has = far.mean_name is not None, far.metric_name is not None
        return gpu_cluster._cluster, *gpu_cluster.constants(how, has, head_dim, head_dim)
    if name == "means":
        return top_blocks._block_means, *top_blocks.means_constants(head_dim, count or None)
    if name == "choose":
        return top_blocks._choose_blocks, *top_blocks.choose_constants(count, True)
    if name == "merge":
        return merge_partial._merge_part, *merge_partial.merge_constants(head_dim)
    if name == "hash":
        made = gpu_nearest.hash_constants(head_dim, count, number)
        return gpu_nearest._hash_codes, *made
    kind = feature_sums._Kind(head_dim, head_dim, count, True, CHUNK, number)
    if name == "prefix":
        return feature_sums._prefix_sums, *feature_sums.prefix_constants(kind)
    if name == "squares":
        return feature_sums._squares, *feature_sums.squares_constants(kind)
    if name == "chunks":
        return feature_sums._chunk_sums, *feature_sums.states_constants(kind)
    return feature_sums._read, *feature_sums.read_constants(kind)


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
