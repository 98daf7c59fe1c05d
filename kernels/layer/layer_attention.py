"""All heads of one layer, each with its own approximation, in one launch.

Heads with the same method select together, whatever their settings, and heads with the same
compressor compress together; the tile lists are stacked into one list for the layer. What depends
on shapes alone (static selectors) is built once per shape and kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnplan.kernels.contracts.approximation import Approximation, NearField
from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.engines.dispatch import attend
from attnplan.kernels.layer import stacked_slots
from attnplan.kernels.operands import partial_softmax, tile_list
from attnplan.kernels.operands.indexing import numbers_on
from attnplan.kernels.operands.inputs import Fitted, Inputs
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, TileList

if TYPE_CHECKING:
    from attnplan.kernels.layer.prepared import PreparedLayer


class LayerKernel:
    """Attention of one layer under a fixed assignment.

    Args:
        assignment: one approximation per query head.
        fitted: calibrated data of the layer.
    """

    def __init__(self, assignment: tuple[Approximation, ...], fitted: Fitted | None = None) -> None:
        self.assignment = assignment
        self.fitted = fitted or {}
        self.is_dense = all(a.is_dense for a in assignment)
        ready = [can_prepare([a]) for a in assignment]
        self._ready = tuple(head for head, is_ready in enumerate(ready) if is_ready)
        self._others = tuple(head for head, is_ready in enumerate(ready) if not is_ready)
        self._moved: dict[torch.device, Fitted] = {}
        self._of_shape: dict[object, PreparedLayer] = {}
        self._whole: dict[object, PreparedLayer] = {}
        self._grows = all(a.far is None or a.far.grows for a in assignment)
        heads: dict[Approximation, list[int]] = {}
        for head, approximation in enumerate(assignment):
            heads.setdefault(approximation, []).append(head)
        self._static = [(a, tuple(h)) for a, h in heads.items() if a.static]
        self._paired = [(a, tuple(h)) for a, h in heads.items() if a.far is not None]
        self._dynamic: dict[type[Selector], list[int]] = {}
        self._compressed: dict[tuple[Compressor, bool, bool], list[int]] = {}
        for head, approximation in enumerate(assignment):
            if approximation.far is not None:
                near = approximation.near
                shared = approximation.far, near.keeps_chunks, near.picks_keys
                self._compressed.setdefault(shared, []).append(head)
            elif not approximation.static:
                self._dynamic.setdefault(type(approximation.near), []).append(head)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        start: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Causal attention, lower-right aligned.

        Args:
            query: [batch, heads, queries, head_dim], after RoPE.
            key: [batch, kv_heads, keys, head_dim].
            value: [batch, kv_heads, keys, value_dim].
            scale: factor before the softmax.
            start: for each batch row, the first key that is no left padding.

        Returns:
            [batch, heads, queries, value_dim], in the dtype of `query`. Rows of padding are zero.
        """
        fitted = self._fitted_on(query.device)
        inputs = Inputs.of_layer(query, key, value, scale=scale, start=start, fitted=fitted)
        return self._attend(inputs)

    def _attend(self, inputs: Inputs) -> Tensor:
        query, key, value = inputs.query, inputs.key, inputs.value
        if self._ready and is_gpu(query.device):
            return self._prepared(inputs)(inputs)[0] if not self._others else self._apart(inputs)
        blocks = inputs.all_blocks
        fields = self._fields(inputs, blocks)
        tiles, slots = self.tiles(inputs, blocks, fields)
        output, _ = attend(
            query,
            key,
            value,
            scale=inputs.scale,
            kv_head=inputs.kv_head,
            tiles=tiles,
            slots=slots,
            part=self.part(inputs, blocks, fields),
        )
        return output

    def _apart(self, inputs: Inputs) -> Tensor:
        """Heads that can be prepared, and the others, which make the host wait for the device."""
        batch, heads, queries, _ = inputs.query.shape
        output = inputs.query.new_empty(batch, queries, heads, inputs.value.shape[3])
        output = output.transpose(1, 2)
        for some, kernel in self._sides:
            made = kernel._attend(inputs.heads(some))
            output.index_copy_(1, numbers_on(some, output.device), made)
        return output

    @cached_property
    def _sides(self) -> list[tuple[tuple[int, ...], LayerKernel]]:
        """The two kinds of heads, each with a kernel of its own."""
        return [
            (some, LayerKernel(tuple(self.assignment[head] for head in some), self.fitted))
            for some in (self._ready, self._others)
        ]

    def _fitted_on(self, device: torch.device) -> Fitted:
        """The calibrated data, moved there once."""
        if device not in self._moved:
            self._moved[device] = {name: t.to(device) for name, t in self.fitted.items()}
        return self._moved[device]

    def _prepared(self, inputs: Inputs) -> PreparedLayer:
        """What is made once per shape, for the last few shapes.

        Prompts without padding share what is made for the longest of them: a server sees another
        length with every request.
        """
        query, key = inputs.query, inputs.key
        batch, _, queries, _ = query.shape
        prompt = self._grows and queries == key.shape[2] and not any(inputs.start)
        lengths = inputs.blocks if prompt else (queries, key.shape[2])
        shape = (batch, lengths, inputs.start, query.device)
        known = self._of_shape.get(shape)
        if known is None:
            from attnplan.kernels.layer.prepared import PreparedLayer

            if prompt:
                known = self._whole_for(inputs).first(inputs.blocks)
            else:
                known = PreparedLayer(self.assignment, inputs)
            self._of_shape[shape] = known
            while len(self._of_shape) > _PREPARED_SHAPES:
                self._of_shape.pop(next(iter(self._of_shape)))
        return known

    def _whole_for(self, inputs: Inputs) -> PreparedLayer:
        """What is made for the longest prompt so far, at least that of `inputs`."""
        from attnplan.kernels.layer.prepared import PreparedLayer

        place = len(inputs.start), inputs.query.device
        known = self._whole.get(place)
        if known is None or known.blocks < inputs.blocks:
            known = PreparedLayer(self.assignment, _longer(inputs, rounded(inputs.blocks)))
            self._whole[place] = known
        return known

    def tiles(
        self, inputs: Inputs, blocks: Tensor, fields: _Fields | None = None
    ) -> tuple[TileList, Slots | None]:
        """Tile list and slots of the whole layer for some query blocks."""
        fields = self._fields(inputs, blocks) if fields is None else fields
        parts: list[tuple[Sequence[int], TileList]] = []
        if self._static:
            parts.append(self._static_tiles(inputs, blocks))
        for method, heads in self._dynamic.items():
            selectors = [self.assignment[head].near for head in heads]
            parts.append((heads, method.select(selectors, inputs.heads(tuple(heads)), blocks)))
        parts += [(paired, fields[paired[0]][0].tiles) for _, paired in self._paired]
        near = tile_list.stack_heads(parts, len(self.assignment))
        if not self._compressed:
            return near, None
        far, slots = self._far(inputs, blocks, fields)
        return tile_list.concat([near, far]), slots

    def _fields(self, inputs: Inputs, blocks: Tensor) -> _Fields:
        """The near fields of heads with a far field, and the place of each head in its field."""
        fields: _Fields = {}
        for approximation, paired in self._paired:
            field = approximation.beside(inputs.heads(paired), blocks)
            fields |= {head: (field, row) for row, head in enumerate(paired)}
        return fields

    def part(self, inputs: Inputs, blocks: Tensor, fields: _Fields | None = None) -> Part | None:
        """What far fields contribute to some query blocks besides `tiles`."""
        parts = []
        for (compressor, keeps_chunks, _), heads in self._compressed.items():
            if keeps_chunks or compressor.separable:
                continue
            fields = self._fields(inputs, blocks) if fields is None else fields
            near = [fields[head] for head in heads]
            sinks = [self.assignment[head].reach[1] for head in heads]
            floor = torch.stack([field.floor[:, row] for field, row in near], dim=1)
            some = inputs.heads(tuple(heads))
            chunks = int(compressor.chunks_before(some, floor).max())
            made = compressor.part(some, blocks, floor, sinks, chunks, _tokens(near))
            if made is not None:
                parts.append(replace(made, head=tuple(heads[h] for h in made.head)))
        return partial_softmax.stack_heads(parts) if parts else None

    def _far(
        self, inputs: Inputs, blocks: Tensor, fields: _Fields
    ) -> tuple[TileList, Slots | None]:
        """Slot tiles and slots; heads with the same compressor compress together."""
        parts: list[tuple[Sequence[int], TileList]] = []
        slots: list[tuple[list[int], Slots]] = []
        for (compressor, _, _), heads in self._compressed.items():
            near = [fields[head] for head in heads]
            floor = torch.stack([field.floor[:, row] for field, row in near], dim=1)
            kept = [field.kept[:, row] for field, row in near if field.kept is not None]
            sinks = [self.assignment[head].reach[1] for head in heads]
            some = self.assignment[heads[0]].chunked(inputs.heads(tuple(heads)))
            made, tiles = compressor.far(
                some,
                floor,
                sinks,
                torch.stack(kept, 1) if kept else None,
                blocks=blocks,
                tokens=_tokens(near),
            )
            parts.append((heads, tiles))
            if made is not None:
                slots.append((heads, made))
        others = [head for head in range(len(self.assignment)) if head not in fields]
        if others:
            size = len(inputs.start), len(others), len(blocks)
            nothing = tile_list.empty(*size, inputs.query.device)
            parts.append((others, nothing))
        far = tile_list.stack_heads(parts, len(self.assignment))
        if not slots:
            return far, None
        rows = stacked_slots.rows_of_heads([heads for heads, _ in slots], len(self.assignment))
        rows = rows.to(inputs.query.device)
        return far, stacked_slots.stack([made for _, made in slots], rows)

    def _static_tiles(self, inputs: Inputs, blocks: Tensor) -> tuple[tuple[int, ...], TileList]:
        """Heads with static selectors, and their tile list, built once per shape."""
        order = tuple(head for _, heads in self._static for head in heads)
        spelled = (
            tuple((a, len(h)) for a, h in self._static),
            inputs.shape,
            inputs.start,
            tuple(blocks.tolist()),
            inputs.query.device,
        )
        cached = _STATIC.get(spelled)
        if cached is None:
            parts = []
            first = 0
            for approximation, heads in self._static:
                names = tuple(range(first, first + len(heads)))
                parts.append((names, approximation.near.near(inputs.heads(heads), blocks)))
                first += len(heads)
            cached = tile_list.stack_heads(parts, first)
            _STATIC[spelled] = cached
            while len(_STATIC) > _CACHED_LISTS:
                _STATIC.popitem(last=False)
        else:
            _STATIC.move_to_end(spelled)
        return order, cached


