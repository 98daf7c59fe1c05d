"""Attention over tile lists on a CPU, at a cost proportional to the tiles.

With a C++ compiler the work is done by `attention.cpp`; without one, by torch, for the same result:
rows with similar numbers of tiles together, their keys gathered, masks from the bit words.
`describe` says which of the two runs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attnplan.kernels.native import build
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import BLOCK, FULL, GATHER, SLOTS, TAKEN, TileList

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ERRORS = {
    1: "the tile list has a tile of unknown kind, or keys that leave slots without members",
    2: "a gather tile names a row outside `gather`",
    3: "a tile names a row outside `masks`",
    4: "a tile names slots that its head does not have",
    5: "out of memory",
}
TORCH_SCORES = 1 << 22  # scores that the torch path holds at a time


def describe() -> str:
    """Which path attention on the CPU takes here, and why; one line."""
    compiled = build.load()
    path = "torch (slower)" if compiled.library is None else "C++"
    return f"{path}: {compiled.description}"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    kv_head: tuple[int, ...],
    tiles: TileList,
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs that `tiles` lists.

    Arithmetic is float32, whatever the dtype of the inputs.

    Args:
        query: [batch, heads, queries, head_dim], float32, bfloat16 or float16, any strides.
        key: [batch, kv_heads, keys, head_dim].
        value: [batch, kv_heads, keys, value_dim].
        scale: factor before the softmax.
        kv_head: for each head of `query`, the kv head it reads.
        tiles: what each block of 64 query rows reads.
        slots: pseudo-keys that slot tiles read.

    Returns:
        Output [batch, heads, queries, value_dim] in the dtype of `query`, laid out as
        [batch, queries, heads, value_dim], and float32 log-mass [batch, heads, queries] (natural
        logarithm). A row that reads nothing is zero, with log-mass -inf.

    Raises:
        ValueError: tensors, heads or tiles do not fit together.
    """
    _check(query, key, value, kv_head, tiles)
    library = build.load().library
    if library is None:
        return attend_torch(
            query, key, value, scale=scale, kv_head=kv_head, tiles=tiles, slots=slots
        )
    return _attend_compiled(library, query, key, value, scale, kv_head, tiles, slots)


