"""Slots by chunks: every complete chunk of far keys becomes a few slots.

With a mean query m, e^{s q.k} = e^{s (q-m).k} e^{s m.k}: the second factor is a weight W that no
longer depends on the query. A compressor makes slots of weighted keys; their log-weight takes the
factor back.

    sum_j e^{s q.k_j} v_j  =  sum_j W_j e^{s (q-m).k_j} v_j  ~  sum_c e^{s (q-m).k_c} u_c
                           =  sum_c e^{s q.k_c + b_c} u_c      with b_c = -s m.k_c

By convexity, slots mostly count less mass than their keys have, the more so the further a query is
from the mean. With `references` of the head's drawn queries, the weights and values of a chunk are
multiplied by one number: the geometric mean, over these queries, of the mass of its keys over that
of its slots. Logarithms of masses are then right on average, and weights keep their signs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnplan.kernels.compressors import _left_out as left_out
from attnplan.kernels.compressors._chunked import ChunkedFarField
from attnplan.kernels.contracts.compressor import Kept
from attnplan.kernels.contracts.knobs import LATER
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.numerics import query_draws
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, FULL, SLOTS, TileList

MOST = 2.0
"""Largest logarithm of what corrects the mass of a chunk."""


@dataclass(frozen=True)
class Chunks:
    """The far keys of some heads, by chunk.

    Attributes:
        key: [batch, heads, chunks, chunk, head_dim], float32 or float64.
        value: [batch, heads, chunks, chunk, value_dim].
        weight: [batch, heads, chunks, chunk], W relative to the largest of the chunk; 0 for a key
            that is not to be summarised.
        head: for each of `heads`, its index in the layer.
        scale: factor before the softmax.
    """

    key: Tensor
    value: Tensor
    weight: Tensor
    head: tuple[int, ...]
    scale: float


@dataclass(frozen=True)
class Summary:
    """Slots of every chunk, relative to the mean query and to the chunk's largest weight.

    Attributes:
        key: [batch, heads, chunks, slots, head_dim].
        weight: [batch, heads, chunks, slots]; a slot of weight 0 is left out.
        value: [batch, heads, chunks, slots, value_dim], not normalised.
        log_scale: [batch, heads, chunks, slots] or None for 0; e^log_scale multiplies weight and
            value where their range would not hold it.
        member: int64 [batch, heads, chunks, chunk], the slot of the chunk that holds a key, if any
            one does; None where slots share keys.
        share: [batch, heads, chunks, chunk], what a key is of its slot's weight.
    """

    key: Tensor
    weight: Tensor
    value: Tensor
    log_scale: Tensor | None = None
    member: Tensor | None = None
    share: Tensor | None = None


@dataclass(frozen=True)
class ChunkCompressor(ChunkedFarField):
    """A compressor that turns every chunk of `chunk` keys into `slots` slots."""

    settings: ClassVar[tuple[tuple[int, int], ...]] = ((128, 16), (64, 4))
    """(chunk, slots) worth trying."""
    matched: ClassVar[tuple[Mapping[str, int], ...]] = ()
    """Knobs worth trying with a window of `windows`, `references` among them."""
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ()
    """Knobs worth trying with the shortest window alone."""
    settings_behind: ClassVar[tuple[tuple[int, int], ...]] = ()
    """(chunk, slots) worth trying with a selector that keeps chunks."""
    settings_beside_keys: ClassVar[tuple[tuple[int, int], ...]] = ()
    """(chunk, slots) worth trying with a selector that picks single keys."""
    is_partition: ClassVar[bool] = False
    """A key is in one slot alone, and `summarise` says in which, with what share."""
    mean_name: ClassVar[str | None] = None
    """Fitted mean queries [heads, head_dim] to take out of the scores; None for none."""

    slots: int = 16
    references: int = field(default=0, kw_only=True, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.references <= query_draws.KEPT:
            raise ValueError(
                f"references must be 0 to {query_draws.KEPT} queries, got {self.references}"
            )
        if not 1 <= self.slots <= self.chunk:
            raise ValueError(f"slots must be between 1 and chunk {self.chunk}, got {self.slots}")

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        for chunk, slots in cls.settings:
            if 3 * chunk <= shape.keys:
                yield cls(chunk, slots)

    @classmethod
    def cheap_choices(cls, shape: AttentionShape) -> Iterator[Self]:
        yield from cls._long(cls.cheap, shape)

    @classmethod
    def _long(cls, tried: tuple[Mapping[str, int], ...], shape: AttentionShape) -> Iterator[Self]:
        """Those of some knobs that a text has enough chunks for."""
        yield from (cls(**knobs) for knobs in tried if 16 * knobs["chunk"] <= shape.keys)

    @classmethod
    def choices_behind(cls, near: Selector, shape: AttentionShape) -> Iterator[Self]:
        yield from super().choices_behind(near, shape)
        if near.far_compatible and near.recent in cls.windows:
            yield from cls._long(cls.matched, shape)
        if near.keeps_chunks:
            yield from (cls(chunk, slots) for chunk, slots in cls.settings_behind)
        if near.picks_keys:
            yield from (cls(chunk, slots) for chunk, slots in cls.settings_beside_keys)

    @property
    def separable(self) -> bool:
        return True

    @property
    def leaves_out(self) -> bool:
        return self.is_partition

    def far(
        self,
        inputs: Inputs,
        floor: Tensor,
        sinks: Sequence[int],
        kept: Tensor | None = None,
        *,
        blocks: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Slots | None, TileList]:
        chunks = self.chunks_before(inputs, floor)
        if tokens is None or not int(chunks.max()):
            return super().far(inputs, floor, sinks, kept, blocks=blocks, tokens=tokens)
        slots = self.compress(inputs, int(chunks.max()), sinks, members=True)
        assert slots is not None
        return slots, left_out.without(slots, self.words(chunks, kept), tokens)

    @abstractmethod
    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        """Slots of every chunk; chunks know nothing of each other."""

    @abstractmethod
    def build_macs(self, head_dim: int) -> float:
        """Multiply-adds of summarising one chunk for one head."""

    def far_tiles(self, inputs: Inputs, floor: Tensor, kept: Tensor | None = None) -> TileList:
        return _word_tiles(self.words(self.chunks_before(inputs, floor), kept))

    def words(self, chunks: Tensor, kept: Tensor | None = None) -> Tensor:
        """Which slots of every tile a query block reads, int64 [batch, heads, blocks, tiles].

        Args:
            chunks: before its floor, int64 [batch, heads, blocks].
            kept: as in `far`.
        """
        if kept is None:
            return slot_words(torch.zeros_like(chunks), chunks * self.slots)
        most = int(chunks.max())
        before = torch.arange(most, device=chunks.device) < chunks[..., None]
        return chunk_words(before & ~kept[..., :most], self.slots)

    def left_out_macs(self, shape: AttentionShape, picked: float) -> float:
        return picked * shape.head_dim  # the score of the slot

    def read(self, chunks: Tensor) -> Tensor:
        """How many slots a query reads that has `chunks` chunks behind it."""
        return chunks * self.slots

    def cost(
        self, shape: AttentionShape, window: int, sinks: int, kept: Kept | None = None
    ) -> Cost:
        chunks, more = self.visible(shape, window, sinks)
        near = torch.zeros_like(chunks) if kept is None else kept(chunks)
        pairs = int((self.read(chunks - near) + near * self.chunk + more).sum())
        each = self.references * (self.chunk + self.slots) * shape.head_dim
        build = float(chunks.max()) * (self.build_macs(shape.head_dim) + each)
        return Cost(2.0 * shape.head_dim * pairs, build)

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        return fitted if self.references else fitted - {query_draws.NAME}

    def compress(
        self, inputs: Inputs, chunks: int, sinks: Sequence[int], members: bool = False
    ) -> Slots | None:
        """Slots of the first `chunks` chunks, padded to whole tiles of 64.

        With `members` they say which keys they hold, if they are a partition.
        """
        if not chunks:
            return None
        made = self.build(inputs, chunks, sinks, members)
        return self._matched(made, inputs, chunks, sinks) if self.references else made

    def _matched(self, made: Slots, inputs: Inputs, chunks: int, sinks: Sequence[int]) -> Slots:
        """The slots with the masses of their chunks, over the reference queries."""
        wide = made.key.dtype
        query = inputs.fitted_heads(query_draws.NAME, inputs.head)[:, : self.references].to(wide)
        query = query * inputs.scale
        key = self.by_chunk(inputs, inputs.key, chunks).to(wide)
        logits = query[:, None] @ key.mT  # [batch, heads, chunks, references, chunk]
        near = self.is_sink(chunks, sinks, key.device)[:, :, None]
        exact = logits.masked_fill(near, float("-inf")).logsumexp(-1)
        count = chunks * self.slots
        each = (slice(None), slice(None), slice(count))
        of_slot = query @ made.key[each].mT + made.log_weight[each][:, :, None].to(wide)
        of_slot = of_slot.unflatten(-1, (chunks, self.slots)).transpose(2, 3)
        weight = made.weight[each].unflatten(-1, (chunks, 1, self.slots)).to(wide)
        top = of_slot.amax(-1, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        found = ((of_slot - top).exp() * weight).sum(-1)
        usable = (found > 0) & exact.isfinite()
        ratio = exact - torch.where(usable, found, 1.0).log() - top[..., 0]
        ratio = torch.where(usable, ratio, 0.0).sum(-1) / usable.sum(-1).clamp(min=1)
        factor = ratio.clamp(-MOST, MOST).exp().repeat_interleave(self.slots, -1)
        more = made.weight.shape[2] - count
        factor = torch.nn.functional.pad(factor, (0, more), value=1.0)
        factor = factor.to(made.weight.dtype)
        share = made.share
        if share is not None and made.member is not None:
            share = share * factor.gather(-1, made.member.long().clamp(min=0))
        return replace(
            made,
            weight=made.weight * factor,
            value=made.value * factor[..., None],
            share=share,
        )

    def build(
        self, inputs: Inputs, chunks: int, sinks: Sequence[int], members: bool = False
    ) -> Slots:
        """`compress`, of at least one chunk, as the method makes them."""
        wide = torch.promote_types(inputs.key.dtype, torch.float32)
        key, value = (self.by_chunk(inputs, t, chunks).to(wide) for t in (inputs.key, inputs.value))
        if self.mean_name is None:
            log_w = torch.zeros_like(key[..., 0])
            mean = None
        else:
            mean = inputs.fitted_heads(self.mean_name, inputs.head).to(wide)
            log_w = (key * mean[:, None, None]).sum(-1) * inputs.scale
        near = self.is_sink(chunks, sinks, key.device)
        log_w = log_w.masked_fill(near, float("-inf"))
        shift = log_w.amax(-1, keepdim=True)
        shift = torch.where(shift.isfinite(), shift, 0.0)
        weight = (log_w - shift).exp()
        made = self.summarise(Chunks(key, value, weight, inputs.head, inputs.scale), inputs)
        log_weight = shift.expand(made.weight.shape)
        if made.log_scale is not None:
            log_weight = log_weight + made.log_scale
        if mean is not None:
            log_weight = log_weight - (made.key * mean[:, None, None]).sum(-1) * inputs.scale
        slots = whole_tiles(made, log_weight)
        if not members:
            return slots
        assert made.member is not None and made.share is not None
        held, share = self._placed(inputs, made.member, made.share, near)
        return replace(slots, member=held, share=share)

    def _placed(
        self, inputs: Inputs, member: Tensor, share: Tensor, near: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Members and shares by position in the text, for `Slots`."""
        chunks = member.shape[2]
        first = self.slots * torch.arange(chunks, device=member.device)[:, None]
        member = torch.where(near | (member < 0), -1, member + first).flatten(2).to(torch.int32)
        share = share.flatten(2)
        size = (*member.shape[:2], inputs.key.shape[2])
        held, shares = member.new_full(size, -1), share.new_zeros(size)
        for row, start in enumerate(inputs.start):
            some = min(member.shape[2], size[2] - start)
            held[row, :, start : start + some] = member[row, :, :some]
            shares[row, :, start : start + some] = share[row, :, :some]
        return held, shares


