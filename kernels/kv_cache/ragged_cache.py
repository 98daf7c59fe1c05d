"""What one layer stores of a batch whose rows have padding: every row as it would be stored alone.

Rows with the same tokens in the same places share a `LayerStore`, which holds no padding and
condenses by the length of its own text. Where a layer keeps and reads everything anyway, all rows
share one, padding included, and any mask can be followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.contracts.cache_policy import Keeper, is_whole
from attnplan.kernels.kv_cache.layer_cache import LayerStore
from attnplan.kernels.kv_cache.visible import (
    Pattern,
    Places,
    Visible,
    alike,
    count,
    fill,
    head,
    joined,
    part,
    places,
)
from attnplan.kernels.operands.inputs import Fitted
from attnplan.kernels.operands.kv_rows import StoredRows

Context = tuple[int, int | None]
"""First and last length of the texts that something is for; None for no upper limit."""


class Standing(Enum):
    """How a text stands to the context that its keepers are for."""

    WITHIN = "within"
    SHORT = "still shorter, and kept whole"
    LONG = "longer from its beginning, and kept whole"
    OUTGROWN = "grown beyond it, and condensed as before"


@dataclass
class _Rows:
    """Rows of the batch that are stored together.

    Attributes:
        rows: their numbers.
        index: the same on the device; None for the whole batch in its order.
        store: what they store.
        is_long: they began with more tokens than the context has; all is kept.
        new: which of the newest tokens they have; None for all.
        hidden: bool [rows, stored], what the newest mask hides besides; None for nothing.
    """

    rows: list[int]
    index: Tensor | None
    store: LayerStore
    is_long: bool = False
    new: Places | None = None
    hidden: Tensor | None = None


class RaggedStore:
    """The past of one layer, for all rows of a batch.

    Args:
        keepers: one per kv head.
        scale: factor before the softmax.
        fitted: calibrated data of the layer.
        context: lengths of text that the keepers are for. A shorter text is kept whole until it has
            grown to it; one that begins with more tokens is kept whole for good.
    """

    def __init__(
        self,
        keepers: tuple[Keeper, ...],
        *,
        scale: float,
        fitted: Fitted | None = None,
        context: Context = (1, None),
    ) -> None:
        self.keepers, self.scale, self.fitted, self.context = keepers, scale, fitted, context
        self.seen = 0
        """Tokens so far, padding included; rows may be fewer."""
        self._together = all(map(is_whole, keepers))
        self._patterns: tuple[Pattern, ...] | None = None
        """Which tokens each row had when they were stored; None for all."""
        self._groups: list[_Rows] = []
        self._recording = False

    @property
    def recording(self) -> bool:
        """Nothing is condensed before the next `crop`, so that it can take tokens back."""
        return self._recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self._recording = value
        for group in self._groups:
            group.store.recording = value

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows in use, by kv head, of the text that has most."""
        found = [group.store.rows for group in self._groups]
        return tuple(max(each) for each in zip(*found, strict=True))

    @property
    def stored(self) -> list[StoredRows]:
        """The rows in use, of all texts."""
        return [rows for group in self._groups for rows in group.store.stored]

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that this layer holds."""
        return sum(group.store.nbytes for group in self._groups)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return sum(len(group.rows) for group in self._groups)

    @property
    def standings(self) -> set[Standing]:
        """How the texts stand to the context."""
        if self._together or self.context == (1, None):
            return {Standing.WITHIN}
        return {self._standing(group) for group in self._groups}

    def _standing(self, group: _Rows) -> Standing:
        first, last = self.context
        length = group.store.seen
        if group.is_long:
            return Standing.LONG
        if length < first:
            return Standing.SHORT
        return Standing.WITHIN if last is None or length <= last else Standing.OUTGROWN

    def refusal(self, seen: Visible | None) -> str | None:
        """Why more tokens under this mask cannot be followed; None where they can.

        Args:
            seen: the mask of all tokens, the new ones included; None for no padding.
        """
        then = self._patterns
        if self._together or (seen is None and then is None):
            return None
        for group in self._groups:
            for row in group.rows:
                now = (0, self.seen) if seen is None else seen.before(self.seen)[row]
                old = (0, self.seen) if then is None else then[row]
                if now != old and set(places(now)) - set(places(old)):
                    return "shows tokens that were padding when they were stored"
                if now != old and not group.store.is_whole:
                    return "hides tokens of a past that is condensed already"
        return None

    def append(self, key: Tensor, value: Tensor, seen: Visible | None = None) -> None:
        """Add the keys and values of new tokens.

        Args:
            key: [batch, kv_heads, tokens, head_dim], after RoPE.
            value: [batch, kv_heads, tokens, value_dim].
            seen: the mask of all tokens, these included; None for no padding. One without
                `refusal`.
        """
        batch, _, tokens, _ = key.shape
        before = ((0, self.seen),) * batch if self._patterns is None else self._patterns
        if not self._groups:
            before = ((0,),) * batch
            self._begin(seen, batch, tokens, key.device)
        if seen is None and self._patterns is None:
            self._groups[0].store.append(key, value)
        else:
            total = self.seen + tokens
            all_shown = ((0, total),) * batch
            whole = all_shown if seen is None else seen.patterns
            now = ((0, self.seen),) * batch if seen is None else seen.before(self.seen)
            same = self.seen == 0 or now == before
            add = self._append_padded if self._together else self._append_apart
            add(key, value, seen, before if not same else None)
            self._patterns = whole if same else tuple(map(joined, before, whole))
            if self._patterns == all_shown:
                self._patterns = None
        self.seen += tokens

    def _begin(self, seen: Visible | None, batch: int, tokens: int, device: torch.device) -> None:
        every = list(range(batch))
        kinds = {(0, tokens): every} if seen is None else alike(seen.patterns, every)
        if self._together:
            kinds = {(0, tokens): every}
        first, last = self.context
        for pattern, rows in kinds.items():
            is_long = last is not None and count(pattern) > last
            keepers = (Full(),) * len(self.keepers) if is_long else self.keepers
            store = LayerStore(keepers, scale=self.scale, fitted=self.fitted, begins=first)
            store.recording = self._recording
            index = None if len(kinds) == 1 else torch.tensor(rows, device=device)
            self._groups.append(_Rows(rows, index, store, is_long))

    def _append_padded(
        self,
        key: Tensor,
        value: Tensor,
        seen: Visible | None,
        other: tuple[Pattern, ...] | None,
    ) -> None:
        """All rows into one store; `other` is the past where the mask is no longer what it was."""
        (group,) = self._groups
        shown = None if seen is None else seen.after(self.seen)
        padded = shown is not None and any(new is not None for new in shown)
        padding = ~seen.mask[:, self.seen :] if seen is not None and padded else None
        group.store.append(key, value, padding)
        group.hidden = None
        if other is not None:
            size = key.shape[0], self.seen + key.shape[2]
            nothing = torch.zeros(size, dtype=torch.bool, device=key.device)
            group.hidden = nothing if seen is None else ~seen.mask

    def _append_apart(
        self,
        key: Tensor,
        value: Tensor,
        seen: Visible | None,
        other: tuple[Pattern, ...] | None,
    ) -> None:
        """Each row's own tokens into its store; rows that no longer have the same ones part."""
        every = sum(len(group.rows) for group in self._groups)
        shown: tuple[Places | None, ...] = (None,) * every
        if seen is not None:
            shown = seen.after(self.seen)
        groups = [each for group in self._groups for each in _parted(group, shown, key.device)]
        for group in groups:
            group.hidden = None
            if group.new == ():
                continue
            group.store.append(
                part(key, group.index, group.new), part(value, group.index, group.new)
            )
            if other is not None and seen is not None:
                group.hidden = self._hidden_of(group, seen, other[group.rows[0]])
        self._groups = groups

    def _hidden_of(self, group: _Rows, seen: Visible, pattern: Pattern) -> Tensor | None:
        """Which stored rows of a group the mask hides."""
        new = range(seen.mask.shape[1] - self.seen) if group.new is None else group.new
        tokens = [*places(pattern), *(self.seen + place for place in new)]
        mask = seen.mask if group.index is None else seen.mask.index_select(0, group.index)
        hidden = ~mask[:, tokens]
        return hidden if bool(hidden.any()) else None

    def attend(self, query: Tensor) -> Tensor:
        """Attention of the newest tokens, which have been appended; see `LayerStore.attend`.

        Args:
            query: [batch, heads, tokens, head_dim].

        Returns:
            [batch, heads, tokens, value_dim]; zero for tokens of padding that are not stored.
        """
        first = self._groups[0]
        if first.index is None and first.new is None:
            return first.store.attend(query, first.hidden)
        output: Tensor | None = None
        for group, some in self._parts(query):
            found = group.store.attend(some, group.hidden)
            if output is None:
                output = found.new_zeros(*query.shape[:3], found.shape[3])
            fill(output, found, group.index, group.new)
        if output is None:  # nothing but padding
            value_dim = self._groups[0].store.stored[0].value.shape[3]
            return query.new_zeros(*query.shape[:3], value_dim)
        return output

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """One token more of a batch without padding; see `LayerStore.step`."""
        if self._patterns is not None or len(self._groups) != 1:
            return None
        (group,) = self._groups
        if group.index is not None or group.new is not None or group.hidden is not None:
            return None
        output = group.store.step(query, key, value)
        if output is not None:
            self.seen += 1
        return output

    def settle(self, query: Tensor) -> None:
        """After attention: see `LayerStore.settle`."""
        for group, some in self._parts(query):
            group.store.settle(some)

    def _parts(self, query: Tensor) -> Iterator[tuple[_Rows, Tensor]]:
        """The queries of every group that has new tokens."""
        for group in self._groups:
            if group.new != ():
                yield group, part(query, group.index, group.new)

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens back, and condense what was held back for this.

        Raises:
            ValueError: some of them are condensed already; nothing is taken back then.
        """
        left = self.seen - tokens
        own = [tokens] * len(self._groups)
        if self._patterns is not None and not self._together:
            rows = [self._patterns[group.rows[0]] for group in self._groups]
            own = [count(pattern) - count(head(pattern, left)) for pattern in rows]
        for group, some in zip(self._groups, own, strict=True):
            group.store.check_crop(some)
        for group, some in zip(self._groups, own, strict=True):
            group.store.crop(some)
        if self._patterns is not None:
            self._patterns = tuple(head(pattern, left) for pattern in self._patterns)
        self.seen = left

    def select(self, index: Tensor) -> None:
        """Go on with these rows of the batch; one may occur often.

        Args:
            index: int64 [rows].
        """
        if self._patterns is None:
            (group,) = self._groups
            group.store.select(index)
            group.rows = list(range(len(index)))
            return
        chosen = index.tolist()
        self._patterns = tuple(self._patterns[row] for row in chosen)
        groups = []
        for group in self._groups:
            place = {row: number for number, row in enumerate(group.rows)}
            rows = [new for new, old in enumerate(chosen) if old in place]
            if rows:
                own = torch.tensor([place[chosen[row]] for row in rows])
                group.store.select(own)
                groups.append(_Rows(rows, None, group.store, group.is_long))
        for group in groups:
            if len(groups) > 1:
                group.index = torch.tensor(group.rows, device=group.store.stored[0].key.device)
        self._groups = groups

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [batch, kv_heads, tokens, ...].

        Raises:
            ValueError: some of them are not stored.
        """
        padded = self._patterns is not None and not self._together
        if padded or not all(group.store.is_whole for group in self._groups):
            raise ValueError("padding was left out" if padded else "its past is condensed")
        return self._groups[0].store.whole()


def _parted(
    group: _Rows, shown: tuple[Places | None, ...], device: torch.device
) -> Iterator[_Rows]:
    """A group, or groups of those of its rows that have the same new tokens."""
    kinds = alike(shown, group.rows)
    if len(kinds) == 1:
        group.new = shown[group.rows[0]]
        yield group
        return
    place = {row: number for number, row in enumerate(group.rows)}
    for new, rows in kinds.items():
        own = torch.tensor([place[row] for row in rows], device=device)
        index = torch.tensor(rows, device=device)
        yield _Rows(rows, index, group.store.taken(own), group.is_long, new)
