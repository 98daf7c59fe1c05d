"""A layer on a GPU whose heads read as many tiles as is known beforehand.

Under static patterns, with or without a far field, and where heads choose the best key blocks, only
slots and the numbers of the chosen blocks depend on the content. Everything else (rows, their
order, masks, places of lists, floors) is made once per shape on the host; a call chooses and
compresses, launches, adds what far fields contribute without slots, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.engines.gpu import merge_partial, top_blocks
from attnplan.kernels.engines.gpu import prefill as gpu_prefill
from attnplan.kernels.engines.gpu import schedule as scheduling
from attnplan.kernels.engines.gpu.schedule import FIELDS, Rows
from attnplan.kernels.layer import stacked_slots
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, TileList
from attnplan.kernels.selectors._scored_blocks import BlockGrid, ScoredBlocks, block_words
from attnplan.kernels.selectors._static_pattern import StaticPattern


@dataclass(frozen=True)
class _Choice:
    """Heads of one method that choose blocks, on the device.

    Attributes:
        heads, selectors: which heads of the layer, with what settings.
        begin, end: their part of the chosen blocks.
        place: int32 [batch, heads, blocks], where a row's list begins in that part.
        top, local: int32 [heads].
    """

    heads: tuple[int, ...]
    selectors: tuple[ScoredBlocks, ...]
    begin: int
    end: int
    place: Tensor
    top: Tensor
    local: Tensor


@dataclass(frozen=True)
class _Far:
    """Heads of one compressor, on the device.

    Attributes:
        compressor, heads, sinks: which heads of the layer, with what first keys that stay near.
        most: for each block, the most chunks that lie before the floor of it or one before it.
        floor: int64 [batch, heads, blocks].
    """

    compressor: Compressor
    heads: tuple[int, ...]
    sinks: tuple[int, ...]
    most: tuple[int, ...]
    floor: Tensor

    @property
    def chunks(self) -> int:
        return self.most[-1] if self.most else 0

    def first(self, blocks: int) -> _Far:
        floor = self.floor[:, :, :blocks].contiguous()
        return replace(self, most=self.most[:blocks], floor=floor)


class PreparedLayer:
    """One layer under a fixed assignment at one shape.

    Attributes:
        blocks: of 64 queries.

    Args:
        assignment: one approximation per head; see `layer_attention.can_prepare`.
        inputs: a call of this shape; its numbers do not matter.

    Raises:
        ValueError: a head's selector is neither a pattern nor one that scores blocks.
    """

    def __init__(self, assignment: Sequence[Approximation], inputs: Inputs) -> None:
        device = inputs.query.device
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        all_blocks = tuple(range(inputs.blocks))
        static: dict[StaticPattern, list[int]] = {}
        scored: dict[type[ScoredBlocks], list[int]] = {}
        paired: dict[Approximation, list[int]] = {}
        for head, approximation in enumerate(assignment):
            near = approximation.near
            if approximation.far is not None:
                paired.setdefault(approximation, []).append(head)
            elif isinstance(near, StaticPattern):
                static.setdefault(near, []).append(head)
            elif isinstance(near, ScoredBlocks):
                scored.setdefault(type(near), []).append(head)
            else:
                raise ValueError(f"{near.name} does not say how many tiles it reads beforehand")
        parts: list[tuple[Sequence[int], Rows]] = []
        for pattern, heads in static.items():
            tiles = pattern.one_head(queries, keys, inputs.start, all_blocks)
            parts.append((heads, scheduling.rows_of(tiles, keys, len(heads))))
        floors: dict[int, Tensor] = {}
        for approximation, heads in paired.items():
            tiles, floor = _paired_tiles(approximation, inputs, all_blocks)
            parts.append((heads, scheduling.rows_of(tiles, keys, len(heads))))
            floors |= dict.fromkeys(heads, floor)
        self.blocks = inputs.blocks
        self._far = _far_fields(assignment, inputs, floors)
        self._slot_rows = self._rows_of_slots(len(assignment)).to(device)
        self._choices: list[_Choice] = []
        begin = 0
        for heads in scored.values():
            selectors = [assignment[head].near for head in heads]
            rows, place = scored_rows([s for s in selectors if isinstance(s, ScoredBlocks)], inputs)
            parts.append((heads, rows))
            settings = [torch.tensor([getattr(s, n) for s in selectors]) for n in ("top", "local")]
            self._choices.append(
                _Choice(
                    tuple(heads),
                    tuple(s for s in selectors if isinstance(s, ScoredBlocks)),
                    begin,
                    begin + rows.chosen,
                    place.to(device),
                    *(each.to(torch.int32).to(device) for each in settings),
                )
            )
            begin += rows.chosen
        schedule = scheduling.join(parts, keys, inputs.kv_head)
        self._work = schedule.work
        self.schedule = schedule.to(device)
        self._start = top_blocks.integers(inputs.start, device)

    def _rows_of_slots(self, heads: int) -> Tensor:
        return stacked_slots.rows_of_heads([far.heads for far in self._far if far.chunks], heads)

    def first(self, blocks: int) -> PreparedLayer:
        """The same for a shorter text without padding, of `blocks` blocks of 64 queries.

        A query block reads what it reads in the longer one: tiles are shared, and rows keep their
        order. Valid where far fields grow with the text (`Compressor.grows`), and where the queries
        are those of all keys.
        """
        if blocks > self.blocks:
            raise ValueError(f"prepared for {self.blocks} blocks of queries, asked for {blocks}")
        made = copy(self)
        made.blocks = blocks
        head, block = self._work[:, 0] // self.blocks, self._work[:, 0] % self.blocks
        made._work = self._work.clone()
        made._work[:, 0] = head * blocks + block
        made._work = made._work[block < blocks]
        made.schedule = replace(self.schedule, work=made._work.to(self.schedule.work.device))
        made._choices = [
            replace(choice, place=choice.place[:, :, :blocks].contiguous())
            for choice in self._choices
        ]
        made._far = [far.first(blocks) for far in self._far]
        made._slot_rows = made._rows_of_slots(len(self._slot_rows)).to(self._slot_rows.device)
        return made

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output [batch, heads, queries, value_dim], and log-mass [batch, heads, queries]."""
        chosen = None
        if self.schedule.chosen:
            chosen = self._start.new_empty(self.schedule.chosen)
            for choice in self._choices:
                scores = choice.selectors[0].layer_scores(choice.selectors, inputs, choice.heads)
                top_blocks.choose_blocks(
                    scores.float(),
                    chosen[choice.begin : choice.end],
                    place=choice.place,
                    top=choice.top,
                    local=choice.local,
                    start=self._start,
                    offset=inputs.offset,
                    follows=choice.selectors[0].follows,
                )
        slots, parts = self._far_fields(inputs)
        output, log_mass = gpu_prefill.launch(
            inputs.query,
            inputs.key,
            inputs.value,
            scale=inputs.scale,
            schedule=self.schedule,
            chosen=chosen,
            slots=slots,
        )
        for part in parts:
            merge_partial.merge(part, output, log_mass)
        return output, log_mass

    def _far_fields(self, inputs: Inputs) -> tuple[Slots | None, list[Part]]:
        slots, parts = [], []
        for far in self._far:
            some = inputs.heads(far.heads)
            made = far.compressor.compress(some, far.chunks, far.sinks)
            if made is not None:
                slots.append(made)
            part = far.compressor.part(some, inputs.all_blocks, far.floor, far.sinks, far.chunks)
            if part is not None:
                parts.append(replace(part, head=tuple(far.heads[h] for h in part.head)))
        return stacked_slots.stack(slots, self._slot_rows) if slots else None, parts


