"""Which keys a block of queries reads: the one format that every selector compiles to.

Queries come in blocks of `BLOCK` consecutive rows. For each (batch row, head, query block) a tile
list names the tiles to read, in CSR form: the tiles of row `r` are
`tiles[offsets[r] : offsets[r + 1]]` with `r = (batch * heads + head) * blocks + block`. One tile is
three int32 numbers:

    kind    CONTIGUOUS: keys [64 * index, 64 * index + 64)
            GATHER:     the 64 keys named by `gather[index]` (-1: no key in this column)
            SLOTS:      pseudo-keys [64 * index, 64 * index + 64) of the head's far field
            TAKEN:      as GATHER, of keys that leave their slots: a pair also subtracts the key's
                        share of its slot (`Slots.member`, `Slots.share`)
    index   see kind
    mask    FULL, or a row of `masks`: bit `c` of `masks[mask, r]` is set where query row `r` of the
            block computes column `c` of the tile

Everything that distinguishes one sparse method from another (causality, windows, sinks, padding,
single tokens per query) is in those masks, so engines know nothing of positions. The dense mask of
a list, as one would write it:

    for r, (batch, head, block) in enumerate(rows):
        for kind, index, mask in tiles[offsets[r]:offsets[r + 1]]:
            for row in range(64):
                for column in range(64):
                    if mask == FULL or masks[mask, row] >> column & 1:
                        keep[batch, head, 64 * block + row, key_of(kind, index, column)] = True
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplan.kernels.native import build

BLOCK = 64
CONTIGUOUS, GATHER, SLOTS, TAKEN = 0, 1, 2, 3
FULL = -1


@dataclass(frozen=True)
class TileList:
    """The tiles of every query block of every head.

    Attributes:
        batch, heads, blocks: the list has `batch * heads * blocks` rows.
        offsets: int32 [rows + 1].
        tiles: int32 [tiles, 3], each (kind, index, mask).
        gather: int32 [gathers, 64], key positions, -1 for an empty column.
        masks: int64 [masks, 64], one 64-bit word per query row.
    """

    batch: int
    heads: int
    blocks: int
    offsets: Tensor
    tiles: Tensor
    gather: Tensor
    masks: Tensor

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.blocks

    def pairs(self, queries: int, *, slots: bool = True) -> Tensor:
        """Query-key pairs computed, int64 [batch, heads].

        Rows past `queries` are not counted. With `slots=False`, only real keys are.
        """
        device = self.tiles.device
        row_of_tile = torch.repeat_interleave(
            torch.arange(self.rows, device=device), self.offsets.long().diff()
        )
        alive = torch.clamp(queries - BLOCK * (row_of_tile % max(self.blocks, 1)), 0, BLOCK)
        words = torch.cat([popcount(self.masks), torch.full((1, BLOCK), BLOCK, device=device)])
        counts = words.cumsum(1)
        counts = torch.cat([torch.zeros_like(counts[:, :1]), counts], dim=1)  # [masks + 1, 65]
        per_tile = counts[self.tiles[:, 2].long(), alive]
        if not slots:
            per_tile = per_tile * (self.tiles[:, 0] != SLOTS)
        total = torch.zeros(self.rows, dtype=torch.int64, device=device)
        total.index_add_(0, row_of_tile, per_tile)
        return total.view(self.batch, self.heads, self.blocks).sum(2)

    def counts(
        self, queries: int, keys: int, kinds: Sequence[int] = (CONTIGUOUS, GATHER, TAKEN)
    ) -> Tensor:
        """How often every pair is computed, int64 [batch, heads, queries, keys]: tests only.

        Tiles of other kinds are left out, those of slots always. A correct list never counts a pair
        twice.
        """
        out = torch.zeros(self.rows, BLOCK, keys + BLOCK, dtype=torch.int64)
        bits = torch.arange(BLOCK)
        offsets, tiles = self.offsets.tolist(), self.tiles.tolist()
        for row in range(self.rows):
            for kind, index, mask in tiles[offsets[row] : offsets[row + 1]]:
                if kind == SLOTS or kind not in kinds:
                    continue
                if kind == CONTIGUOUS:
                    where = index * BLOCK + bits
                else:
                    where = self.gather[index].long().cpu()
                on = torch.ones(BLOCK, BLOCK, dtype=torch.int64)
                if mask != FULL:
                    on = self.masks[mask].cpu()[:, None] >> bits & 1
                where = torch.where((where >= 0) & (where < keys), where, keys)
                if mask == FULL and bool((where == keys).any()):
                    raise AssertionError(f"row {row}: a full tile names a key outside the text")
                out[row].index_add_(1, where, on)
        out = out.view(self.batch, self.heads, self.blocks * BLOCK, keys + BLOCK)
        return out[:, :, :queries, :keys]

    def expand_heads(self, heads: int) -> TileList:
        """The same list for each of `heads` heads; this one must have a single head."""
        if self.heads != 1:
            raise ValueError(f"expand_heads needs a list of one head, got {self.heads}")
        if heads == 1:
            return self
        if self.batch > 1:
            return stack_heads([((h,), self) for h in range(heads)], heads)
        count = self.tiles.shape[0]
        shift = count * torch.arange(heads, dtype=torch.int32, device=self.offsets.device)
        begins = (self.offsets[:-1] + shift[:, None]).flatten()
        offsets = torch.cat([begins, self.offsets.new_tensor([heads * count])])
        tiles = self.tiles.repeat(heads, 1)
        return TileList(1, heads, self.blocks, offsets, tiles, self.gather, self.masks)

    def to(self, device: torch.device) -> TileList:
        if self.tiles.device == device:
            return self
        moved = (t.to(device) for t in (self.offsets, self.tiles, self.gather, self.masks))
        return TileList(self.batch, self.heads, self.blocks, *moved)


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int64, as int64."""
    low = words & 0xFFFFFFFF
    high = (words >> 32) & 0xFFFFFFFF
    return _popcount32(low) + _popcount32(high)