def _tokens(near: Sequence[tuple[NearField, int]]) -> Tensor | None:
    """The single keys of some heads, -1 where a head has fewer; None where none are chosen."""
    tokens = [field.tokens[:, row] for field, row in near if field.tokens is not None]
    most = max((t.shape[2] for t in tokens), default=0)
    pad = torch.nn.functional.pad
    padded = [pad(t, (0, most - t.shape[2]), value=-1) for t in tokens]
    return torch.stack(padded, 1) if tokens else None


def is_gpu(device: torch.device) -> bool:
    """Whether layers are prepared there."""
    return device.type == "cuda"


def rounded(blocks: int) -> int:
    """A number of blocks that is at most an eighth more, or 15 more."""
    step = max(16, 1 << max(blocks.bit_length() - 4, 0))
    return -(-blocks // step) * step


def _longer(inputs: Inputs, blocks: int) -> Inputs:
    """A call of another length, whose tensors have no numbers."""
    tensors = {
        name: getattr(inputs, name)[:, :, :1].expand(-1, -1, blocks * BLOCK, -1)
        for name in ("query", "key", "value")
    }
    return replace(inputs, **tensors)


def can_prepare(assignment: Sequence[Approximation]) -> bool:
    """Whether all heads read as many tiles as is known beforehand; see `PreparedLayer`."""
    return all(approximation.counts_tiles for approximation in assignment)


_Fields = dict[int, tuple[NearField, int]]
_PREPARED_SHAPES = 4
_CACHED_LISTS = 256
_STATIC: OrderedDict[object, TileList] = OrderedDict()
