"""What one layer stores while it decodes: for every kv head the rows that its keeper keeps.

Kv heads with the same keeper share tensors, which are allocated ahead: a new token is written in
place. The past is condensed after attention, whenever it has outgrown its limit by the
keeper's slack.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnplan.kernels.contracts.cache_policy import SLACK, Keeper, Past
from attnplan.kernels.engines.dispatch_decode import decode, one_token
from attnplan.kernels.operands.inputs import Fitted
from attnplan.kernels.operands.kv_rows import PAGE, StoredRows, bounds_of

if TYPE_CHECKING:
    from attnplan.kernels.engines.cpu.decode import OneToken

QUANTUM = 64
"""Rows that an allocation is rounded up to."""
OBSERVED = 256
"""Newest queries of a prefill whose attention is looked at."""
HALF_LIFE = 128
"""Queries after which their attention counts half."""
SCORES = 1 << 24
"""Attention weights that observing holds at once."""


def capacity(keeper: Keeper, rows: int) -> int:
    """Rows that are allocated where `rows` are in use, or would be without condensing."""
    rounded = -(-(rows + 1) // QUANTUM) * QUANTUM
    return rounded if keeper.limit is None else min(rounded, keeper.limit + keeper.slack)


def row_bytes(keeper: Keeper, head_dim: int, value_dim: int, element_size: int) -> int:
    """Bytes of one stored row."""
    extra = 4 * keeper.merges + 4 * keeper.observes
    extra += 2 * head_dim * element_size // PAGE * keeper.reads
    return (head_dim + value_dim) * element_size + extra


@dataclass
class _Group:
    """Kv heads that share a keeper.

    Attributes:
        bias: None as long as all rows are exact keys of no padding.
        attention: None unless the keeper observes; averages over the queries that saw a row.
        bounds: None unless the keeper reads a part; see `Keeper.choose`.
        first: int64 [batch], where texts begin; None for 0.
        length: rows in use.
        settled: rows that the last condensing left.
        observed: queries whose attention was looked at.
    """

    keeper: Keeper
    kv_heads: tuple[int, ...]
    scale: float
    fitted: Fitted
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)
    bias: Tensor | None = None
    attention: Tensor | None = None
    bounds: Tensor | None = None
    first: Tensor | None = None
    length: int = 0
    settled: int = 0
    observed: int = 0

    @cached_property
    def heads(self) -> slice | list[int]:
        """The kv heads as an index that copies nothing, where possible."""
        first, last = self.kv_heads[0], self.kv_heads[-1]
        whole = list(range(first, last + 1)) == list(self.kv_heads)
        return slice(first, last + 1) if whole else list(self.kv_heads)

    @property
    def is_due(self) -> bool:
        limit = self.keeper.limit
        return limit is not None and self.length >= limit + self.keeper.slack

    @property
    def free(self) -> int:
        """Rows that can be added before something moves."""
        room, limit = self.key.shape[2] - self.length, self.keeper.limit
        return room if limit is None else max(min(room, limit + self.keeper.slack - self.length), 0)

    @torch.inference_mode(False)  # what is stored may be written to in other modes
    def clear(self) -> None:
        """Let what is told of the rows to come be what is true of a new exact key."""
        for tensor in (self.bias, self.attention):
            if tensor is not None:
                tensor[:, :, self.length :] = 0

    def append(self, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        """Add rows of the whole layer after `reserve`; `padding` is true where a row is none."""
        new = key.shape[2]
        rows = slice(self.length, self.length + new)
        if key.shape[1] != len(self.kv_heads):
            key, value = key[:, self.heads], value[:, self.heads]
        self.key.narrow(2, self.length, new).copy_(key)
        self.value.narrow(2, self.length, new).copy_(value)
        if self.bias is not None:
            self.bias[:, :, rows] = 0
            if padding is not None:
                self.bias[:, :, rows].masked_fill_(padding[:, None], float("-inf"))
        if self.attention is not None:
            self.attention[:, :, rows] = 0
        if self.bounds is not None:
            if padding is not None and self.length == 0:
                self.first = (~padding).long().argmax(-1)
            if new == 1 and self.length % PAGE:
                one, (high, low) = self.key[:, :, self.length], self._page_bounds()
                torch.maximum(high, one, out=high)
                torch.minimum(low, one, out=low)
            else:
                self._bound(rows.stop)
        self.length += new

    def _page_bounds(self) -> tuple[Tensor, ...]:
        """Of the page that the next row belongs to, as views."""
        assert self.bounds is not None
        return self.bounds[:, :, self.length // PAGE].chunk(2, -1)

    def _bound(self, last: int) -> None:
        """Find the bounds of the pages of rows `length` to `last`."""
        assert self.bounds is not None
        page = self.length // PAGE
        if last > page * PAGE:
            found = bounds_of(self.key[:, :, page * PAGE : last])
            self.bounds[:, :, page : page + found.shape[2]] = found

    def take_back(self, tokens: int) -> None:
        """Forget the newest rows."""
        self.length -= tokens
        if self.bounds is not None:
            self._bound(self.length)

    def reserve(self, key: Tensor, value: Tensor, padded: bool) -> None:
        """Make room for the rows of `key`, in larger tensors where the present ones are full."""
        batch, heads, needed = key.shape[0], len(self.kv_heads), self.length + key.shape[2]
        with torch.inference_mode(False):  # what is stored may be written to in other modes
            if self.length == 0:
                room = self._room(needed)
                self.key = key.new_empty(batch, heads, room, key.shape[3])
                self.value = value.new_empty(batch, heads, room, value.shape[3])
                self.bias = self.attention = self.bounds = self.first = None
                if self.keeper.observes:
                    self.attention = key.new_zeros(batch, heads, room, dtype=torch.float32)
                if self.keeper.reads:
                    self.bounds = key.new_empty(batch, heads, room // PAGE, 2 * key.shape[3])
            elif needed > self.key.shape[2]:
                self._resize(self._room(needed))
            if self.bias is None and (padded or self.keeper.merges):
                size, device = self.key.shape[:3], key.device
                self.bias = torch.zeros(size, dtype=torch.float32, device=device)

    def _room(self, rows: int) -> int:
        """Rows to allocate for `rows`: more than the keeper's where condensing has to wait."""
        room = capacity(self.keeper, rows)
        return room if room >= rows else -(-rows // QUANTUM) * QUANTUM

    def _resize(self, room: int) -> None:
        for name in ("key", "value", "bias", "attention", "bounds"):
            old = getattr(self, name)
            if old is not None:
                unit = PAGE if name == "bounds" else 1
                new = old.new_empty(*old.shape[:2], room // unit, *old.shape[3:])
                used = slice(-(-self.length // unit))
                new[:, :, used] = old[:, :, used]
                setattr(self, name, new)

    def seen(self, query: Tensor, group: int, newer: int, chooses: bool) -> StoredRows:
        """The rows that one token reads.

        Args:
            query: [batch, heads, 1, head_dim] of the whole layer.
            group: heads per kv head.
            newer: tokens after it.
            chooses: a keeper that reads a part does so.
        """
        length, pages = self.length - newer, None
        if self.bounds is not None and chooses:
            own = query[:, :, 0].unflatten(1, (-1, group))[:, self.heads]
            pages = self.keeper.choose(self.bounds, own, self.scale, length, self.first)
        if pages is not None:
            length += PAGE * (pages.shape[2] - -(-length // PAGE))
        return StoredRows(self.kv_heads, self.key, self.value, self.bias, length, pages)

    def observe(self, query: Tensor, group: int) -> None:
        """Look at what queries pay to the rows.

        Args:
            query: [batch, heads, n, head_dim] of the whole layer, the last n tokens.
            group: heads per kv head.
        """
        if self.attention is None:
            return
        key, length = self.key[:, :, : self.length], self.length
        query = query.unflatten(1, (-1, group))[:, self.heads].float() * self.scale
        count = query.shape[3]
        paid = torch.zeros_like(self.attention[:, :, :length])
        decay = 0.5 ** (1 / HALF_LIFE)
        wide, old = key.float().mT, length - count
        newer = torch.ones(count, count, dtype=torch.bool, device=key.device).triu(1)
        step = max(1, SCORES // (query[..., 0, 0].numel() * length))
        for first in range(0, count, step):
            some = slice(first, min(first + step, count))
            logits = query[:, :, :, some].flatten(2, 3) @ wide  # [batch, kv_heads, queries, rows]
            if self.bias is not None:
                logits += self.bias[:, :, None, :length]
            logits[..., old:].masked_fill_(newer[some].repeat(group, 1), float("-inf"))
            age = torch.arange(count - 1 - some.start, count - 1 - some.stop, -1, device=key.device)
            weight = (decay ** age.float()).repeat(group) / group
            seen = logits.softmax(-1)
            if self.bias is not None:
                seen.nan_to_num_(0.0)  # a query of padding sees nothing
            paid += weight @ seen
        before, after = (
            self._queries_that_saw(n, length - c)
            for n, c in ((self.observed, count), (self.observed + count, 0))
        )
        before = torch.nn.functional.pad(before, (0, length - len(before)))
        known = self.attention[:, :, :length] * before * decay**count
        self.attention[:, :, :length] = (known + paid) / after
        self.observed += count

    def _queries_that_saw(self, observed: int, rows: int) -> Tensor:
        """How many of the observed queries could see each of the last rows, decayed."""
        age = torch.arange(max(rows, 0), 0, -1, device=self.key.device)
        decay = 0.5 ** (1 / HALF_LIFE)
        return (1 - decay ** age.clamp(max=observed).float()) / (1 - decay)

    @torch.inference_mode(False)  # what is stored may be written to in other modes
    def condense(self) -> None:
        """Keep `limit` rows."""
        assert self.keeper.limit is not None
        length = self.length
        rows = (self.key[:, :, :length], self.value[:, :, :length])
        zero = torch.zeros(rows[0].shape[:3], dtype=torch.float32, device=rows[0].device)
        bias = zero if self.bias is None else self.bias[:, :, :length]
        paid = zero if self.attention is None else self.attention[:, :, :length]
        past = Past(*rows, bias, paid, self.kv_heads, self.scale, self.fitted)
        kept = self.keeper.condense(past)
        self.length = self.settled = kept.rows
        room = self.keeper.limit + self.keeper.slack
        if self.key.shape[2] != room:
            for name in ("key", "value", "bias", "attention"):
                old = getattr(self, name)
                if old is not None:
                    setattr(self, name, old.new_empty(*old.shape[:2], room, *old.shape[3:]))
        for name in ("key", "value", "bias", "attention"):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor[:, :, : kept.rows] = getattr(kept, name)

    def hiding(self, hidden: Tensor) -> StoredRows:
        """All rows of a past that is whole, but for those that `hidden` [batch, rows] names."""
        bias = self.key.new_zeros(self.key.shape[:3], dtype=torch.float32)
        bias[:, :, : self.length].masked_fill_(hidden[:, None], float("-inf"))
        return StoredRows(self.kv_heads, self.key, self.value, bias, self.length)

    @torch.inference_mode(False)
    def select(self, index: Tensor) -> None:
        """Go on with these rows of the batch."""
        for name, tensor in self.tensors():
            setattr(self, name, tensor.index_select(0, index.to(tensor.device)))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("key", "value", "bias", "attention", "bounds", "first"):
            tensor = getattr(self, name, None)
            if tensor is not None:
                yield name, tensor


class LayerStore:
    """The past of one layer.

    Args:
        keepers: one per kv head.
        scale: factor before the softmax.
        fitted: calibrated data of the layer.
        begins: tokens of a text before which all is kept and all is read.
    """

    def __init__(
        self,
        keepers: tuple[Keeper, ...],
        *,
        scale: float,
        fitted: Fitted | None = None,
        begins: int = 1,
    ) -> None:
        self.keepers = keepers
        self.scale = scale
        self.begins = begins
        self.seen = 0
        """Tokens so far; rows may be fewer."""
        self.recording = False
        """Nothing is condensed before the next `crop`, so that it can take tokens back."""
        heads: dict[Keeper, list[int]] = {}
        for head, keeper in enumerate(keepers):
            heads.setdefault(keeper, []).append(head)
        self._groups = [
            _Group(keeper, tuple(names), scale, fitted or {}) for keeper, names in heads.items()
        ]
        self._reads = any(group.keeper.reads for group in self._groups)
        self._observes = any(group.keeper.observes for group in self._groups)
        self._queries: list[Tensor] = []
        self._waiting = 0
        self._steps: OneToken | None = None
        """Calls of single tokens, as long as nothing moves."""
        self._free = 0
        """How many of them there is room for before something moves."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows in use, by kv head."""
        found = {head: group.length for group in self._groups for head in group.kv_heads}
        return tuple(found[head] for head in range(len(self.keepers)))

    @property
    def stored(self) -> list[StoredRows]:
        """The rows in use."""
        return [StoredRows(g.kv_heads, g.key, g.value, g.bias, g.length) for g in self._groups]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that this layer holds."""
        tensors = [t for group in self._groups for _, t in group.tensors()] + self._queries
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def append(self, key: Tensor, value: Tensor, padding: Tensor | None = None) -> None:
        """Add the keys and values of new tokens.

        Args:
            key: [batch, kv_heads, tokens, head_dim], after RoPE.
            value: [batch, kv_heads, tokens, value_dim].
            padding: bool [batch, tokens], true where a token is none; None for no padding.
        """
        self._steps = None
        for group in self._groups:  # first, because memory may run out
            group.reserve(key, value, padding is not None)
        for group in self._groups:
            group.append(key, value, padding)
        self.seen += key.shape[2]

    @property
    def is_whole(self) -> bool:
        """Nothing has been condensed: there is a row for every token."""
        return not any(group.settled for group in self._groups)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [batch, kv_heads, tokens, ...], where `is_whole`."""
        order = [head for group in self._groups for head in group.kv_heads]
        index = torch.tensor([order.index(head) for head in range(len(order))])
        found = [(g.key[:, :, : g.length], g.value[:, :, : g.length]) for g in self._groups]
        key, value = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        index = index.to(key.device)
        return key.index_select(1, index), value.index_select(1, index)

    def attend(self, query: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Attention of the newest tokens, which have been appended, over all that is stored.

        Args:
            query: [batch, heads, tokens, head_dim].
            hidden: bool [batch, rows], rows that are not to be read, in place of all that was known
                as padding; only where `is_whole`.

        Returns:
            [batch, heads, tokens, value_dim]. Each token reads what it would read alone, if they
            are few (`SLACK`); many tokens are a prompt, and read everything.
        """
        count = query.shape[2]
        if hidden is not None:
            rows = [group.hiding(hidden) for group in self._groups]
            return decode(query, rows, scale=self.scale)[0]
        if count > SLACK or self.seen < self.begins or not self._reads:
            return decode(query, self.stored, scale=self.scale)[0]
        size = query.shape[1] // len(self.keepers)
        found = []
        for number, token in enumerate(query.split(1, 2)):
            newer = count - 1 - number
            chooses = self.seen - newer >= self.begins
            seen = [group.seen(token, size, newer, chooses) for group in self._groups]
            found.append(decode(token, seen, scale=self.scale)[0])
        return found[0] if count == 1 else torch.cat(found, 2)

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """`append`, `attend` and `settle` of one token of every text, where nothing has to move.

        Args:
            query: [batch, heads, 1, head_dim].
            key: [batch, kv_heads, 1, head_dim], after RoPE.
            value: [batch, kv_heads, 1, value_dim].

        Returns:
            As `attend`; None where it has to be done in parts: nothing has changed then.
        """
        if query.shape[2] != 1:
            return None
        steps = self._steps
        if steps is None:
            steps = self._steps = self._prepared(query, key, value)
        if steps is None or self._free == 0 or not steps.fits(query, key, value):
            return None
        output = steps(query, key, value, [group.length + 1 for group in self._groups])
        for group in self._groups:
            group.length += 1
        self.seen += 1
        self._free -= 1
        self._waiting += 1
        if self._observes:
            self._queries.append(query.detach().clone())
        if (self._free == 0 or self._waiting >= SLACK) and not self.recording:
            self._condense()
        return output

    def _prepared(self, query: Tensor, key: Tensor, value: Tensor) -> OneToken | None:
        """Calls of single tokens over the rows as they lie now."""
        if self._reads or self.seen < max(self.begins, 1):
            return None
        self._free = min(group.free for group in self._groups)
        if self._free == 0:
            return None
        for group in self._groups:
            group.clear()
        stored = [replace(rows, length=rows.length + 1) for rows in self.stored]
        return one_token(query, key, value, stored, scale=self.scale)

    def settle(self, query: Tensor) -> None:
        """After attention: remember who was attended to, and condense what has become too long.

        Args:
            query: [batch, heads, tokens, head_dim], of the tokens that were appended last.
        """
        if self._observes:
            self._queries.append(query[:, :, -OBSERVED:].detach().clone())
        self._waiting += query.shape[2]
        if not self.recording:
            self._condense()

    def _condense(self) -> None:
        due = [group for group in self._groups if group.is_due]
        if due or self._waiting >= SLACK:
            if self._queries:
                query = torch.cat(self._queries, 2)[:, :, -OBSERVED:]
                for group in self._groups:
                    group.observe(query, query.shape[1] // len(self.keepers))
                self._queries = []
            self._waiting = 0
        if self.seen >= self.begins:
            for group in due:
                self._steps = None
                group.condense()

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens back, and condense what was held back for this.

        Raises:
            ValueError: some of them are condensed already.
        """
        self.check_crop(tokens)
        self._steps = None
        self._forget_queries(tokens)
        for group in self._groups:
            group.take_back(tokens)
        self.seen -= tokens
        self._waiting = max(self._waiting - tokens, 0)
        self._condense()

    def check_crop(self, tokens: int) -> None:
        """Raises ValueError where `crop` would."""
        for group in self._groups:
            known = group.length - group.settled
            if tokens > known:
                raise ValueError(
                    f"cannot take back {tokens} tokens: all but the last {known} are condensed "
                    "for good; call activate_past_recording() before generating what may be undone"
                )

    def _forget_queries(self, left: int) -> None:
        while left and self._queries:
            last = self._queries.pop()
            if last.shape[2] > left:
                self._queries.append(last[:, :, : last.shape[2] - left])
            left -= min(left, last.shape[2])

    def select(self, index: Tensor) -> None:
        """Go on with these rows of the batch; one may occur often.

        Args:
            index: int64 [rows].
        """
        self._steps = None
        for group in self._groups:
            group.select(index)
        with torch.inference_mode(False):
            self._queries = [q.index_select(0, index.to(q.device)) for q in self._queries]

    def taken(self, index: Tensor) -> LayerStore:
        """A store of these rows of the batch alone; this one stays as it is."""
        other = copy.copy(self)
        other._groups = [copy.copy(group) for group in self._groups]
        other._queries = list(self._queries)
        other.select(index)
        return other