def pooled(chunks: Chunks, member: Tensor) -> Summary:
    """Weighted means of clusters, one-hot `member` [..., chunk, slots]."""
    share = member * chunks.weight[..., None]
    mass = share.sum(-2)
    centre = share.mT @ chunks.key / mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
    value = share.mT @ chunks.value
    return Summary(centre, mass, value, member=member.argmax(-1), share=chunks.weight)


def whole_tiles(made: Summary, log_weight: Tensor) -> Slots:
    """All slots of a head in a row, padded to whole tiles of 64; each head reads its own."""
    log_weight = log_weight.masked_fill(made.weight == 0, float("-inf"))
    flat = [t.flatten(2, 3) for t in (made.key, log_weight, made.weight, made.value)]
    fill = -flat[0].shape[2] % BLOCK
    pad = torch.nn.functional.pad
    return Slots(
        pad(flat[0], (0, 0, 0, fill)),
        pad(flat[1], (0, fill), value=float("-inf")),
        pad(flat[2], (0, fill)),
        pad(flat[3], (0, 0, 0, fill)),
        torch.arange(flat[0].shape[1], dtype=torch.int32, device=made.key.device),
    )


def slot_tiles(first: Tensor, last: Tensor) -> TileList:
    """Slot tiles: a query block reads slots [first, last), both int64 [batch, heads, blocks]."""
    return _word_tiles(slot_words(first, last))


