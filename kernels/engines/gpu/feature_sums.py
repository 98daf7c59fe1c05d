"""Sums of exponential features on a GPU: feature maps whose logarithms are linear in the row.

For such a map the log-feature f of a key or of a query is

    l_f(k) = k.a_f + c_f - r(k)

with one number r(k) per row. Summing a feature over the keys of a chunk is then attention of the
"query" a_f over these keys, and reading a state is attention of a query over the features, whose
values are the means that they carry:

    chunks   u_f = mean of v_j with weights e^{l_f(k_j)}, and their log-mass      per chunk
    prefix   the same over the first 1, 2, ... chunks
    read     n = sum_f e^{l_f(q) + log-mass_f} u_f,  z without u                  per query block

Kernels do this with the running shifts of flash attention, Dao,
https://arxiv.org/abs/2307.08691, so no feature over- or underflows, none is in memory, and nothing
waits for the device. Means are bounded by the values, so halves hold them. Logarithms are in units
of log 2, as in `engines.gpu.prefill`.

Operands of products have the dtype of the inputs, sums are float32. What a_f loses by that is made
up for by a second product with the rest: logarithms are as good as with a_f of 16 (bfloat16) or 22
(float16) bits.

The chunked form is that of Katharopoulos et al.,
https://arxiv.org/abs/2006.16236, and of Yang et al., https://arxiv.org/abs/2312.06635, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnplan.kernels.engines.gpu.launcher import Launcher, are_aligned
from attnplan.kernels.engines.gpu.prefill import DTYPES, LN2, LOG2E
from attnplan.kernels.engines.gpu.top_blocks import integers
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.partial_softmax import Part
from attnplan.kernels.operands.tile_list import BLOCK

NUMBERS = 1 << 27
"""Numbers of chunk states that are held at a time."""
LOW = tl.constexpr(-1.0e30)  # log-mass of nothing, finite: -inf - -inf is no number


@dataclass(frozen=True)
class Side:
    """What turns rows of queries or keys into logarithms.

    Attributes:
        vectors: [heads, pieces, features + squares, dim], rows a_f, then those of a matrix R with
            r(k) = |R k|^2, where r is a square. The pieces add up to a row divided by its unit. All
            sizes are padded to whole blocks.
        affine: float32 [heads, 2, features + squares], the unit and the constant of every row.
    """

    vectors: Tensor
    affine: Tensor


@dataclass(frozen=True)
class Centred:
    """Logarithms of features of rows of some heads, l_f(k) = (k - mean).a_f + c_f - r(k - mean).

    Attributes:
        vectors: float64 [heads, features, dim], rows a_f.
        constant: [heads or 1, features], c_f.
        mean: float64 [heads, 1, dim].
        root: float64 [heads, n, dim]; where r is a square, r(k) = |root k|^2 / 2.
    """

    vectors: Tensor
    constant: Tensor
    mean: Tensor
    root: Tensor


@dataclass(frozen=True)
class Exponents:
    """Logarithms of the features of some heads, from the queries and keys themselves.

    Attributes:
        query, key: the two sides.
        mean: float32 [heads, dim]; its product with a query is a shift of the query.
        features: how many there are, padding included.
        squares: r is a square; otherwise 0 for keys, and what makes features add up to 1 for
            queries.
    """

    query: Side
    key: Side
    mean: Tensor
    features: int
    squares: bool


@dataclass(frozen=True)
class _Kind:
    """What the kernels are compiled for."""

    head_dim: int
    value_dim: int
    features: int
    squares: bool
    chunk: int
    dtype: torch.dtype


def part(
    exponents: Exponents,
    chunk: int,
    inputs: Inputs,
    blocks: Tensor,
    floor: Tensor,
    sinks: Sequence[int],
    chunks: int,
) -> Part | None:
    """What the keys before `floor` contribute to the rows of `blocks`, as `Compressor.part`.

    Numerators, masses and shifts are float32, whatever the dtype of the inputs.

    Args:
        exponents: of the heads and the dtype of the call, see `packed`.
        chunk: keys per chunk.
        inputs, blocks, floor, sinks, chunks: as in `Compressor.part`.

    Returns:
        None where no query block reads a chunk.

    Raises:
        ValueError: a dtype that the kernels cannot do.
    """
    query, key, value = (
        t if t.stride(3) == 1 else t.contiguous() for t in (inputs.query, inputs.key, inputs.value)
    )
    _check(query, key, value)
    batch, heads, queries, head_dim = query.shape
    value_dim = value.shape[3]
    if chunks < 1 or queries == 0 or len(blocks) == 0:
        return None
    kind = _Kind(head_dim, value_dim, exponents.features, exponents.squares, chunk, query.dtype)
    ints = [
        integers(tuple(numbers), query.device) for numbers in (inputs.start, inputs.kv_head, sinks)
    ]
    blocks, floor = blocks.contiguous(), floor.contiguous()
    size = (batch, heads, len(blocks) * BLOCK)
    numerator = query.new_empty(*size, value_dim, dtype=torch.float32)
    mass, shift = query.new_empty(2, *size, dtype=torch.float32)
    step = max(1, NUMBERS // (batch * chunks * exponents.features * value_dim))
    with torch.cuda.device_of(query):
        for first in range(0, heads, step):
            some = min(step, heads - first)
            states = _sum_chunks(key, value, exponents.key, ints, kind, (chunks, first, some))
            _read_states(
                query, exponents, states, (ints[0], blocks, floor),
                (numerator, mass, shift), kind, (chunks, first, some),
            )  # fmt: skip
    return Part(numerator, mass, shift, tuple(range(heads)))


def packed(
    query: Centred, key: Centred, mean: Tensor, squares: bool, dtype: torch.dtype
) -> Exponents:
    """Logarithms of features as the kernels read them; what it computes it computes in float64.

    Args:
        query, key: the two sides, with as many features.
        mean: [heads, dim], its product with a query is a shift of the query.
        squares: as in `Exponents`.
        dtype: of the inputs.
    """
    features = query.vectors.shape[-2]
    block = block_of_features(features, dtype)
    features = -(-features // block) * block
    sides = []
    for side in (query, key):
        constant = side.constant.double() - (side.vectors * side.mean).sum(-1)
        made = _padded(side.vectors * LOG2E.value, constant * LOG2E.value, features, LOW.value)
        if squares:  # r = |x|^2 / 2
            root = side.root * (LOG2E.value / 2) ** 0.5
            more = _padded(root, -(root * side.mean).sum(-1), block_of(root.shape[2]), 0.0)
            made = torch.cat([made[0], more[0]], 1), torch.cat([made[1], more[1]], 1)
        sides.append(_side(*made, dtype))
    mean = torch.nn.functional.pad(mean, (0, block_of(mean.shape[1]) - mean.shape[1]))
    return Exponents(sides[0], sides[1], mean.float().contiguous(), features, squares)


def _padded(rows: Tensor, constant: Tensor, count: int, empty: float) -> tuple[Tensor, Tensor]:
    """Rows [heads, n, dim] and constants [heads, n], of whole blocks and `count` rows."""
    more, pad = count - rows.shape[1], torch.nn.functional.pad
    rows = pad(rows, (0, block_of(rows.shape[2]) - rows.shape[2], 0, more))
    return rows, pad(constant, (0, more), value=empty)


def _side(rows: Tensor, constant: Tensor, dtype: torch.dtype) -> Side:
    """Rows as sums of pieces, each row in a unit of its own so that halves can hold it."""
    unit = rows.abs().amax(-1).clamp(min=1e-30).log2().ceil().exp2()
    left, pieces = rows / unit[..., None], []
    for _ in range(pieces_of(dtype)):
        pieces.append(left.to(dtype))
        left = left - pieces[-1].double()
    return Side(torch.stack(pieces, 1), torch.stack([unit, constant], 1).float())


def pieces_of(dtype: torch.dtype) -> int:
    """How many numbers of a dtype add up to a number of a vector."""
    return 1 if dtype == torch.float32 else 2


def block_of(dim: int) -> int:
    """Numbers of a row, padding included."""
    return int(max(16, triton.next_power_of_2(dim)))


def block_of_features(features: int, dtype: torch.dtype) -> int:
    """Features that a program has at hand; there are whole blocks of them."""
    most = 32 if dtype == torch.float32 else 64
    return int(max(16, min(most, triton.next_power_of_2(features))))


def _sum_chunks(
    key: Tensor,
    value: Tensor,
    side: Side,
    ints: Sequence[Tensor],
    kind: _Kind,
    sizes: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """States after the first 1, 2, ... chunks, for `some` heads from `first` on.

    Args:
        ints: starts, kv heads and sinks, int32.
        sizes: chunks, first, some.

    Returns:
        Means [batch, some, chunks, features, value_dim], in the dtype of the inputs, and log-mass
        float32 [batch, some, chunks, features].
    """
    chunks, first, some = sizes
    size = (key.shape[0], some, chunks, kind.features)
    means = key.new_empty(*size, kind.value_dim, dtype=torch.float32)
    state = torch.empty_like(means, dtype=kind.dtype)
    log_mass, state_log_mass = key.new_empty(2, *size, dtype=torch.float32)
    terms = log_mass  # not read
    if kind.squares:
        terms = _square_rows(key, side, ints[1], kind, key.shape[2], sizes)
    made, options = states_constants(kind)
    strides = (*key.stride()[:3], *value.stride()[:3])
    tensors = (key, value, terms, side.vectors, side.affine, *ints, means, log_mass)
    aligned = are_aligned(tensors, strides)
    _sum(
        (chunks * (kind.features // made["BLOCK_F"]), some, key.shape[0]),
        (*tensors, *strides, key.shape[2], chunks, first),
        made,
        options,
        (kind, key.device) if aligned else None,
    )
    made, options = prefix_constants(kind)
    tensors = (means, log_mass, state, state_log_mass)
    _accumulate(
        (kind.features // made["BLOCK_F"], some, key.shape[0]),
        (*tensors, chunks),
        made,
        options,
        (kind, key.device) if are_aligned(tensors, ()) else None,
    )
    return state, state_log_mass


def _square_rows(
    rows: Tensor,
    side: Side,
    head: Tensor,
    kind: _Kind,
    count: int,
    sizes: tuple[int, int, int],
) -> Tensor:
    """The squares of rows for `some` heads from `first` on, float32 [batch, some, count].

    Args:
        rows: [batch, heads, rows, head_dim]; what `count` is more are zeros.
        head: int32, for each head of `side` that of `rows`.
        sizes: chunks, first, some.
    """
    _, first, some = sizes
    terms = rows.new_empty(rows.shape[0], some, count, dtype=torch.float32)
    made, options = squares_constants(kind)
    tensors, strides = (rows, side.vectors, side.affine, head, terms), rows.stride()[:3]
    _square(
        (-(-count // made["ROWS"]), some, rows.shape[0]),
        (*tensors, *strides, rows.shape[2], count, first),
        made,
        options,
        (kind, rows.device) if are_aligned(tensors, strides) else None,
    )
    return terms


def _read_states(
    query: Tensor,
    exponents: Exponents,
    states: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor, Tensor],
    kind: _Kind,
    sizes: tuple[int, int, int],
) -> None:
    """Write numerator, mass and shift of `some` heads from `first` on.

    Args:
        places: starts, blocks and floors.
        sizes: chunks, first, some.
    """
    chunks, first, some = sizes
    batch, heads, queries = query.shape[:3]
    made, options = read_constants(kind)
    side = exponents.query
    terms = states[1]  # not read
    if kind.squares:
        head = integers(tuple(range(heads)), query.device)
        terms = _square_rows(query, side, head, kind, -(-queries // BLOCK) * BLOCK, sizes)
    tensors = (query, terms, side.vectors, side.affine, exponents.mean, *states, *places, *out)
    strides = query.stride()[:3]
    blocks = len(places[1])
    _answer(
        (blocks * (BLOCK // made["ROWS"]), some, batch),
        (*tensors, *strides, queries, blocks, heads, chunks, first),
        made,
        options,
        (kind, query.device) if are_aligned(tensors, strides) else None,
    )


@cache
def squares_constants(kind: _Kind) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """What the kernel of squares is compiled for, and its launch options."""
    names = ("HEAD_DIM", "BLOCK_D", "FEATURES", "PIECES")
    made = {name: x for name, x in _constants(kind).items() if name in names}
    single = kind.dtype == torch.float32
    made |= {"ROWS": 32 if single else 64, "BLOCK_C": min(made["BLOCK_D"], 32 if single else 64)}
    return made, _options(kind) | ({} if single else {"num_warps": 4})


@cache
def states_constants(kind: _Kind) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """What the kernel that sums chunks is compiled for, and its launch options."""
    single = kind.dtype == torch.float32
    made = _constants(kind) | {"CHUNK": kind.chunk, "ROWS": 32 if single else 64}
    # two or three programs of four warps share a multiprocessor
    return made, _options(kind) | ({} if single else {"num_warps": 4})


@cache
def prefix_constants(kind: _Kind) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernel that adds up chunks is compiled for, and its launch options."""
    made = {"VALUE_DIM": kind.value_dim, "BLOCK_V": block_of(kind.value_dim)}
    options = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": True}
    return made | {"FEATURES": kind.features, "BLOCK_F": 16}, options