def _check(
    query: Tensor, key: Tensor, value: Tensor, kv_head: tuple[int, ...], tiles: TileList
) -> None:
    batch, heads, queries, head_dim = query.shape
    if query.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"query is {query.dtype}; the cpu engine takes {known}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, query is {query.dtype}")
        if tensor.shape[:3] != (batch, *key.shape[1:3]):
            raise ValueError(f"{name} is {list(tensor.shape)}, key is {list(key.shape)}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; the cpu engine takes CPU tensors")
    if key.shape[3] != head_dim:
        raise ValueError(f"query has head_dim {head_dim}, key has {key.shape[3]}")
    if len(kv_head) != heads or not all(0 <= h < key.shape[1] for h in kv_head):
        raise ValueError(f"kv_head {kv_head} does not name one of {key.shape[1]} kv heads per head")
    if (tiles.batch, tiles.heads, tiles.blocks) != (batch, heads, -(-queries // BLOCK)):
        raise ValueError(
            f"the tile list is for batch {tiles.batch}, {tiles.heads} heads, {tiles.blocks} "
            f"blocks; the query has batch {batch}, {heads} heads, {queries} rows"
        )


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class _Strided(ctypes.Structure):
    _fields_ = (*_fields(ctypes.c_void_p, "data"), *_fields(ctypes.c_int64, "batch head row"))


class _Call(ctypes.Structure):
    """`Call` of attention.cpp, field by field."""

    _fields_ = (
        *_fields(ctypes.c_int64, "dtype batch heads kv_heads queries keys head_dim value_dim"),
        *_fields(ctypes.c_int64, "blocks threads"),
        *_fields(ctypes.c_double, "scale"),
        *_fields(_Strided, "query key value output"),
        *_fields(ctypes.c_void_p, "lse kv_head offsets tiles gather masks"),
        *_fields(ctypes.c_int64, "gathers mask_count slots slot_heads"),
        *_fields(ctypes.c_void_p, "slot_key slot_value slot_log_weight slot_weight slot_head"),
        *_fields(ctypes.c_void_p, "slot_member slot_share"),
    )


def _strided(tensor: Tensor) -> _Strided:
    return _Strided(tensor.data_ptr(), *tensor.stride()[:3])


def _attend_compiled(
    library: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    kv_head: tuple[int, ...],
    tiles: TileList,
    slots: Slots | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = query.shape
    value_dim = value.shape[3]
    query, key, value = (
        t.detach() if t.stride(3) == 1 else t.detach().contiguous() for t in (query, key, value)
    )
    output = query.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, queries)
    kv = torch.tensor(kv_head, dtype=torch.int32)
    lists = [t.contiguous() for t in (tiles.offsets, tiles.tiles, tiles.gather, tiles.masks)]
    far: list[Tensor] = []
    if slots is not None:
        floats = (slots.key, slots.value, slots.log_weight, slots.weight)
        far = [t.detach().float().contiguous() for t in floats]
        far.append(slots.head.to(torch.int32).contiguous())
        if len(slots.member):
            far.append(slots.member.to(torch.int32).contiguous())
            far.append(slots.share.detach().float().contiguous())
    call = _Call(
        *(DTYPES[query.dtype], batch, heads, key.shape[1], queries, key.shape[2]),
        *(head_dim, value_dim, tiles.blocks, torch.get_num_threads(), scale),
        *(_strided(t) for t in (query, key, value, output)),
        *(t.data_ptr() for t in (lse, kv, *lists)),
        *(tiles.gather.shape[0], tiles.masks.shape[0]),
        *((far[0].shape[2], far[0].shape[1]) if far else (0, 0)),
        *(t.data_ptr() for t in far),
    )
    status = library.attnplan_attend(ctypes.byref(call))
    if status == 5:
        raise MemoryError(ERRORS[status])
    if status:
        raise ValueError(ERRORS[status])
    return output, lse


def attend_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    kv_head: tuple[int, ...],
    tiles: TileList,
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` in torch alone, for machines without a C++ compiler."""
    batch, heads, queries, head_dim = query.shape
    blocks, value_dim = tiles.blocks, value.shape[3]
    pad = (0, 0, 0, blocks * BLOCK - queries)
    rows = torch.nn.functional.pad(query, pad).float() * scale
    rows = rows.reshape(tiles.rows, BLOCK, head_dim)
    output = torch.zeros(tiles.rows, BLOCK, value_dim)
    lse = torch.full((tiles.rows, BLOCK), float("-inf"))
    pool = _KeyPool(key, value, kv_head, tiles, slots)
    lengths = tiles.offsets.long().diff()
    order = lengths.argsort(descending=True, stable=True).tolist()
    first = 0
    while first < len(order) and lengths[order[first]] > 0:
        longest = int(lengths[order[first]])
        count = max(1, TORCH_SCORES // (BLOCK * BLOCK * longest))
        chunk = torch.tensor([r for r in order[first : first + count] if lengths[r] > 0])
        output[chunk], lse[chunk] = _softmax(rows[chunk], *pool.take(chunk, longest))
        first += count
    output = output.view(batch, heads, -1, value_dim)[:, :, :queries].to(query.dtype)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, lse.view(batch, heads, -1)[:, :, :queries].contiguous()


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, weight: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """Signed-weight softmax of [rows, 64] queries over [rows, columns] keys of their own."""
    logits = torch.baddbmm(bias[:, None], query, key.mT).masked_fill_(~keep, float("-inf"))
    shift = logits.amax(-1, keepdim=True)
    shift = torch.where(shift == float("-inf"), 0, shift)
    exponential = logits.sub_(shift).exp_()
    mass = (exponential @ weight[..., None])[..., 0]
    output = exponential @ value / torch.where(mass == 0, 1, mass)[..., None]
    return output, mass.log() + shift[..., 0]


class _KeyPool:
    """Keys and slots of every CSR row, by tile."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        kv_head: tuple[int, ...],
        tiles: TileList,
        slots: Slots | None,
    ) -> None:
        self.key, self.value, self.tiles, self.slots = key, value, tiles, slots
        self.kv_head = torch.tensor(kv_head)

    def take(self, rows: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Key, value, log-weight, weight and mask of the columns that some rows read."""
        tiles, columns, keys = self.tiles, torch.arange(BLOCK), self.key.shape[2]
        at = tiles.offsets[rows].long()[:, None] + torch.arange(longest)
        listed = at < tiles.offsets[rows + 1][:, None]
        kind, index, mask = tiles.tiles[at.clamp(max=tiles.tiles.shape[0] - 1)].long().unbind(-1)

        position = index[..., None] * BLOCK + columns
        if tiles.gather.shape[0]:
            gathers = (kind == GATHER) | (kind == TAKEN)
            gathered = tiles.gather[torch.where(gathers, index, 0)].long()
            position = torch.where(gathers[..., None], gathered, position)
        is_slot = (kind == SLOTS)[..., None].expand(position.shape)
        valid = listed[..., None] & (is_slot | ((position >= 0) & (position < keys)))
        if tiles.masks.shape[0]:
            words = torch.where((mask == FULL)[..., None], -1, tiles.masks[mask.clamp(min=0)])
        else:
            words = torch.full((*mask.shape, BLOCK), -1)
        keep = (words[..., None] >> columns & 1).bool() & valid[:, :, None]
        keep = keep.transpose(1, 2).flatten(2)  # [rows, 64, tiles * 64]

        position, is_slot = position.flatten(1), is_slot.flatten(1)
        batch = rows[:, None] // tiles.blocks // tiles.heads
        head = rows[:, None] // tiles.blocks % tiles.heads
        where = position.clamp(0, keys - 1)
        key = self.key[batch, self.kv_head[head], where].float()
        value = self.value[batch, self.kv_head[head], where].float()
        bias, weight = torch.zeros(where.shape), torch.ones(where.shape)
        if self.slots is not None:
            s = self.slots
            slot_row = s.head.long()[head].clamp(min=0)
            at_slot = (batch, slot_row, position.clamp(0, s.key.shape[2] - 1))
            key = torch.where(is_slot[..., None], s.key[at_slot].float(), key)
            value = torch.where(is_slot[..., None], s.value[at_slot].float(), value)
            bias = torch.where(is_slot, s.log_weight[at_slot].float(), bias)
            weight = torch.where(is_slot, s.weight[at_slot].float(), weight)
        value = torch.where(valid.flatten(1)[..., None], value, 0)
        taken = (kind == TAKEN)[..., None].expand(keep.shape[0], -1, BLOCK).flatten(1)
        if self.slots is None or not bool(taken.any()):
            return key, value, bias, weight, keep
        row, own, share = self._left(batch, head, where, taken)
        return (
            torch.cat([key, self.slots.key[batch, row, own].float()], 1),
            torch.cat([value, -share[..., None] * value], 1),
            torch.cat([bias, self.slots.log_weight[batch, row, own].float()], 1),
            torch.cat([weight, -share], 1),
            torch.cat([keep, keep & taken[:, None]], 2),
        )

    def _left(
        self, batch: Tensor, head: Tensor, keys: Tensor, taken: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row of the slots, slot and share of keys; a share of 0 where a key leaves no slot."""
        slots = self.slots
        assert slots is not None
        row = slots.head.long()[head].clamp(min=0)
        slot = slots.member[batch, row, keys].long()
        share = torch.where(taken & (slot >= 0), slots.share[batch, row, keys].float(), 0.0)
        return row, slot.clamp(min=0), share
