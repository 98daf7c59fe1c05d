"""Attention over stored rows on a CPU, at a cost proportional to the rows.

With a C++ compiler the work is done by `decode.cpp`; without one, by torch, for the same result.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from attnplan.kernels.native import build
from attnplan.kernels.operands.kv_rows import StoredRows, check, identity

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TABLES = 4096
"""That are kept, of a few hundred bytes each."""
RUN = 256
"""Fewest rows of a head that are worth a work item of their own; items have whole multiples."""


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over everything that a layer stores.

    Arithmetic is float32, whatever the dtype of the inputs; see `engines.reference.decode.decode`.

    Args:
        query: [batch, heads, queries, head_dim], float32, bfloat16 or float16.
        stored: every kv head of the layer once.
        scale: factor before the softmax.

    Returns:
        Output [batch, heads, queries, value_dim] in the dtype of `query`, laid out as
        [batch, queries, heads, value_dim], and float32 log-mass [batch, heads, queries].

    Raises:
        ValueError: heads, dtypes or lengths do not fit together.
    """
    spelled = identity(query, stored)
    table = _tables.of.get(spelled)
    if table is None or not all(rows.fits(query.shape[2]) for rows in stored):
        group = check(query, stored)
        if query.dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"query is {query.dtype}; the cpu engine takes {known}")
        library = build.load().library
        if library is None:
            return decode_torch(query, stored, scale=scale)
        table = _Table(library, stored, group)
        if not table.held:
            _tables.of[spelled] = table
            while len(_tables.of) > TABLES:
                _tables.of.popitem(last=False)
    return table(query, stored, scale)


class _Strided(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row")),
    )


class _Head(ctypes.Structure):
    """`Head` of decode.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "bias", "pages")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("key_batch", "key_row", "value_batch", "value_row", "bias_batch", "pages_batch"),
                *("rows", "index"),
            )
        ),
    )


class _Call(ctypes.Structure):
    """`DecodeCall` of decode.cpp, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("dtype", "batch", "kv_heads", "group", "queries", "head_dim", "value_dim"),
                *("threads", "run"),
            )
        ),
        ("scale", ctypes.c_double),
        ("query", _Strided),
        ("output", _Strided),
        ("lse", ctypes.c_void_p),
        ("heads", ctypes.c_void_p),
        ("key", _Strided),
        ("value", _Strided),
    )


