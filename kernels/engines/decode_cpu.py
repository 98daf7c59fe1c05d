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

from attnplan.kernels.engines import build
from attnplan.kernels.stored import StoredRows, check, identity

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TABLES = 4096
"""That are kept, of a few hundred bytes each."""
RUN = 256
"""Fewest rows of a head that are worth a work item of their own; items have whole multiples."""


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over everything that a layer stores.

    Arithmetic is float32, whatever the dtype of the inputs; see `decode_reference.decode`.

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
    )


class _Table:
    """The kv heads of a layer as decode.cpp reads them, while their rows lie where they lie.

    Attributes:
        held: copies that it reads, because rows do not lie as they must.
    """

    def __init__(self, library: ctypes.CDLL, stored: Sequence[StoredRows], group: int) -> None:
        self._decode = library.attnplan_decode
        self._group = group
        self._value_dim = stored[0].value.shape[3]
        self.held: list[Tensor] = []
        heads = [head for rows in stored for head in self._heads(rows)]
        self._table = (_Head * len(heads))(*heads)

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
        batch, heads, queries, head_dim = query.shape
        query = query.detach()
        query = query if query.stride(3) == 1 else query.contiguous()
        output = query.new_empty(batch, queries, heads, self._value_dim).transpose(1, 2)
        lse = torch.empty(batch, heads, queries)
        place = total = 0
        for rows in stored:
            for _ in rows.kv_heads:
                self._table[place].rows = rows.length
                place += 1
            total += rows.length * len(rows.kv_heads)
        threads = torch.get_num_threads()
        call = _Call(
            *(DTYPES[query.dtype], batch, place, self._group, queries, head_dim, self._value_dim),
            *(threads, max(RUN, -(-batch * total // (4 * threads * RUN)) * RUN)),
            scale,
            _Strided(query.data_ptr(), *query.stride()[:3]),
            _Strided(output.data_ptr(), *output.stride()[:3]),
            lse.data_ptr(),
            ctypes.addressof(self._table),
        )
        if self._decode(ctypes.byref(call)):
            raise MemoryError("out of memory")
        return output, lse


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