@cache
def read_constants(kind: _Kind) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """What the kernel that reads states is compiled for, and its launch options."""
    single = kind.dtype == torch.float32
    made = _constants(kind) | {"CHUNK": kind.chunk, "BLOCK": BLOCK, "ROWS": 16 if single else BLOCK}
    if max(kind.head_dim, kind.value_dim) > 64:
        made["BLOCK_F"] = min(made["BLOCK_F"], 32)
    return made, _options(kind)


def _constants(kind: _Kind) -> dict[str, int | bool]:
    return {
        "HEAD_DIM": kind.head_dim,
        "VALUE_DIM": kind.value_dim,
        "BLOCK_D": block_of(kind.head_dim),
        "BLOCK_V": block_of(kind.value_dim),
        "FEATURES": kind.features,
        "BLOCK_F": block_of_features(kind.features, kind.dtype),
        "PIECES": pieces_of(kind.dtype),
        "SQUARES": kind.squares,
    }


def _options(kind: _Kind) -> dict[str, int | bool]:
    options: dict[str, int | bool] = {"enable_fp_fusion": True}
    if kind.dtype == torch.float32:
        return options | {"num_warps": 8, "num_stages": 1}
    wide = max(kind.head_dim, kind.value_dim) > 64
    return options | {"num_warps": 8 if wide else 4, "num_stages": 2}


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"sums of features are computed in {known}, got {query.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must share a dtype, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )


