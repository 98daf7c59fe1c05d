"""Far fields that end where a chunk of keys ends.

A query block's far field is the complete chunks that lie before its window; the keys between them
and the window stay near, so no summary of a chunk holds a key that a query must not see. A selector
may keep some of these chunks near: their summaries are then left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.operands.indexing import heads_of, numbers_on
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK


@dataclass(frozen=True)
class ChunkedFarField(Compressor):
    """A compressor that summarises complete chunks of `chunk` keys."""

    chunk: int = 128

    def __post_init__(self) -> None:
        if self.chunk < BLOCK:
            raise ValueError(f"chunk must be at least {BLOCK} keys, got {self.chunk}")

    def floor(self, inputs: Inputs, blocks: Tensor, window: int) -> Tensor:
        start = numbers_on(inputs.start, blocks.device)[:, None]
        outside = blocks * BLOCK + inputs.offset - start - window + 1
        return start + outside.clamp(min=0) // self.chunk * self.chunk

    def chunks_before(self, inputs: Inputs, floor: Tensor) -> Tensor:
        start = numbers_on(inputs.start, floor.device)[:, None, None]
        return (floor - start) // self.chunk

    def by_chunk(self, inputs: Inputs, rows: Tensor, chunks: int) -> Tensor:
        """The first keys or values by chunk, [batch, heads, chunks, chunk, dim]."""
        length = chunks * self.chunk  # padded sequences have fewer chunks: theirs end in zeros
        first = inputs.start[0]
        if len(set(inputs.start)) == 1 and first + length <= rows.shape[2]:
            found = rows[:, :, first : first + length]
        else:
            parts = [rows[b, :, start : start + length] for b, start in enumerate(inputs.start)]
            parts = [torch.nn.functional.pad(p, (0, 0, 0, length - p.shape[1])) for p in parts]
            found = torch.stack(parts)
        return heads_of(found, inputs.kv_head).unflatten(2, (chunks, self.chunk))

    def is_sink(self, chunks: int, sinks: Sequence[int], device: torch.device) -> Tensor:
        """Keys of the first chunks that stay near as sinks, bool [heads, chunks, chunk]."""
        position = torch.arange(chunks * self.chunk, device=device).view(chunks, self.chunk)
        return position < numbers_on(tuple(sinks), device)[:, None, None]

    def before(self, shape: AttentionShape, window: int, sinks: int) -> Tensor:
        chunks, _ = self.visible(shape, window, sinks)
        return (chunks * self.chunk - sinks).clamp(min=0)

    def visible(self, shape: AttentionShape, window: int, sinks: int) -> tuple[Tensor, Tensor]:
        """For every query, how many chunks it reads, and how many near keys the pair adds.

        The latter are the keys between the chunks and the window.
        """
        row = torch.arange(shape.queries)
        first = row // BLOCK * BLOCK + shape.keys - shape.queries
        chunks = (first - window + 1).clamp(min=0) // self.chunk
        reached = torch.clamp(chunks * self.chunk, min=sinks)
        return chunks, (row + shape.keys - shape.queries + 1 - window - reached).clamp(min=0)
