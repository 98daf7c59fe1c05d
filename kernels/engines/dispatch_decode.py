"""Who executes attention over stored rows: the engine of the device that the tensors are on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnplan.kernels.operands.kv_rows import StoredRows

if TYPE_CHECKING:
    from attnplan.kernels.engines.cpu.decode import OneToken


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over stored rows; see `engines.reference.decode.decode`.

    Raises:
        ValueError: no engine for this device, or it cannot read these rows.
    """
    return _engine(query.device)(query, stored, scale=scale)


def one_token(
    query: Tensor, key: Tensor, value: Tensor, stored: Sequence[StoredRows], *, scale: float
) -> OneToken | None:
    """Calls of single tokens over the same rows, as cheap for the host as they can be.

    Args:
        query, key, value: of a first call, see `OneToken`.
        stored: every kv head of the layer once, with room for what is to come; `length` rows are in
            use, of which the last may be overwritten.
        scale: factor before the softmax.

    Returns:
        None where the device has no such calls, or where these rows need `decode`.
    """
    if query.device.type != "cpu":
        return None
    from attnplan.kernels.engines.cpu.decode import OneToken

    return OneToken.of(query, key, value, stored, scale)


def _engine(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    if device.type == "cuda":
        from attnplan.kernels.engines.gpu import decode as gpu_decode

        return gpu_decode.decode
    if device.type == "cpu":
        from attnplan.kernels.engines.cpu import decode as cpu_decode

        return cpu_decode.decode
    raise ValueError(f"no attention engine for device {device.type!r}; use cuda or cpu")
