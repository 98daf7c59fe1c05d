"""Attention over stored rows on a GPU: all kv heads of a layer in one launch.

The rows of a kv head are cut into runs, so many that those of the layer fill the device. A program
reads one run for all query heads of the group, which are the rows of its tile, and carries the
(numerator, mass, shift) of flash attention. A second kernel merges the runs of a kv head, as in
Flash-Decoding, Dao et al., https://crfm.stanford.edu/2023/10/12/flashdecoding.html.

Kv heads may differ in length and lie in tensors of their own: programs look their addresses up in
a table, which is used again while rows are only added. Logits are kept in units of log 2, as in
`engines.gpu.prefill`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu.launcher import Launcher, are_aligned
from attnplan.kernels.engines.gpu.prefill import DTYPES, LN2, LOG2E, _add, _softmax
from attnplan.kernels.operands.kv_rows import PAGE, StoredRows, check, identity

RUN = 256
"""Fewest rows of a kv head that are worth a program of their own."""
GROWTH = 64
"""Rows that a table is used longer for."""
LAYOUTS = 4096
"""Tables that are kept, of a few hundred bytes."""
PROGRAMS = 2
"""Of each multiprocessor, to hide each other's latency."""
MULTIPROCESSORS = 132
"""Of an H100; the interpreter cuts as for one."""
COLUMNS = tl.constexpr(14)
ROWS_OF_PAGE = tl.constexpr(PAGE)
LOW = tl.constexpr(-1.0e30)  # the shift of nothing, finite: -inf - -inf is no number