class _Table:
    """The kv heads of a layer as decode.cpp reads them, while their rows lie where they lie.

    Attributes:
        value_dim: of the rows.
        held: copies that it reads, because rows do not lie as they must.
    """

    def __init__(self, library: ctypes.CDLL, stored: Sequence[StoredRows], group: int) -> None:
        self._decode = library.attnplan_decode
        self._group = group
        self.value_dim = stored[0].value.shape[3]
        self.held: list[Tensor] = []
        heads = [head for rows in stored for head in self._heads(rows)]
        self._table = (_Head * len(heads))(*heads)
        each = iter(self._table)
        self._parts = [[next(each) for _ in rows.kv_heads] for rows in stored]

    def _heads(self, rows: StoredRows) -> Iterator[_Head]:
        key, value = (self._whole(t, 3) for t in (rows.key.detach(), rows.value.detach()))
        bias, pages = (t if t is None else self._whole(t, 2) for t in (rows.bias, rows.pages))
        size = key.element_size()
        for place, index in enumerate(rows.kv_heads):
            yield _Head(
                key.data_ptr() + place * key.stride(1) * size,
                value.data_ptr() + place * value.stride(1) * size,
                None if bias is None else bias.data_ptr() + place * bias.stride(1) * 4,
                None if pages is None else pages.data_ptr() + place * pages.stride(1) * 4,
                *(key.stride(0), key.stride(2), value.stride(0), value.stride(2)),
                0 if bias is None else bias.stride(0),
                0 if pages is None else pages.stride(0),
                *(rows.length, index),
            )

    def _whole(self, tensor: Tensor, dim: int) -> Tensor:
        if tensor.stride(dim) != 1:
            tensor = tensor.contiguous()
            self.held.append(tensor)
        return tensor

    def __call__(
        self, query: Tensor, stored: Sequence[StoredRows], scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, heads, queries, _ = query.shape
        query = query.detach()
        query = query if query.stride(3) == 1 else query.contiguous()
        output = query.new_empty(batch, queries, heads, self.value_dim).transpose(1, 2)
        lse = torch.empty(batch, heads, queries)
        call = self.call(query.shape, query.dtype, scale)
        call.lse = lse.data_ptr()
        self.run(call, query, output, [rows.length for rows in stored])
        return output, lse

    def call(self, shape: Sequence[int], dtype: torch.dtype, scale: float) -> _Call:
        """What all calls with queries of a shape and a dtype have in common."""
        batch, _, queries, head_dim = shape
        call = _Call(
            *(DTYPES[dtype], batch, len(self._table), self._group, queries),
            *(head_dim, self.value_dim),
        )
        call.scale = scale
        call.heads = ctypes.addressof(self._table)
        return call

    def run(self, call: _Call, query: Tensor, output: Tensor, lengths: Sequence[int]) -> None:
        """Fill `output`, [batch, heads, queries, value_dim]; `lengths` are those of `stored`."""
        total = 0
        for heads, length in zip(self._parts, lengths, strict=True):
            for head in heads:
                head.rows = length
            total += length * len(heads)
        threads = torch.get_num_threads()
        call.threads = threads
        call.run = max(RUN, -(-call.batch * total // (4 * threads * RUN)) * RUN)
        _point(call.query, query)
        _point(call.output, output)
        if self._decode(ctypes.byref(call)):
            raise MemoryError("out of memory")


def _point(to: _Strided, tensor: Tensor) -> None:
    to.data = tensor.data_ptr()
    to.batch, to.head, to.row, _ = tensor.stride()


class OneToken:
    """Calls of one token at a time, which becomes the last row of every kv head.

    A call changes what this holds, so calls are made one after the other.
    """

    def __init__(
        self, table: _Table, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> None:
        self._table = table
        self._call = table.call(query.shape, query.dtype, scale)
        self._shapes = query.shape, key.shape, value.shape, query.dtype
        self._output = query.shape[0], 1, query.shape[1], table.value_dim

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, stored: Sequence[StoredRows], scale: float
    ) -> OneToken | None:
        """See `decoding.one_token`."""
        library = build.load().library
        if (
            library is None
            or query.dtype not in DTYPES
            or any(rows.pages is not None for rows in stored)
        ):
            return None
        group = check(query, stored)
        table = _Table(library, stored, group)
        one = (query.shape[0], query.shape[1] // group, 1)
        right = (*one, query.shape[3]), (*one, table.value_dim)
        if table.held or (key.shape, value.shape) != right:
            return None
        made = cls(table, query, key, value, scale)
        return made if made.fits(query, key, value) else None

    def fits(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether these are like those of the first call."""
        return (
            (query.shape, key.shape, value.shape, query.dtype) == self._shapes
            and key.dtype == value.dtype == query.dtype
            and query.stride(3) == key.stride(3) == value.stride(3) == 1
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
        """Store a token and attend to all rows.

        Args:
            query: [batch, heads, 1, head_dim].
            key: [batch, kv_heads, 1, head_dim].
            value: [batch, kv_heads, 1, value_dim].
            lengths: rows in use of each of `stored`, the new one included.

        Returns:
            [batch, heads, 1, value_dim], laid out as [batch, 1, heads, value_dim].
        """
        output = query.new_empty(self._output).transpose(1, 2)
        _point(self._call.key, key)
        _point(self._call.value, value)
        self._table.run(self._call, query, output, lengths)
        return output


class _Tables(threading.local):
    """Of one thread: a call changes lengths."""

    def __init__(self) -> None:
        self.of: OrderedDict[Hashable, _Table] = OrderedDict()


_tables = _Tables()


def decode_torch(
    query: Tensor, stored: Sequence[StoredRows], *, scale: float
) -> tuple[Tensor, Tensor]:
    """`decode` in torch alone, for machines without a C++ compiler."""
    group = check(query, stored)
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, stored[0].value.shape[3]).transpose(1, 2)
    device = query.device
    lse = torch.empty(batch, heads, queries, device=device)
    for rows in (some.gathered() for some in stored):
        of = [h * group + g for h in rows.kv_heads for g in range(group)]
        packed = query[:, of].float().unflatten(1, (-1, group)).flatten(2, 3) * scale
        key, value = (t[:, :, : rows.length].float() for t in (rows.key, rows.value))
        logits = (packed @ key.mT).unflatten(2, (group, queries))
        if rows.bias is not None:
            logits += rows.bias[:, :, None, None, : rows.length]
            value = torch.where(rows.bias[:, :, : rows.length, None].isneginf(), 0, value)
        row = torch.arange(rows.length, device=device)
        newest = rows.length - queries + torch.arange(queries, device=device)
        logits.masked_fill_(row > newest[:, None], float("-inf"))
        shift = logits.amax(-1, keepdim=True)
        shift = torch.where(shift == float("-inf"), 0, shift)
        weight = (logits - shift).exp_()
        mass = weight.sum(-1)
        found = weight.flatten(2, 3) @ value / torch.where(mass == 0, 1, mass).flatten(2)[..., None]
        output[:, of] = found.unflatten(2, (group, queries)).flatten(1, 2).to(output.dtype)
        lse[:, of] = (mass.log() + shift[..., 0]).flatten(1, 2)
    return output, lse