def _paired_tiles(
    approximation: Approximation, inputs: Inputs, blocks: tuple[int, ...]
) -> tuple[TileList, Tensor]:
    """The tiles of one head with a far field, and int64 [batch, blocks], where that ends.

    Both are on the CPU, and of sizes alone.
    """
    near, far = approximation.near, approximation.far
    assert isinstance(near, StaticPattern) and far is not None
    floor = far.floor(inputs, torch.tensor(blocks, dtype=torch.int64), near.recent)
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    tiles = near.one_head(queries, keys, inputs.start, blocks, floor)
    return tile_list.concat([tiles, far.far_tiles(inputs, floor[:, None])]), floor


def _far_fields(
    assignment: Sequence[Approximation], inputs: Inputs, floors: Mapping[int, Tensor]
) -> list[_Far]:
    """Heads with a far field, by compressor.

    Args:
        assignment, inputs: as in `PreparedLayer`.
        floors: of these heads, int64 [batch, blocks].
    """
    found: dict[Compressor, list[int]] = {}
    for head in floors:
        far = assignment[head].far
        assert far is not None
        found.setdefault(far, []).append(head)
    made = []
    for compressor, heads in found.items():
        floor = torch.stack([floors[head] for head in heads], 1)
        chunks = compressor.chunks_before(inputs, floor).amax((0, 1))
        most = tuple(chunks.cummax(0).values.tolist())
        sinks = tuple(assignment[head].reach[1] for head in heads)
        made.append(_Far(compressor, tuple(heads), sinks, most, floor.to(inputs.query.device)))
    return made