def decode(query: Tensor, stored: Sequence[StoredRows], *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over everything that a layer stores.

    Masses and numerators are float32, whatever the dtype of the inputs; see
    `engines.reference.decode.decode`.

    Args:
        query: [batch, heads, queries, head_dim], float32, float16 or bfloat16.
        stored: every kv head of the layer once.
        scale: factor before the softmax.

    Returns:
        Output [batch, heads, queries, value_dim] in the dtype of `query`, laid out in memory as
        [batch, queries, heads, value_dim], and float32 log-mass [batch, heads, queries].

    Raises:
        ValueError: heads, dtypes, lengths, value dims or devices do not fit together.
    """
    return _decode(query, stored, scale, PROGRAMS * _multiprocessors(query.device))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _Layout:
    """How a layer is read, for as long as its rows lie where they lie and are as many.

    Attributes:
        cells: the table, int64 on the device.
        lengths: rows of every entry of the layer when the table was made; programs that read the
            last run of a kv head also read what all have grown by.
        runs: of the layer.
        group: heads of a kv head.
        attend, merge: constants and options of the two kernels.
        key: names all that the kernels are compiled for.
    """

    cells: Tensor
    lengths: tuple[int, ...]
    runs: int
    group: int
    attend: tuple[dict[str, int | bool], dict[str, int | bool]]
    merge: tuple[dict[str, int], dict[str, int | bool]] | None
    key: Hashable

    def grown(self, stored: Sequence[StoredRows], queries: int) -> int | None:
        """Rows that every kv head has more than the table says; None if it serves no longer."""
        more = stored[0].length - self.lengths[0]
        for rows, length in zip(stored, self.lengths, strict=True):
            if rows.length - length != more or not rows.fits(queries):
                return None
        return more if 0 <= more < GROWTH else None


_layouts: OrderedDict[Hashable, _Layout] = OrderedDict()


def _decode(
    query: Tensor, stored: Sequence[StoredRows], scale: float, programs: int
) -> tuple[Tensor, Tensor]:
    """`decode` by about `programs` programs."""
    spelled = programs, *identity(query, stored)
    layout = _layouts.get(spelled)
    batch, heads, queries, _ = query.shape
    grown = None if layout is None else layout.grown(stored, queries)
    value_dim = stored[0].value.shape[3] if stored else 0
    if layout is None or grown is None:
        group = check(query, stored)
        _check(query, stored)
        readable = [_readable(rows) for rows in stored]  # copies must outlive the launch
        layout, grown = _layout(query, readable, group, programs), 0
        if all(a is b for a, b in zip(readable, stored, strict=True)):
            _layouts[spelled] = layout
            while len(_layouts) > LAYOUTS:
                _layouts.popitem(last=False)
    output = query.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    log_mass = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if log_mass.numel() == 0:
        return output, log_mass
    query = query if query.stride(3) == 1 else query.contiguous()
    numerator, sums = output, log_mass
    if layout.merge is not None:
        size = (batch, layout.runs, layout.group * queries)
        numerator = query.new_empty(*size, value_dim, dtype=torch.float32)
        sums = query.new_empty(*size, 2, dtype=torch.float32)
    made, options = layout.attend
    strides = query.stride()[:3]
    key = (layout.key, query.device) if are_aligned((query,), strides) else None
    parts = -(-layout.group * queries // made["ROWS"])
    with torch.cuda.device_of(query):
        _start(
            (parts, layout.runs, batch),
            (
                *(query, numerator, sums, layout.cells),
                *(scale * LOG2E.value, queries, grown, *strides),
            ),
            made,
            options,
            key,
        )
        if layout.merge is not None:
            made, options = layout.merge
            arguments = (numerator, sums, output, log_mass, layout.cells, layout.runs, queries)
            _start_merge((heads * queries, batch), arguments, made, options, key)
    return output, log_mass


def _layout(query: Tensor, stored: Sequence[StoredRows], group: int, programs: int) -> _Layout:
    batch, _, queries, head_dim = query.shape
    value_dim = stored[0].value.shape[3]
    rows = rows_of_program(group * queries, query.dtype)
    parts = -(-group * queries // rows)
    block = block_of(max(head_dim, value_dim), rows=rows)
    table = _table(stored, block, programs // max(batch * parts, 1))
    runs = table[-1][0] + table[-1][1]
    has = {
        "bias": any(rows.bias is not None for rows in stored),
        "pages": any(rows.pages is not None for rows in stored),
        "runs": runs > len(table),
    }
    aligned = _is_aligned(table)
    cells = torch.tensor(table, dtype=torch.int64, pin_memory=query.is_cuda)
    return _Layout(
        cells.to(query.device, non_blocking=True),
        tuple(rows.length for rows in stored),
        runs,
        group,
        (
            constants(
                *(head_dim, value_dim),
                rows=rows,
                group=group,
                kv_heads=len(table),
                aligned=aligned,
                **has,
            ),
            launch_options(max(head_dim, value_dim), query.dtype, rows=rows),
        ),
        merge_constants(value_dim, group=group) if has["runs"] else None,
        (head_dim, value_dim, rows, group, len(table), aligned, tuple(has.values()), query.dtype),
    )


def constants(
    head_dim: int,
    value_dim: int,
    *,
    rows: int,
    group: int,
    kv_heads: int,
    aligned: bool,
    bias: bool,
    pages: bool,
    runs: bool,
) -> dict[str, int | bool]:
    """What the kernel is compiled for, beside dtypes."""
    return {
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "BLOCK_H": triton.next_power_of_2(kv_heads),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK": block_of(max(head_dim, value_dim), rows=rows),
        "ROWS": rows,
        "IS_ALIGNED": aligned,
        "HAS_BIAS": bias,
        "HAS_PAGES": pages,
        "HAS_RUNS": runs,
    }


def merge_constants(value_dim: int, *, group: int) -> tuple[dict[str, int], dict[str, int | bool]]:
    """What the kernel that merges runs is compiled for, and its options."""
    block = max(16, triton.next_power_of_2(value_dim))
    made = {"GROUP": group, "VALUE_DIM": value_dim, "BLOCK_V": block, "BLOCK": 4096 // block}
    return made, {"num_warps": 4, "enable_fp_fusion": True}


def rows_of_program(rows: int, dtype: torch.dtype) -> int:
    """Rows of a program's tile, where `rows` queries of all heads of a group read the same keys."""
    return 16 if dtype == torch.float32 else min(64, max(16, triton.next_power_of_2(rows)))


def block_of(head_dim: int, *, rows: int) -> int:
    """Keys that are loaded at once."""
    return min(128, max(32, 8192 // triton.next_power_of_2(head_dim)))


def launch_options(head_dim: int, dtype: torch.dtype, *, rows: int) -> dict[str, int | bool]:
    """Warps of a program and stages of its pipeline.

    The most stages without spills on sm_80 and sm_90 that still let several programs share a
    multiprocessor (`tests/test_decode_triton.py`).
    """
    if dtype == torch.float32:
        warps, stages = 8, 1
    else:
        warps, stages = 4, 3
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _table(stored: Sequence[StoredRows], block: int, programs: int) -> list[list[int]]:
    """What programs look up, for each kv head of the layer.

    The first of its runs, how many there are, rows of a run and of all; then address, batch stride
    and row stride of its keys and of its values; address and batch stride of its bias and of its
    pages, 0 if none.
    """
    total = sum(rows.length * len(rows.kv_heads) for rows in stored)
    found = {}
    for rows in stored:
        runs = round(rows.length * programs / total)
        runs = max(1, min(runs, rows.length // RUN))
        run = -(-rows.length // (runs * block)) * block
        sizes = [-(-rows.length // run), run, rows.length]
        for place, head in enumerate(rows.kv_heads):
            key, value = (
                [t.data_ptr() + t.element_size() * place * t.stride(1), t.stride(0), t.stride(2)]
                for t in (rows.key, rows.value)
            )
            bias, pages = (
                [0, 0] if t is None else [t[:, place].data_ptr(), t.stride(0)]
                for t in (rows.bias, rows.pages)
            )
            found[head] = [*sizes, *key, *value, *bias, *pages]
    table, first = [], 0
    for head in range(len(found)):
        table.append([first, *found[head]])
        first += found[head][0]
    return table


def _is_aligned(table: list[list[int]]) -> bool:
    """Whether all rows of keys and values can be read 16 bytes at a time."""
    return not any(address % 16 for line in table for address in (line[4], line[7])) and not any(
        stride % 8 for line in table for stride in (*line[5:7], *line[8:10])
    )


def _readable(rows: StoredRows) -> StoredRows:
    """With whole vectors where the kernel expects them: a copy where they are not."""
    last = ((rows.key, 3), (rows.value, 3), (rows.bias, 2), (rows.pages, 2))
    if all(t is None or t.stride(dim) == 1 for t, dim in last):
        return rows
    key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (rows.key, rows.value))
    bias, pages = (
        t if t is None or t.stride(2) == 1 else t.contiguous() for t in (rows.bias, rows.pages)
    )
    return replace(rows, key=key, value=value, bias=bias, pages=pages)


def _check(query: Tensor, stored: Sequence[StoredRows]) -> None:
    """What the kernel could not see: it reads at addresses."""
    if query.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"the triton engine computes in {known}, got {query.dtype}")
    value_dims = {rows.value.shape[3] for rows in stored}
    if len(value_dims) > 1:
        raise ValueError(f"values must share a dim, got {sorted(value_dims)}")
    for rows in stored:
        if rows.bias is not None and rows.bias.dtype != torch.float32:
            raise ValueError(f"bias must be float32, got {rows.bias.dtype}")
        for tensor in (rows.key, rows.value, rows.bias, rows.pages):
            if tensor is not None and tensor.device != query.device:
                raise ValueError(f"stored rows are on {tensor.device}, the query on {query.device}")


@triton.jit(do_not_specialize=("queries", "grown"))
def _attend(
    query, output, log_mass, table,
    scale_log2, queries, grown, query_batch, query_head, query_row,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    IS_ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAGES: tl.constexpr,
    HAS_RUNS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    first_run = tl.load(table + COLUMNS * h, mask=h < KV_HEADS, other=2**31)
    kv_head = tl.sum((first_run <= run).to(tl.int32)) - 1
    table += COLUMNS * kv_head
    size = tl.load(table + 2).to(tl.int32)
    length = tl.load(table + 3).to(tl.int32) + grown
    piece = run - tl.load(table).to(tl.int32)
    start = piece * size
    is_last = piece == tl.load(table + 1).to(tl.int32) - 1
    end = tl.where(is_last, length, start + size)
    key, key_row = _matrix(table + 4, query.dtype, batch, IS_ALIGNED)
    value, value_row = _matrix(table + 7, query.dtype, batch, IS_ALIGNED)
    if HAS_BIAS:
        bias_address = tl.load(table + 10)
        bias = bias_address.to(log_mass.dtype) + batch * tl.load(table + 11)
        biased = tl.where(bias_address == 0, 0, length)
    if HAS_PAGES:
        pages_address = tl.load(table + 12)
        pages = pages_address.to(tl.pointer_type(tl.int32)) + batch * tl.load(table + 13)
        paged = tl.where(pages_address == 0, 0, length)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS], (head, query) of the group
    c = tl.arange(0, BLOCK)  # [BLOCK]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    is_query = row < GROUP * queries
    head = (kv_head * GROUP + row // queries).to(tl.int64)
    r = row % queries
    newest = length - queries + r
    query += batch * query_batch
    q = tl.load(
        query + head[:, None] * query_head + r[:, None] * query_row + d[None, :],
        mask=is_query[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )

    shift = tl.full([ROWS], LOW, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    numerator = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for block in tl.range(start, end, BLOCK):
        j = block + c
        is_row = j < end
        place = j
        if HAS_PAGES:
            page = tl.load(pages + j // ROWS_OF_PAGE, mask=j < paged, other=0)
            place = tl.where(j < paged, page * ROWS_OF_PAGE + j % ROWS_OF_PAGE, j)
        keys = key + place.to(tl.int64)[:, None] * key_row + d[None, :]
        k = _load(keys, is_row, d, HEAD_DIM, BLOCK_D)
        logits = tl.dot(q, k.T, input_precision="ieee") * scale_log2
        if HAS_BIAS:
            log_weight = tl.load(bias + place, mask=j < biased, other=0.0)
            is_row = is_row & (log_weight > float("-inf"))
            logits += log_weight[None, :] * LOG2E
        values = value + place.to(tl.int64)[:, None] * value_row + e[None, :]
        v = _load(values, is_row, e, VALUE_DIM, BLOCK_V)
        keep = is_row[None, :] & (j[None, :] <= newest[:, None])
        weights, rescale, shift = _softmax(tl.where(keep, logits, float("-inf")), 1.0, shift)
        mass = mass * rescale + tl.sum(weights, 1)
        numerator = _add(numerator, rescale, weights, v)

    if HAS_RUNS:
        at = (batch * tl.num_programs(1) + run) * (GROUP * queries) + row
        tl.store(log_mass + 2 * at, mass, mask=is_query)
        tl.store(log_mass + 2 * at + 1, shift, mask=is_query)
    else:
        log_at = (batch * (KV_HEADS * GROUP) + head) * queries + r
        tl.store(log_mass + log_at, _logarithm(mass, shift), mask=is_query)
        at = (batch * queries + r) * (KV_HEADS * GROUP) + head
        numerator = numerator / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(
        output + at[:, None] * VALUE_DIM + e[None, :],
        numerator.to(output.dtype.element_ty),
        mask=is_query[:, None] & (e < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=("runs", "queries"))
def _merge(
    numerators, sums, output, log_mass, table, runs, queries,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // queries
    r = tl.program_id(0) % queries
    heads = tl.num_programs(0) // queries
    batch = tl.program_id(1).to(tl.int64)
    table += COLUMNS * (head // GROUP)
    first = batch * runs + tl.load(table)
    count = tl.load(table + 1).to(tl.int32)
    row = head % GROUP * queries + r
    c = tl.arange(0, BLOCK)  # [BLOCK]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]

    shift = LOW
    mass = 0.0
    numerator = tl.zeros([BLOCK_V], tl.float32)
    for block in tl.range(0, count, BLOCK):
        is_run = block + c < count
        at = (first + block + c) * (GROUP * queries) + row
        masses = tl.load(sums + 2 * at, mask=is_run, other=0.0)
        shifts = tl.load(sums + 2 * at + 1, mask=is_run, other=LOW)
        parts = tl.load(
            numerators + at[:, None] * VALUE_DIM + e[None, :],
            mask=is_run[:, None] & (e < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_shift = tl.maximum(shift, tl.max(shifts, 0))
        weights = tl.math.exp2(shifts - new_shift)
        rescale = tl.math.exp2(shift - new_shift)
        mass = mass * rescale + tl.sum(weights * masses, 0)
        numerator = numerator * rescale + tl.sum(weights[:, None] * parts, 0)
        shift = new_shift

    tl.store(log_mass + (batch * heads + head) * queries + r, _logarithm(mass, shift))
    result = numerator / tl.where(mass == 0, 1.0, mass)
    tl.store(
        output + ((batch * queries + r) * heads + head) * VALUE_DIM + e,
        result.to(output.dtype.element_ty),
        mask=e < VALUE_DIM,
    )


_start = Launcher(_attend)
_start_merge = Launcher(_merge)


@triton.jit
def _matrix(cells, pointer_type: tl.constexpr, batch, IS_ALIGNED: tl.constexpr):
    """Where the rows of one text start, and their stride."""
    start = tl.load(cells).to(pointer_type) + batch * tl.load(cells + 1)
    row = tl.load(cells + 2)
    if IS_ALIGNED:
        start = tl.multiple_of(start, 16)
        row = tl.multiple_of(row, 8)
    return start, row


@triton.jit
def _load(pointers, is_row, d, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of `DIM` numbers, padded with 0 to `BLOCK_DIM`; 0 where there is no row."""
    mask = is_row[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (d < DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _logarithm(mass, shift):
    """Natural logarithm of a mass under a shift, -inf for none."""
    logarithm = (shift + tl.math.log2(tl.where(mass == 0, 1.0, mass))) * LN2
    return tl.where(mass == 0, float("-inf"), logarithm)
