"""Far fields as sums of features: linear attention over the chunks before the window.

Where a kernel is a product of features, e^{s q.k} ~ <f(q), f(k)>, the far keys of a query come down
to one state, which grows by a chunk at a time:

    n = f(q) . sum_j f(k_j) v_j^T        z = f(q) . sum_j f(k_j)

Few features need short vectors, so both sides are centred and balanced first, which is exact:

    s q.k = y.x + b + m     x = sqrt(s) (k - k_mean) key_map      b = s q_mean.(k - k_mean)
                            y = sqrt(s) (q - q_mean) query_map    m = s q.k_mean

e^b weighs a key, e^m shifts a row, and only y.x is left to the features. The state of a chunk is
kept below its largest weight, and running sums below the largest so far. A row whose mass is
negative, or lost in the rounding of terms that cancel, takes its near field alone.

Keys that a query reads by themselves leave its state: <f(q), f(k_j)> (1, v_j) is subtracted, as in
Chen et al., Scatterbrain, https://arxiv.org/abs/2110.15343, section 4.1.

Sources: Katharopoulos et al., https://arxiv.org/abs/2006.16236, sections 3.2 and 3.3;
`balance` for the coordinates. Unlike in linear attention, a chunk of keys before the query is
near, and mass and values add up with the exact ones of the near field.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, log2
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attnplan.kernels.compressors._chunked import ChunkedFarField
from attnplan.kernels.contracts.compressor import Kept
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.numerics import balance
from attnplan.kernels.operands.indexing import heads_of
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.shape import AttentionShape, Cost
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.operands.token_tiles import pack_tokens

if TYPE_CHECKING:
    from attnplan.kernels.engines.gpu.feature_sums import Exponents

Side = Literal["query", "key"]
LONG = 2048
"""Keys from which more than one setting is worth trying."""
NUMBERS = 1 << 23  # features that are held at a time
CACHED = 1 << 19  # the same on a CPU, whose caches hold them
CANCELLED = 1000  # a mass below so many rounding errors of its terms is not relied on
EMPTY = -1e30  # log-weight of a chunk without keys; finite, so that differences are numbers


@dataclass(frozen=True)
class Logarithms:
    """Logarithms of features that are linear in a row y or x, but for one number per row.

        lift(y)_f = y.query_f + query_constant_f - r(y)

    and the same of x and key.

    Attributes:
        query, key: [heads or 1, features, head_dim].
        query_constant, key_constant: [heads or 1, features].
        squares: r(y) = |y|^2 / 2 and r(x) = |x|^2 / 2. Otherwise r(x) = 0, and r(y) is such that
            the features of a query add up to 1.
    """

    query: Tensor
    key: Tensor
    query_constant: Tensor
    key_constant: Tensor
    squares: bool

    def lift(self, rows: Tensor, side: Side) -> Tensor:
        """Logarithms [batch, heads, rows, features] of rows [batch, heads, rows, head_dim]."""
        if side == "query":
            vectors, constant = self.query, self.query_constant
        else:
            vectors, constant = self.key, self.key_constant
        made = rows @ vectors.mT + constant[:, None]
        if self.squares:
            return made - rows.square().sum(-1, keepdim=True) / 2
        return torch.log_softmax(made, -1) if side == "query" else made


@dataclass(frozen=True)
class FeatureMap(ChunkedFarField):
    """A far field whose kernel is a product of features of the query and of the key.

    Subclasses say what the features are. All chunks that a query block reads are one state.
    """

    family: ClassVar[str] = "kernel"
    predictor: ClassVar[str] = "random_feature_exponent"
    least_keys: ClassVar[int] = 0
    """Shorter texts are not worth trying."""
    tried_beside_keys: ClassVar[tuple[Mapping[str, int], ...]] = ()
    """Settings worth trying with a selector that picks keys of a cluster."""
    settings: ClassVar[tuple[Mapping[str, int], ...]] = ({},)
    """Knobs worth trying; all but the first for long texts alone."""
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = ()
    """Knobs worth trying for long texts with the shortest window alone."""
    logarithmic: ClassVar[bool] = False
    """`lift` answers with logarithms, which `logarithms` describes; the features are positive."""

    chunk: int = 256

    @classmethod
    def choices(cls, shape: AttentionShape) -> Iterator[Self]:
        if shape.keys >= max(3 * cls.chunk, cls.least_keys):
            tried = cls.settings if shape.keys >= LONG else cls.settings[:1]
            yield from (cls(**knobs) for knobs in tried)

    @classmethod
    def cheap_choices(cls, shape: AttentionShape) -> Iterator[Self]:
        if shape.keys >= LONG:
            yield from (cls(**knobs) for knobs in cls.cheap)

    @classmethod
    def choices_behind(cls, near: Selector, shape: AttentionShape) -> Iterator[Self]:
        yield from super().choices_behind(near, shape)
        if near.picks_keys and near.family == "clustered":
            yield from (cls(**knobs) for knobs in cls.tried_beside_keys)

    @property
    def leaves_out(self) -> bool:
        return True

    def left_out_macs(self, shape: AttentionShape, picked: float) -> float:
        return picked * (self.count(shape.head_dim) + shape.head_dim)

    @abstractmethod
    def lift(self, rows: Tensor, side: Side, inputs: Inputs) -> Tensor:
        """Features [batch, heads, ..., features] of rows y or x, the strongest direction first.

        Args:
            rows: [batch, heads, ..., at least directions], of the heads of `inputs`.
            side: whose rows they are.
            inputs: the call.
        """

    def logarithms(self, inputs: Inputs) -> Logarithms:
        """What `lift` answers with, where that is logarithms.

        Raises:
            NotImplementedError: it is not.
        """
        raise NotImplementedError(f"features of {self.name} have no logarithms")

    def directions(self, head_dim: int) -> int:
        """How many of the strongest balanced directions `lift` reads."""
        return head_dim

    @abstractmethod
    def count(self, head_dim: int) -> int:
        """How many features a row has."""

    @abstractmethod
    def feature_macs(self, head_dim: int) -> float:
        """Multiply-adds of the features of one row."""

    def part(
        self,
        inputs: Inputs,
        blocks: Tensor,
        floor: Tensor,
        sinks: Sequence[int],
        chunks: int,
        tokens: Tensor | None = None,
    ) -> Part | None:
        if not chunks:
            return None
        if (
            tokens is None
            and self.logarithmic
            and inputs.key.is_cuda
            and inputs.key.dtype != torch.float64
        ):
            from attnplan.kernels.engines.gpu import feature_sums

            made = exponents_of(self, inputs)
            return feature_sums.part(made, self.chunk, inputs, blocks, floor, sinks, chunks)
        read = self.chunks_before(inputs, floor)
        heads = range(len(inputs.head))
        numbers = inputs.key.shape[0] * max(inputs.key.shape[2], 1) * self.count(_dim(inputs))
        step = max(1, _held(inputs) // numbers)
        parts = []
        for first in heads[::step]:
            some = tuple(heads[first : first + step])
            here = inputs.heads(some)
            frame = Frame.of(here, self.directions(_dim(inputs)))
            state = self._states(here, frame, chunks, [sinks[h] for h in some])
            left = None if tokens is None else self._left_out(here, frame, heads_of(tokens, some))
            parts.append(self._read(here, frame, state, blocks, heads_of(read, some), left))
        numerator, mass, shift = (torch.cat(same, 1) for same in zip(*parts, strict=True))
        return Part(numerator, mass, shift, tuple(heads))

    def cost(
        self, shape: AttentionShape, window: int, sinks: int, kept: Kept | None = None
    ) -> Cost:
        chunks, more = self.visible(shape, window, sinks)
        count, head_dim = self.count(shape.head_dim), shape.head_dim
        most = int(chunks.max())
        rows = (shape.queries if most else 0) + most * self.chunk
        state = count * (head_dim + 1)
        sums = 2 * most * ceil(log2(most + 1)) * state
        mapped = head_dim * (self.directions(head_dim) + 1)
        row = mapped + self.feature_macs(head_dim) + state
        return Cost(2.0 * head_dim * int(more.sum()), float(rows * row + sums))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        return balance.fit(moments) | balance.fit_directions(moments)

    def _states(
        self, inputs: Inputs, frame: Frame, chunks: int, sinks: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Sums over the first 0, 1, ... chunks, and their shifts.

        Returns:
            [batch, heads, chunks + 1, features, value_dim + 1], the last column for the mass, and
            [batch, heads, chunks + 1, features or 1].
        """
        dtype = frame.query_mean.dtype
        near = self.is_sink(chunks, sinks, inputs.key.device)
        key, value = (self.by_chunk(inputs, t, chunks) for t in (inputs.key, inputs.value))
        batch, heads = key.shape[:2]
        step = max(1, _held(inputs) // (batch * heads * self.chunk * self.count(_dim(inputs))))
        made = []
        for first in range(0, chunks, step):
            some = slice(first, first + step)
            x, log = frame.keys(key[:, :, some].to(dtype).flatten(2, 3))
            x, log = (t.unflatten(2, (-1, self.chunk)) for t in (x, log))
            sink = near[:, some, :, None]
            log = log.masked_fill(sink, float("-inf"))
            found = self.lift(x.masked_fill(sink, 0.0), "key", inputs)
            log = log + found if self.logarithmic else log
            shift = log.amax(3).clamp(min=EMPTY)
            weight = (log - shift[..., None, :]).exp()
            summed = torch.nn.functional.pad(value[:, :, some].to(dtype), (0, 1), value=1.0)
            if not self.logarithmic:
                summed, weight = summed * weight, found
            made.append((weight.mT @ summed, shift))
        sums, shift = (torch.cat(same, 2) for same in zip(*made, strict=True))
        sums, shift = running_sums(sums, shift)
        nothing = torch.full_like(shift[:, :, :1], EMPTY)
        return (
            torch.cat([torch.zeros_like(sums[:, :, :1]), sums], 2),
            torch.cat([nothing, shift], 2),
        )

    def _left_out(self, inputs: Inputs, frame: Frame, tokens: Tensor) -> LeftOut:
        dtype = frame.query_mean.dtype
        key, value = (heads_of(t, inputs.kv_head).to(dtype) for t in (inputs.key, inputs.value))
        x, log = frame.keys(key)
        found = self.lift(x, "key", inputs)
        if self.logarithmic:
            return LeftOut(tokens, None, found + log, value)
        return LeftOut(tokens, found, log, value)

    def _read(
        self,
        inputs: Inputs,
        frame: Frame,
        state: tuple[Tensor, Tensor],
        blocks: Tensor,
        read: Tensor,
        left: LeftOut | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Numerator, mass and shift of the rows of `blocks`, of which each reads one state.

        The keys of `left` are taken out of it.
        """
        batch, heads = read.shape[:2]
        query = inputs.rows(blocks).unflatten(2, (-1, BLOCK))
        states = state[0].shape[2]
        place = torch.arange(batch * heads, device=read.device).view(batch, heads, 1)
        place = place * states + read
        step = max(1, _held(inputs) // (batch * heads * BLOCK * self.count(_dim(inputs))))
        made = []
        for first in range(0, len(blocks), step):
            some = slice(first, first + step)
            y, row_shift = frame.queries(query[:, :, some].flatten(2, 3).to(frame.key_mean.dtype))
            weight = self.lift(y.unflatten(2, (-1, BLOCK)), "query", inputs)
            sums, shift = (t.flatten(0, 2)[place[:, :, some]] for t in state)
            top = shift
            if self.logarithmic:
                weight = weight + shift[..., None, :]
                top = weight.amax(-1)
                weight = (weight - top[..., None]).exp()
            total = weight @ sums
            terms = total[..., -1]
            if not self.logarithmic:
                terms = weight.norm(dim=-1) * sums[..., -1].norm(dim=-1)[..., None]
            if left is not None:
                total = total - left.read(weight, shift, some)
            mass = total[..., -1]
            if not self.logarithmic or left is not None:
                lost = mass < CANCELLED * torch.finfo(mass.dtype).eps * terms
                mass = mass.masked_fill(lost, 0.0)
            row_shift = row_shift + top.expand_as(mass).flatten(2, 3)
            made.append((total[..., :-1].flatten(2, 3), mass.flatten(2, 3), row_shift))
        numerator, mass, shift = (torch.cat(same, 2) for same in zip(*made, strict=True))
        return numerator, mass, shift


@dataclass(frozen=True)
class LeftOut:
    """Single keys that leave the states of the queries that read them.

    Attributes:
        tokens: int32 [batch, heads, 64 * blocks, most], -1 for none.
        features: [batch, heads, keys, features] of all keys; None where they are logarithms.
        log: [batch, heads, keys, 1] or the logarithms of the features; what a key weighs.
        value: [batch, heads, keys, value_dim].
    """

    tokens: Tensor
    features: Tensor | None
    log: Tensor
    value: Tensor

    def read(self, weight: Tensor, shift: Tensor, blocks: slice) -> Tensor:
        """What some blocks of rows read of them, [batch, heads, blocks, 64, value_dim + 1].

        Args:
            weight: features of the rows [batch, heads, blocks, 64, features].
            shift: of the states that they read [batch, heads, blocks, features or 1].
            blocks: which of the blocks of `tokens`.
        """
        keys = self.log.shape[2]
        tokens = self.tokens.unflatten(2, (-1, BLOCK))[:, :, blocks].flatten(2, 3)
        tiles = pack_tokens(tokens, keys)
        rows, shifts = weight.flatten(0, 2), shift.flatten(0, 2)
        row_of_tile = torch.repeat_interleave(
            torch.arange(tiles.rows, device=weight.device), tiles.offsets.long().diff()
        )
        head = row_of_tile // tiles.blocks
        out = weight.new_zeros(tiles.rows, BLOCK, self.value.shape[3] + 1)
        step = max(1, NUMBERS // (BLOCK * weight.shape[-1]))
        for first in range(0, len(row_of_tile), step):
            some = slice(first, first + step)
            row, at = row_of_tile[some], tiles.gather[some].long().clamp(min=0)
            at = at + head[some, None] * keys
            read = (self.log.flatten(0, 1).flatten(0, 1)[at] - shifts[row, None]).exp()
            if self.features is not None:
                read = read * self.features.flatten(0, 1).flatten(0, 1)[at]
            bits = tiles.masks[some, :, None] >> torch.arange(BLOCK, device=at.device) & 1
            share = (rows[row] @ read.mT).masked_fill(bits == 0, 0.0)
            value = self.value.flatten(0, 1).flatten(0, 1)[at]
            made = share @ torch.nn.functional.pad(value, (0, 1), value=1.0)
            out.index_add_(0, row, made)
        return out.view(*weight.shape[:4], -1)


@dataclass(frozen=True)
class Frame:
    """Means [heads, 1, head_dim] and maps [heads, head_dim, directions] of some heads, sqrt(s)."""

    query_mean: Tensor
    key_mean: Tensor
    query_map: Tensor
    key_map: Tensor
    scale: float

    @classmethod
    def of(cls, inputs: Inputs, directions: int | None = None) -> Frame:
        """The frame of the strongest `directions` directions, of all if None."""
        dtype = torch.promote_types(inputs.key.dtype, torch.float32)

        def fitted(name: str) -> Tensor:
            return inputs.fitted_heads(name, inputs.head).to(dtype)

        turn = fitted("balanced.directions")[..., :directions] * inputs.scale**0.5
        return cls(
            fitted("balanced.query_mean")[:, None],
            fitted("balanced.key_mean")[:, None],
            fitted("balanced.query_map") @ turn,
            fitted("balanced.key_map") @ turn,
            inputs.scale,
        )

    def keys(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """x and b [..., 1]."""
        centred = key - self.key_mean
        return centred @ self.key_map, self.scale * centred @ self.query_mean.mT

    def queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """y and m."""
        shift = self.scale * (query @ self.key_mean.mT)[..., 0]
        return (query - self.query_mean) @ self.query_map, shift


def exponents_of(far: FeatureMap, inputs: Inputs) -> Exponents:
    """Logarithms of features for the heads and the dtype of a call, made once per fitted data.

    The means and maps of `Frame` are taken into vectors and constants, in float64.

    Raises:
        NotImplementedError: the features have no logarithms.
        ValueError: nobody fitted it.
    """
    fitted = inputs.fitted.get("balanced.directions")
    if fitted is None:
        fitted = inputs.fitted_tensor("balanced.directions")  # says what to do
    known = _known.setdefault(fitted, {})
    query = inputs.query
    spelled = (far, inputs.head, inputs.scale, query.dtype, query.device)
    if spelled not in known:
        known[spelled] = _exponents(far, inputs)
    made: Exponents = known[spelled]
    return made


_known = WeakIdKeyDictionary()


def _exponents(far: FeatureMap, inputs: Inputs) -> Exponents:
    from attnplan.kernels.engines.gpu.feature_sums import Centred, packed

    directions = far.directions(inputs.query.shape[3])
    frame, logarithms = Frame.of(inputs, directions), far.logarithms(inputs)
    query_map, key_map = frame.query_map.double().mT, frame.key_map.double().mT
    query_mean, key_mean = frame.query_mean.double(), frame.key_mean.double()  # [heads, 1, dim]
    query = logarithms.query.double() @ query_map
    # e^b, which weighs a key, is a factor of every feature
    key = logarithms.key.double() @ key_map + frame.scale * query_mean
    return packed(
        Centred(query, logarithms.query_constant, query_mean, query_map),
        Centred(key, logarithms.key_constant, key_mean, key_map),
        frame.scale * frame.key_mean[:, 0],
        logarithms.squares,
        inputs.query.dtype,
    )


def running_sums(sums: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the first 1, 2, ... chunks, each seen from the largest shift among them.

    Args:
        sums: [batch, heads, chunks, features, columns], e^-shift of the sums of a chunk.
        shift: [batch, heads, chunks, features or 1].
    """
    step = 1
    while step < sums.shape[2]:  # each row takes in the row `step` before: log2(chunks) steps
        top = torch.maximum(shift[:, :, step:], shift[:, :, :-step])
        later = sums[:, :, step:] * (shift[:, :, step:] - top).exp()[..., None]
        earlier = sums[:, :, :-step] * (shift[:, :, :-step] - top).exp()[..., None]
        sums = torch.cat([sums[:, :, :step], later + earlier], 2)
        shift = torch.cat([shift[:, :, :step], top], 2)
        step *= 2
    return sums, shift


def products(rows: Tensor) -> Tensor:
    """Products of all pairs of columns, [..., d (d + 1) / 2]: <., .> is the square of a.b."""
    columns = rows.mT.contiguous()  # long rows of memory
    d, n = columns.shape[-2:]
    made = columns.new_empty(*columns.shape[:-2], d * (d + 1) // 2, n)
    twice = columns * 2**0.5
    first = 0
    for i in range(d):
        column = columns[..., i : i + 1, :]
        torch.mul(column, column, out=made[..., first : first + 1, :])
        after = made[..., first + 1 : first + d - i, :]
        torch.mul(column, twice[..., i + 1 :, :], out=after)
        first += d - i
    return made.mT


def with_constant(rows: Tensor) -> Tensor:
    """[1, rows]."""
    return torch.nn.functional.pad(rows, (1, 0), value=1.0)


@cache
def orthogonal_rows(count: int, dim: int, seed: int) -> Tensor:
    """Gaussian vectors, float64 [count, dim], of which every `dim` in a row are orthogonal.

    Columns of Q take the sign of R's diagonal: without it they are not uniformly distributed.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // dim)
    normal = torch.randn(2, blocks, dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal[0])
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return (q.mT * normal[1].norm(dim=-1, keepdim=True)).flatten(0, 1)[:count]


@cache
def random_signs(count: int, rows: int, columns: int, seed: int) -> Tensor:
    """Independent signs, float64 [count, rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (count, rows, columns), generator=generator)
    return 2.0 * bits.double() - 1


def _held(inputs: Inputs) -> int:
    """Features to hold at a time."""
    return min(NUMBERS, CACHED) if inputs.key.device.type == "cpu" else NUMBERS


def _dim(inputs: Inputs) -> int:
    return inputs.query.shape[-1]