@triton.jit(do_not_specialize=("length", "count", "first"))
def _squares(
    x, vectors, affine, x_head, terms, x_batch_stride, x_head_stride, x_row_stride,
    length, count, first,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    FEATURES: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    VECTORS: tl.constexpr = FEATURES + BLOCK_D
    head = first + tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    x += batch * x_batch_stride + tl.load(x_head + head).to(tl.int64) * x_head_stride
    row = _load(x + r.to(tl.int64)[:, None] * x_row_stride, r < length, d, HEAD_DIM, BLOCK_D)
    vectors += head * (PIECES * VECTORS * BLOCK_D) + FEATURES * BLOCK_D
    affine += head * (2 * VECTORS) + FEATURES
    total = tl.zeros([ROWS], tl.float32)
    for part in tl.range(0, BLOCK_D, BLOCK_C):
        c = part + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        a, a_rest = _pieces(vectors, c, d, VECTORS, BLOCK_D, PIECES)
        y = tl.dot(row, a.T, input_precision="ieee")
        if PIECES == 2:
            y = tl.dot(row, a_rest.T, y, input_precision="ieee")
        y = y * tl.load(affine + c)[None, :] + tl.load(affine + VECTORS + c)[None, :]
        total += tl.sum(y * y, 1)
    terms += (batch * tl.num_programs(1) + tl.program_id(1)) * count
    tl.store(terms + r, total, mask=r < count)


@triton.jit(do_not_specialize=("keys", "chunks", "first"))
def _chunk_sums(
    key, value, terms, vectors, affine, start, kv_head, sinks, means, log_mass,
    key_batch, key_head, key_row, value_batch, value_head, value_row, keys, chunks, first,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, PIECES: tl.constexpr, SQUARES: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = FEATURES // BLOCK_F
    VECTORS: tl.constexpr = FEATURES + (BLOCK_D if SQUARES else 0)
    chunk = tl.program_id(0) // PARTS
    head = first + tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) % PARTS * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    r = tl.arange(0, ROWS)  # [ROWS]
    vectors += head * (PIECES * VECTORS * BLOCK_D)
    affine += head * (2 * VECTORS)
    kv = tl.load(kv_head + head).to(tl.int64)
    padding = tl.load(start + batch)
    begin = padding + chunk * CHUNK
    real_from = padding + tl.load(sinks + head)
    end = tl.minimum(begin + CHUNK, keys)
    key += batch * key_batch + kv * key_head
    value += batch * value_batch + kv * value_head
    terms += (batch * tl.num_programs(1) + tl.program_id(1)) * keys
    a, a_rest = _pieces(vectors, f, d, VECTORS, BLOCK_D, PIECES)
    unit = tl.load(affine + f)
    constant = tl.load(affine + VECTORS + f)

    shift = tl.full([BLOCK_F], LOW, tl.float32)
    mass = tl.zeros([BLOCK_F], tl.float32)
    numerator = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    for row in tl.range(begin, begin + CHUNK, ROWS):
        j = row + r
        real = (j >= real_from) & (j < end)
        k = _load(key + j.to(tl.int64)[:, None] * key_row, real, d, HEAD_DIM, BLOCK_D)
        v = _load(value + j.to(tl.int64)[:, None] * value_row, real, e, VALUE_DIM, BLOCK_V)
        logs = tl.dot(a, k.T, input_precision="ieee")
        if PIECES == 2:
            logs = tl.dot(a_rest, k.T, logs, input_precision="ieee")
        logs = logs * unit[:, None] + constant[:, None]
        if SQUARES:
            logs -= tl.load(terms + j, mask=real, other=0.0)[None, :]
        logs = tl.where(real[None, :], logs, float("-inf"))
        new_shift = tl.maximum(shift, tl.max(logs, 1))
        weights = tl.math.exp2(logs - new_shift[:, None])
        rescale = tl.math.exp2(shift - new_shift)
        mass = mass * rescale + tl.sum(weights, 1)
        numerator = numerator * rescale[:, None]
        numerator = tl.dot(weights.to(v.dtype), v, numerator, input_precision="ieee")
        shift = new_shift

    some = tl.num_programs(1)
    at = ((batch * some + tl.program_id(1)) * chunks + chunk) * FEATURES + f
    seen = tl.where(mass == 0, 1.0, mass)
    tl.store(log_mass + at, tl.where(mass == 0, LOW, shift + tl.math.log2(seen)))
    tl.store(
        means + at[:, None] * VALUE_DIM + e[None, :],
        numerator / seen[:, None],
        mask=(e < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=("chunks",))
def _prefix_sums(
    means, log_mass, state, state_log_mass, chunks,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, FEATURES: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    is_number = (e < VALUE_DIM)[None, :]
    shift = tl.full([BLOCK_F], LOW, tl.float32)
    mass = tl.zeros([BLOCK_F], tl.float32)
    numerator = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    for chunk in tl.range(0, chunks, num_stages=4):
        at = (head * chunks + chunk) * FEATURES + f
        cells = at[:, None] * VALUE_DIM + e[None, :]
        logs = tl.load(log_mass + at)
        mean = tl.load(means + cells, mask=is_number, other=0.0)
        new_shift = tl.maximum(shift, logs)
        rescale = tl.math.exp2(shift - new_shift)
        weight = tl.math.exp2(logs - new_shift)
        mass = mass * rescale + weight
        numerator = numerator * rescale[:, None] + mean * weight[:, None]
        shift = new_shift
        tl.store(state_log_mass + at, shift + tl.math.log2(mass))
        made = (numerator / mass[:, None]).to(state.dtype.element_ty)
        tl.store(state + cells, made, mask=is_number)


@triton.jit(do_not_specialize=("queries", "blocks", "heads", "chunks", "first"))
def _read(
    query, terms, vectors, affine, mean, state, state_log_mass, start, block, floor,
    numerators, masses, shifts,
    query_batch, query_head, query_row, queries, blocks, heads, chunks, first,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, PIECES: tl.constexpr, SQUARES: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK // ROWS
    VECTORS: tl.constexpr = FEATURES + (BLOCK_D if SQUARES else 0)
    place = tl.program_id(0) // PARTS
    head = first + tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    e = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    r = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)  # [ROWS]
    before = tl.load(floor + (batch * heads + head) * blocks + place) - tl.load(start + batch)
    chunk = before.to(tl.int32) // CHUNK - 1  # the last that the block reads
    at = ((batch * heads + head) * blocks + place) * BLOCK + r
    cells = numerators + at[:, None] * VALUE_DIM + e[None, :]
    is_number = (e < VALUE_DIM)[None, :]
    if chunk < 0:
        tl.store(cells, tl.zeros([ROWS, BLOCK_V], tl.float32), mask=is_number)
        tl.store(masses + at, tl.zeros([ROWS], tl.float32))
        tl.store(shifts + at, tl.full([ROWS], LOW, tl.float32))
        return

    q_row = tl.load(block + place) * BLOCK + r
    query += batch * query_batch + head.to(tl.int64) * query_head
    q = _load(
        query + q_row.to(tl.int64)[:, None] * query_row, q_row < queries, d, HEAD_DIM, BLOCK_D
    )
    vectors += head * (PIECES * VECTORS * BLOCK_D)
    affine += head * (2 * VECTORS)
    state_at = ((batch * tl.num_programs(1) + tl.program_id(1)) * chunks + chunk) * FEATURES
    state += state_at * VALUE_DIM
    state_log_mass += state_at

    shift = tl.full([ROWS], LOW, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    numerator = tl.zeros([ROWS, BLOCK_V], tl.float32)
    top = tl.full([ROWS], LOW, tl.float32)  # of the query's features alone
    total = tl.zeros([ROWS], tl.float32)
    for part in tl.range(0, FEATURES, BLOCK_F):
        f = part + tl.arange(0, BLOCK_F)  # [BLOCK_F]
        a, a_rest = _pieces(vectors, f, d, VECTORS, BLOCK_D, PIECES)
        unit = tl.load(affine + f)
        constant = tl.load(affine + VECTORS + f)
        logs = tl.dot(q, a.T, input_precision="ieee")
        if PIECES == 2:
            logs = tl.dot(q, a_rest.T, logs, input_precision="ieee")
        logs = logs * unit[None, :] + constant[None, :]
        if not SQUARES:
            new_top = tl.maximum(top, tl.max(logs, 1))
            ones = tl.sum(tl.math.exp2(logs - new_top[:, None]), 1)
            total = total * tl.math.exp2(top - new_top) + ones
            top = new_top
        logs += tl.load(state_log_mass + f)[None, :]
        u = tl.load(state + f[:, None] * VALUE_DIM + e[None, :], mask=is_number, other=0.0)
        new_shift = tl.maximum(shift, tl.max(logs, 1))
        weights = tl.math.exp2(logs - new_shift[:, None])
        rescale = tl.math.exp2(shift - new_shift)
        mass = mass * rescale + tl.sum(weights, 1)
        numerator = numerator * rescale[:, None]
        numerator = tl.dot(weights.to(u.dtype), u, numerator, input_precision="ieee")
        shift = new_shift

    # states that hold no key have the log-mass LOW
    mass = tl.where(shift < 0.5 * LOW, 0.0, mass)
    if SQUARES:
        rows = tl.cdiv(queries, BLOCK) * BLOCK
        terms += (batch * tl.num_programs(1) + tl.program_id(1)) * rows
        shift -= tl.load(terms + q_row)
    else:
        shift -= top + tl.math.log2(total)
    m = tl.load(mean + head * BLOCK_D + d)
    shift = shift * LN2 + tl.sum(q.to(tl.float32) * m[None, :], 1)
    tl.store(cells, numerator, mask=is_number)
    tl.store(masses + at, mass)
    tl.store(shifts + at, shift)


_square = Launcher(_squares)
_sum = Launcher(_chunk_sums)
_accumulate = Launcher(_prefix_sums)
_answer = Launcher(_read)


@triton.jit
def _pieces(vectors, f, d, VECTORS: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr):
    """The two pieces of some vectors, [rows, BLOCK_D]; twice the same where there is one."""
    cells = vectors + f[:, None] * BLOCK_D + d[None, :]
    a = tl.load(cells)
    rest = a
    if PIECES == 2:
        rest = tl.load(cells + VECTORS * BLOCK_D)
    return a, rest


@triton.jit
def _load(rows, is_row, d, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of `DIM` numbers, padded with 0 to `BLOCK_DIM`; 0 where there is no row."""
    mask = is_row[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (d < DIM)[None, :]
    return tl.load(rows + d[None, :], mask=mask, other=0.0)