def slot_words(first: Tensor, last: Tensor) -> Tensor:
    """The slots [first, last) as bits of every tile, int64 [batch, heads, blocks, tiles]."""
    tile = torch.arange(-(-int(last.max()) // BLOCK), device=last.device)
    return _run(first[..., None], last[..., None], tile)


def chunk_tiles(read: Tensor, slots: int) -> TileList:
    """Slot tiles: a query block reads the slots of some chunks; see `chunk_words`."""
    return _word_tiles(chunk_words(read, slots))


def chunk_words(read: Tensor, slots: int) -> Tensor:
    """The slots of some chunks as bits of every tile, int64 [batch, heads, blocks, tiles].

    Args:
        read: bool [batch, heads, blocks, chunks].
        slots: per chunk.
    """
    chunks = read.shape[3]
    first = torch.arange(chunks, device=read.device)[:, None] * slots
    # a chunk lies in so many tiles at most; the last of them may be past the end, and is then empty
    crosses = BLOCK % slots > 0 and slots % BLOCK > 0
    span = torch.arange(-(-slots // BLOCK) + crosses, device=read.device)
    tile = first // BLOCK + span
    bits = read[..., None] * _run(first, first + slots, tile)
    words = bits.new_zeros(*read.shape[:3], -(-chunks * slots // BLOCK) + len(span))
    words.index_add_(3, tile.flatten(), bits.flatten(3))  # distinct bits: a sum is an or
    return words[..., : -(-chunks * slots // BLOCK)]


def _run(first: Tensor, last: Tensor, tile: Tensor) -> Tensor:
    """Which of the 64 slots of tiles are in [first, last), as bits of an int64."""
    low, high = ((end - tile * BLOCK).clamp(0, BLOCK) for end in (first, last))
    before = [torch.where(n == BLOCK, -1, (1 << n.clamp(max=BLOCK - 1)) - 1) for n in (low, high)]
    return before[1] & ~before[0]


def _word_tiles(words: Tensor) -> TileList:
    """Slot tiles: which slots of every tile a query block reads, [batch, heads, blocks, tiles]."""
    batch, heads, count, _ = words.shape
    b, h, row, index = torch.nonzero(words, as_tuple=True)
    distinct, mask = torch.unique(words[b, h, row, index], return_inverse=True)
    mask = torch.where(distinct[mask] == -1, FULL, mask)
    tiles = torch.stack([torch.full_like(index, SLOTS), index, mask], dim=1)
    masks = distinct[:, None].expand(-1, BLOCK).contiguous()
    gather = torch.zeros(0, BLOCK, dtype=torch.int32, device=words.device)
    rows = (b * heads + h) * count + row
    return tile_list.from_rows(batch, heads, count, rows, tiles, gather, masks)