def _popcount32(x: Tensor) -> Tensor:
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) & 0xFFFFFFFF) >> 24


def pack_bits(keep: Tensor) -> Tensor:
    """Boolean [..., 64] to int64 [...], bit `c` from column `c`."""
    weights = torch.ones(BLOCK, dtype=torch.int64, device=keep.device) << torch.arange(
        BLOCK, device=keep.device
    )
    return (keep.to(torch.int64) * weights).sum(-1)


def empty(batch: int, heads: int, blocks: int, device: torch.device) -> TileList:
    """A list without tiles."""
    return TileList(
        batch,
        heads,
        blocks,
        torch.zeros(batch * heads * blocks + 1, dtype=torch.int32, device=device),
        torch.zeros(0, 3, dtype=torch.int32, device=device),
        torch.zeros(0, BLOCK, dtype=torch.int32, device=device),
        torch.zeros(0, BLOCK, dtype=torch.int64, device=device),
    )


def from_rows(
    batch: int, heads: int, blocks: int, row: Tensor, tiles: Tensor, gather: Tensor, masks: Tensor
) -> TileList:
    """A list from tiles in any order, `row[t]` being the CSR row of `tiles[t]`."""
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=batch * heads * blocks)
    offsets = torch.zeros(batch * heads * blocks + 1, dtype=torch.int32, device=row.device)
    offsets[1:] = counts.cumsum(0).to(torch.int32)
    return TileList(
        batch, heads, blocks, offsets, tiles[order].to(torch.int32).contiguous(), gather, masks
    )


def _join(
    targets: Sequence[Tensor], parts: Sequence[TileList], batch: int, heads: int, blocks: int
) -> TileList:
    """One list from several; row `r` of `parts[p]` goes to row `targets[p][r]`."""
    gathers = masks = 0
    gather_pool, mask_pool, shifts = [], [], []
    seen: dict[int, tuple[int, int]] = {}
    for part in parts:
        if id(part) not in seen:  # a list that several heads share keeps one copy of its pools
            seen[id(part)] = (gathers, masks)
            gather_pool.append(part.gather)
            mask_pool.append(part.masks)
            gathers += part.gather.shape[0]
            masks += part.masks.shape[0]
        shifts.append(seen[id(part)])
    pools = torch.cat(gather_pool), torch.cat(mask_pool)
    library = build.load().library if pools[0].device.type == "cpu" else None
    if library is not None:
        return _join_compiled(library, targets, parts, shifts, (batch, heads, blocks), pools)
    rows, tiles = [], []
    for target, part, (gather_shift, mask_shift) in zip(targets, parts, shifts, strict=True):
        rows.append(torch.repeat_interleave(target, part.offsets.long().diff()))
        kind, index, mask = part.tiles.unbind(1)
        is_gather = (kind == GATHER) | (kind == TAKEN)
        index = torch.where(is_gather, index + gather_shift, index)
        mask = torch.where(mask == FULL, mask, mask + mask_shift)
        tiles.append(torch.stack([kind, index, mask], dim=1))
    return from_rows(batch, heads, blocks, torch.cat(rows), torch.cat(tiles), *pools)


