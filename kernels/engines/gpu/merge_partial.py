"""Adding what is computed apart to the output of a launch, on a GPU.

One pass over the rows, in place; see `part.Part.merge`, which says the same in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu.launcher import Launcher, are_aligned
from attnplan.kernels.engines.gpu.top_blocks import integers
from attnplan.kernels.operands.partial_softmax import Part


def merge(part: Part, output: Tensor, log_mass: Tensor) -> None:
    """`Part.merge`, changing both tensors.

    Args:
        part: of some heads, float32.
        output: [batch, heads, rows, value_dim], of all heads of the call.
        log_mass: float32 [batch, heads, rows], contiguous.

    Raises:
        ValueError: a tensor is laid out as the kernel does not read it.
    """
    if part.numerator.dtype != torch.float32 or log_mass.dtype != torch.float32:
        raise ValueError(
            f"parts and log-mass must be float32, got {part.numerator.dtype} and {log_mass.dtype}"
        )
    if output.stride(3) != 1 or not log_mass.is_contiguous():
        raise ValueError("output and log-mass must have whole rows")
    batch, heads, rows, value_dim = output.shape
    if output.numel() == 0:
        return
    tensors = [t.contiguous() for t in (part.numerator, part.mass, part.shift)]
    made, options = merge_constants(value_dim)
    names = integers(part.head, output.device)
    strides = output.stride()[:3]
    tensors += [names, output, log_mass]
    key = (value_dim, output.dtype, output.device) if are_aligned(tensors, strides) else None
    with torch.cuda.device_of(output):
        _start(
            (-(-rows // made["ROWS"]), len(part.head), batch),
            (*tensors, *strides, heads, rows, part.numerator.shape[2]),
            made,
            options,
            key,
        )


def merge_constants(value_dim: int) -> tuple[dict[str, int], dict[str, int | bool]]:
    """What the kernel is compiled for beside dtypes, and its options."""
    block = max(16, triton.next_power_of_2(value_dim))
    made = {"VALUE_DIM": value_dim, "BLOCK_V": block, "ROWS": max(4, 4096 // block)}
    return made, {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=("heads", "length", "part_length"))
def _merge_part(
    numerators, masses, shifts, names, output, log_mass, output_batch, output_head, output_row,
    heads, length, part_length,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.load(names + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    is_row = r < length
    cell = is_row[:, None] & (e < VALUE_DIM)[None, :]
    at = (batch * tl.num_programs(1) + tl.program_id(1)) * part_length + r
    near_at = (batch * heads + head) * length + r
    place = output + batch * output_batch + head * output_head
    place += r.to(tl.int64)[:, None] * output_row + e[None, :]

    mass = tl.load(masses + at, mask=is_row, other=0.0)
    shift = tl.load(shifts + at, mask=is_row, other=0.0)
    far = tl.load(numerators + at[:, None] * VALUE_DIM + e[None, :], mask=cell, other=0.0)
    near = tl.load(place, mask=cell, other=0.0).to(tl.float32)
    near_mass = tl.load(log_mass + near_at, mask=is_row, other=0.0)

    usable = (mass > 0) & (mass < float("inf")) & (tl.abs(shift) < float("inf"))
    usable &= tl.sum((tl.abs(far) < float("inf")).to(tl.int32), 1) == BLOCK_V
    shift = tl.where(usable, shift, 0.0)
    near_mass = tl.where(usable, near_mass, 0.0)
    far_mass = tl.log(tl.where(usable, mass, 1.0)) + shift
    top = tl.maximum(near_mass, far_mass)
    total = top + tl.log(tl.exp(near_mass - top) + tl.exp(far_mass - top))
    far = tl.where(usable[:, None], far, 0.0) * tl.exp(shift - total)[:, None]
    merged = near * tl.exp(near_mass - total)[:, None] + far
    tl.store(place, merged.to(output.dtype.element_ty), mask=cell & usable[:, None])
    tl.store(log_mass + near_at, total, mask=is_row & usable)


_start = Launcher(_merge_part)
