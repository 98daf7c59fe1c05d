"""Who executes attention over stored rows: the engine of the device that the tensors are on.

On a GPU that is torch alone, without copies of the keys for each query head; there is no kernel of
our own for it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnplan.kernels.engines import decode_cpu
from attnplan.kernels.stored import StoredRows


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over stored rows; see `engines.decode_reference.decode`.

    Raises:
        ValueError: no engine for this device.
    """
    return _engine(query.device)(query, stored, scale=scale)


def _engine(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    if device.type == "cuda":
        return decode_cpu.decode_torch
    if device.type == "cpu":
        return decode_cpu.decode
    raise ValueError(f"no attention engine for device {device.type!r}; use cuda or cpu")
