"""Who executes attention over stored rows: the engine of the device that the tensors are on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnplan.kernels.stored import StoredRows


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over stored rows; see `engines.decode_reference.decode`.

    Raises:
        ValueError: no engine for this device, or it cannot read these rows.
    """
    return _engine(query.device)(query, stored, scale=scale)


def _engine(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    if device.type == "cuda":
        from attnplan.kernels.engines import decode_triton

        return decode_triton.decode
    if device.type == "cpu":
        from attnplan.kernels.engines import decode_cpu

        return decode_cpu.decode
    raise ValueError(f"no attention engine for device {device.type!r}; use cuda or cpu")
