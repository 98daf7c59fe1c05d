"""Who executes a tile list: the engine of the device that the tensors are on."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

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


@cache
def engine_digest(device: str) -> str:
    """Digest of the sources that an engine's timings depend on, 16 hexadecimal digits.

    Args:
        device: 'cpu' or 'cuda'.
    """
    folder = Path(__file__).parent
    names = {"cpu": ("cpu.py", "build.py"), "cuda": ("triton.py",)}[device]
    files = [folder / "engines" / name for name in names]
    files += sorted((folder / "engines").glob("*.cpp")) if device == "cpu" else []
    for part in (".", "near", "far"):
        files += sorted((folder / part).glob("*.py"))
    content = b"\0".join(path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()[:16]
