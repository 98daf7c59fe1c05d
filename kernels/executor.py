"""Who executes a tile list: the engine of the device that the tensors are on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.part import Part
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
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Near + far attention on the device of `query`; see `engines.reference.attend`.

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
        from attnplan.kernels.engines import triton

        return triton.attend
    if device.type == "cpu":
        from attnplan.kernels.engines import cpu

        return cpu.attend
    raise ValueError(f"no attention engine for device {device.type!r}; use cuda or cpu")


_CUDA = (
    *("triton.py", "schedule.py", "launching.py", "part_triton.py"),
    *("select_triton.py", "index_triton.py", "linear_triton.py", "cluster_triton.py"),
)


@cache
def engine_digest(device: str) -> str:
    """Digest of the sources that an engine's timings depend on, 16 hexadecimal digits.

    Args:
        device: 'cpu' or 'cuda'.
    """
    folder = Path(__file__).parent
    names = {"cpu": ("cpu.py", "build.py"), "cuda": _CUDA}[device]
    files = [folder / "engines" / name for name in names]
    if device == "cpu":
        files += sorted(f for kind in ("*.cpp", "*.h") for f in (folder / "engines").glob(kind))
    for part in (".", "near", "far"):
        files += sorted((folder / part).glob("*.py"))
    return digest_of(f for f in files if not f.stem.startswith("decod"))


def digest_of(files: Iterable[Path]) -> str:
    """Digest of what is in some files, 16 hexadecimal digits."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]