class _Part(ctypes.Structure):
    """`Part` of tile_join.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offsets", "tiles", "target")),
        *((name, ctypes.c_int64) for name in ("rows", "gather_shift", "mask_shift")),
    )


def _join_compiled(
    library: ctypes.CDLL,
    targets: Sequence[Tensor],
    parts: Sequence[TileList],
    shifts: Sequence[tuple[int, int]],
    shape: tuple[int, int, int],
    pools: tuple[Tensor, Tensor],
) -> TileList:
    batch, heads, blocks = shape
    held = [
        (p.offsets.contiguous(), p.tiles.contiguous(), t.contiguous())
        for p, t in zip(parts, targets, strict=True)
    ]
    calls = (_Part * len(parts))(
        *(
            _Part(*(t.data_ptr() for t in tensors), len(tensors[2]), *shift)
            for tensors, shift in zip(held, shifts, strict=True)
        )
    )
    offsets = torch.empty(batch * heads * blocks + 1, dtype=torch.int32)
    tiles = torch.empty(sum(len(p.tiles) for p in parts), 3, dtype=torch.int32)
    library.attnplan_join(
        calls,
        ctypes.c_int64(len(parts)),
        ctypes.c_int64(batch * heads * blocks),
        ctypes.c_void_p(offsets.data_ptr()),
        ctypes.c_void_p(tiles.data_ptr()),
    )
    return TileList(batch, heads, blocks, offsets, tiles, *pools)


def concat(parts: Sequence[TileList]) -> TileList:
    """Row by row, the tiles of all parts; the parts must not share a pair."""
    parts = [p for p in parts if p.tiles.shape[0]] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    same = torch.arange(first.rows, device=first.tiles.device)
    return _join([same] * len(parts), parts, first.batch, first.heads, first.blocks)


def stack_heads(parts: Sequence[tuple[Sequence[int], TileList]], heads: int) -> TileList:
    """One list for a layer from lists of some of its heads.

    Args:
        parts: (heads, list) with `list.heads == len(heads)`; every head of the layer once.
        heads: heads of the layer.
    """
    if len(parts) == 1 and list(parts[0][0]) == list(range(heads)):
        return parts[0][1]
    first = parts[0][1]
    device = first.tiles.device
    rows = torch.arange(first.batch * heads * first.blocks, device=device)
    rows = rows.view(first.batch, heads, first.blocks)
    targets = [rows[:, list(names)].flatten() for names, _ in parts]
    return _join(targets, [p for _, p in parts], first.batch, heads, first.blocks)


def stack_batch(parts: Sequence[TileList]) -> TileList:
    """One list for a batch from lists of batch size one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    rows = torch.arange(first.rows, device=first.tiles.device)
    targets = [rows + b * first.rows for b in range(len(parts))]
    return _join(targets, parts, len(parts), first.heads, first.blocks)


def from_tokens(tokens: Tensor, keys: int) -> TileList:
    """Gather tiles from the single keys that each query chose.

    The keys that the rows of a query block chose are united, ascending, in gather tiles; the masks
    say which row uses which.

    Args:
        tokens: int32 [batch, heads, queries, top], key positions, -1 for none, distinct per query.
        keys: length of the text.
    """
    batch, heads, queries, top = tokens.shape
    blocks = -(-queries // BLOCK)
    device = tokens.device
    if tokens.numel() == 0:
        return empty(batch, heads, blocks, device)
    rows = batch * heads * blocks
    padded = torch.nn.functional.pad(
        tokens.long(), (0, 0, 0, blocks * BLOCK - queries), value=-1
    ).view(rows, BLOCK, top)
    row, query, _ = torch.nonzero(padded >= 0, as_tuple=True)
    key = padded[padded >= 0]

    unique, inverse = torch.unique(row * keys + key, return_inverse=True)  # sorted: row, then key
    unique_row = unique // keys
    per_row = torch.bincount(unique_row, minlength=rows)
    rank = torch.arange(unique.shape[0], device=device) - (per_row.cumsum(0) - per_row)[unique_row]
    tiles_per_row = -(-per_row // BLOCK)
    first_tile = tiles_per_row.cumsum(0) - tiles_per_row
    tile = first_tile[unique_row] + rank // BLOCK
    total = int(tiles_per_row.sum())

    gather = torch.full((total, BLOCK), -1, dtype=torch.int32, device=device)
    gather[tile, rank % BLOCK] = (unique % keys).to(torch.int32)
    masks = torch.zeros(total * BLOCK, dtype=torch.int64, device=device)
    bit = torch.ones_like(key) << (rank[inverse] % BLOCK)
    masks.index_add_(0, tile[inverse] * BLOCK + query, bit)  # distinct bits: a sum is an or
    index = torch.arange(total, device=device)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    offsets[1:] = tiles_per_row.cumsum(0).to(torch.int32)
    tiles = torch.stack([torch.full_like(index, GATHER), index, index], dim=1).to(torch.int32)
    return TileList(batch, heads, blocks, offsets, tiles, gather, masks.view(total, BLOCK))
