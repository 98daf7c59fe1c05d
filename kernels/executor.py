"""Who executes a tile list: the engine of the device that the tensors are on."""

from __future__ import annotations

from torch import Tensor

from attnplan.kernels.approximation import Slots
from attnplan.kernels.tile_list import TileList


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    kv_head: tuple[int, ...],
    tiles: TileList,
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """Near + far attention on the device of `query`; see `engines.reference.attend`.

    Raises:
        ValueError: no engine for this device.
    """
    if query.device.type == "cuda":
        from attnplan.kernels.engines import triton

        return triton.attend(
            query, key, value, scale=scale, kv_head=kv_head, tiles=tiles, slots=slots
        )
    if query.device.type == "cpu":
        from attnplan.kernels.engines import cpu

        return cpu.attend(query, key, value, scale=scale, kv_head=kv_head, tiles=tiles, slots=slots)
    raise ValueError(f"no attention engine for device {query.device.type!r}; use cuda or cpu")