def scored_rows(selectors: Sequence[ScoredBlocks], inputs: Inputs) -> tuple[Rows, Tensor]:
    """The rows of heads that choose blocks, and where their lists begin: the numbers alone.

    Args:
        selectors: one per head.
        inputs: a call of this shape.

    Returns:
        The rows, and int32 [batch, heads, blocks], counted from the first list.
    """
    cpu = torch.device("cpu")
    blocks = torch.arange(inputs.blocks)
    grid = BlockGrid.of(inputs, blocks, cpu)
    own, last = grid.first[:, 0], grid.last[:, 0]
    start = torch.tensor(inputs.start)[:, None]  # [batch, 1]
    sink = start // BLOCK
    whole_sink = (start % BLOCK == 0) & (sink < own)  # [batch, blocks]

    # tiles under masks: the same for all heads
    cut = torch.stack([own.expand_as(whole_sink), last.expand_as(whole_sink), sink + 0 * own], -1)
    wanted = (cut <= last[:, None]) & (cut >= sink[..., None])
    wanted[..., 1] &= last != own
    wanted[..., 2] &= ~whole_sink & (sink != own) & (sink != last)
    words = block_words(inputs, blocks, cut).view(*cut.shape, BLOCK)
    masks, mask = torch.unique(words[wanted], dim=0, return_inverse=True)
    count = wanted.sum(2).flatten()
    end = count.cumsum(0).view(len(start), 1, -1)
    begin = end - count.view(end.shape)

    top, local = (torch.tensor([getattr(s, n) for s in selectors]) for n in ("top", "local"))
    recent = own - local[:, None] + 1  # [heads, blocks]
    after = (sink + 1)[:, None]  # [batch, 1, 1]
    chosen = torch.minimum((recent - after).clamp(min=0), top[:, None])
    full = chosen + (own - torch.maximum(recent, after)).clamp(min=0) + whole_sink[:, None]
    until = full.flatten().cumsum(0).view(full.shape)
    place = until - full
    none = torch.zeros_like(full)
    masked, stop = begin.expand_as(full), end.expand_as(full)
    work = torch.stack([none, place, until, masked, stop, stop, stop, none], dim=3)
    assert work.shape[3] == FIELDS
    rows = Rows(
        work.to(torch.int32),
        torch.zeros(1, 1, 1, dtype=torch.bool),
        cut[wanted].to(torch.int32),
        mask.to(torch.int32),
        masks,
        int(full.sum()),
    )
    return rows, place.to(torch.int32).contiguous()
