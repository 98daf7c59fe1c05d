"""Gather tiles that read the single keys that each query chose.

On the CPU with a C++ compiler `native/token_selection.cpp` packs them; elsewhere torch does.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attnplan.kernels.native import build
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.tile_list import BLOCK, GATHER, TileList


def pack_tokens(tokens: Tensor, keys: int) -> TileList:
    """Gather tiles from the single keys that each query chose: `tile_list.from_tokens`, fast.

    Args:
        tokens: int32 [batch, heads, queries, top], key positions, -1 for none, distinct per query.
        keys: length of the text.

    Raises:
        ValueError: a token is outside the text.
    """
    library = build.load().library if tokens.device.type == "cpu" else None
    if library is None or tokens.numel() == 0:
        return tile_list.from_tokens(tokens, keys)
    batch, heads, queries, top = tokens.shape
    blocks = -(-queries // BLOCK)
    tokens = tokens.to(torch.int32).contiguous()
    offsets = torch.empty(batch * heads * blocks + 1, dtype=torch.int32)
    sizes = (batch * heads, queries, top, keys, torch.get_num_threads())
    arguments = (_pointer(tokens), *map(ctypes.c_int64, sizes), _pointer(offsets))
    if library.attnplan_count_tiles(*arguments):
        raise ValueError(f"a token is outside the text: {int(tokens.max())} of {keys} keys")
    total = int(offsets[-1])
    gather = torch.empty(total, BLOCK, dtype=torch.int32)
    masks = torch.empty(total, BLOCK, dtype=torch.int64)
    library.attnplan_fill_tiles(*arguments, _pointer(gather), _pointer(masks))
    index = torch.arange(total, dtype=torch.int32)
    tiles = torch.stack([torch.full_like(index, GATHER), index, index], dim=1)
    return TileList(batch, heads, blocks, offsets, tiles, gather, masks)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
