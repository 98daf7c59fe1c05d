"""Who executes a tile list: the engine of the device that the tensors are on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import TileList


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    kv_head: tuple[int, ...],
    tiles: TileList,
    slots: Slots | None = None,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Near + far attention on the device of `query`; see `engines.reference.prefill.attend`.

    Args:
        part: what keys that are not in `tiles` contribute besides, if anything.

    Raises:
        ValueError: no engine for this device.
    """
    output, log_mass = _engine(query.device)(
        query, key, value, scale=scale, kv_head=kv_head, tiles=tiles, slots=slots
    )
    return (output, log_mass) if part is None else part.merge(output, log_mass)


def _engine(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    if device.type == "cuda":
        from attnplan.kernels.engines.gpu import prefill as gpu_prefill

        return gpu_prefill.attend
    if device.type == "cpu":
        from attnplan.kernels.engines.cpu import prefill as cpu_prefill

        return cpu_prefill.attend
    raise ValueError(f"no attention engine for device {device.type!r}; use cuda or cpu")
