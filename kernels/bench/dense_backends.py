"""The fastest dense causal attention of a GPU: what approximations are held against.

torch's fused backends compete, and the package flash_attn where it is installed. Which is fastest
depends on the device, the dtype and the sizes; it is found once for each of them.
"""

from __future__ import annotations

import importlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnplan.kernels.bench.gpu_clock import Call, GpuClock
from attnplan.kernels.operands.inputs import Inputs

FUSED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TRIES = 3
"""Timed calls of every backend."""
SLOW_MS = 50.0
"""A call that is timed once."""
OWN_CHOICE = "sdpa"
"""The name of torch's own choice among its backends."""

Attention = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class DenseBackend:
    """A way to compute dense causal attention, of as many queries as keys.

    Attributes:
        name: such as 'cudnn', or 'efficient, expanded' where every query head gets keys of its own.
        attention: inputs to [batch, heads, queries, value_dim].
    """

    name: str
    attention: Attention


def dense_attention(inputs: Inputs) -> Tensor:
    """torch's fused causal attention, with its own choice of backend."""
    return scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=True,
        scale=inputs.scale,
        enable_gqa=inputs.group > 1,
    )


def best_dense(inputs: Inputs, *, flex: bool = False) -> DenseBackend:
    """The fastest dense attention for calls like this one; on a CPU, torch's own choice.

    Args:
        inputs: a call of the shape, dtype and device in question.
        flex: let compiled FlexAttention compete too; compiling takes long.
    """
    query = inputs.query
    if query.device.type != "cuda":
        return DenseBackend(OWN_CHOICE, dense_attention)
    shapes = tuple(tensor.shape for tensor in (query, inputs.key, inputs.value))
    like = (shapes, query.dtype, query.device, flex)
    if like not in _BEST:
        _BEST[like] = _fastest(inputs, flex)
    return _BEST[like]


_BEST: dict[object, DenseBackend] = {}


def _fastest(inputs: Inputs, flex: bool) -> DenseBackend:
    clock = GpuClock(inputs.query.device)
    best, least = DenseBackend(OWN_CHOICE, dense_attention), math.inf
    for tries in _candidates(flex):
        for backend in tries:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch says why a backend cannot run
                    ms = _median_ms(clock, partial(backend.attention, inputs))
            except Exception:  # whatever keeps it from running here, memory included
                torch.cuda.empty_cache()
                continue
            if ms < least:
                best, least = backend, ms
            break
    return best


def _median_ms(clock: GpuClock, call: Call) -> float:
    """Of few calls with cold caches, and of one where it is slow, after one that warms up."""
    call()
    host_us = [clock.host_us(call, 1)]
    first = clock.cold([call], 1, host_us)[0]
    return statistics.median(first if first[0] > SLOW_MS else clock.cold([call], TRIES, host_us)[0])


def _candidates(flex: bool) -> Iterator[list[DenseBackend]]:
    """Backends to try, each with what to try where it cannot run."""
    for name, backend in FUSED.items():
        grouped = DenseBackend(name, partial(_fused, backend))
        yield [grouped, DenseBackend(f"{name}, expanded", partial(_expanded, backend))]
    for package in ("flash_attn_interface", "flash_attn"):
        yield [DenseBackend(package, partial(_flash_package, package))]
    if flex:
        yield [DenseBackend("flex", _flex(torch.compile(_flex_attention)))]


def _fused(backend: SDPBackend, inputs: Inputs) -> Tensor:
    with sdpa_kernel(backend):
        return dense_attention(inputs)


def _expanded(backend: SDPBackend, inputs: Inputs) -> Tensor:
    """With the keys and values of a group repeated for each of its query heads."""
    if inputs.group == 1:
        raise ValueError("nothing to expand: every query head has keys of its own")
    key, value = (t.repeat_interleave(inputs.group, 1) for t in (inputs.key, inputs.value))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(
            inputs.query, key, value, is_causal=True, scale=inputs.scale
        )


def _flash_package(package: str, inputs: Inputs) -> Tensor:
    attend = importlib.import_module(package).flash_attn_func
    query, key, value = (t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    found = attend(query, key, value, softmax_scale=inputs.scale, causal=True)
    output = found[0] if isinstance(found, tuple) else found  # some versions give the log-mass too
    return output.transpose(1, 2)


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    grouped = query.shape[1] != key.shape[1]
    attend: Callable[..., Tensor] = flex_attention
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)


def _flex(attend: Callable[..., Tensor]) -> Attention:
    """FlexAttention by `attend`; the mask of the last length is kept."""
    masks: dict[object, Any] = {}

    def attention(inputs: Inputs) -> Tensor:
        length, device = inputs.query.shape[2], inputs.query.device
        if (length, device) not in masks:
            masks.clear()
            masks[length, device] = causal_blocks(length, device)
        mask = masks[length, device]
        return attend(inputs.query, inputs.key, inputs.value, mask, inputs.scale)

    return attention


def causal_blocks(length: int, device: torch.device, block: int = 128) -> Any:
    """FlexAttention's mask of causal attention, made without a mask of all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    count = -(-length // block)
    row = torch.arange(count, dtype=torch.int32, device=device)
    on_diagonal = torch.zeros(1, 1, count, count, dtype=torch.int32, device=device)
    on_diagonal[0, 0, :, 0] = row
    return BlockMask.from_kv_blocks(
        torch.ones(1, 1, count, dtype=torch.int32, device=device),
        on_diagonal,
        row[None, None],
        row.expand(1, 1, count, count).contiguous(),
        BLOCK_SIZE=block,
        mask_mod=lambda batch, head, i, j: i >= j,
        seq_lengths=(length, length),
    )
