"""The Triton engine computes what the reference defines, in the interpreter or on a GPU."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnplan.kernels.engines.gpu import prefill as gpu_prefill
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import (
    BLOCK,
    CONTIGUOUS,
    FULL,
    GATHER,
    SLOTS,
    TileList,
    empty,
    from_rows,
    pack_bits,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    slots: int = 0

    @property
    def kv_head(self) -> tuple[int, ...]:
        return tuple(head * self.kv_heads // self.heads for head in range(self.heads))


CASES = [
    pytest.param(Case(2, 3, 1, 130, 150, 64, 64, 128), id="batch-gqa-ragged-slots"),
    pytest.param(Case(1, 2, 2, 100, 300, 16, 32), id="chunked-prefill"),
    pytest.param(Case(1, 2, 1, 70, 200, 80, 96, 64), id="padded-dims-slots"),
    pytest.param(Case(1, 1, 1, 64, 128, 128, 128), id="whole-blocks"),
    pytest.param(Case(2, 2, 1, 1, 70, 64, 64), id="decode"),
    pytest.param(Case(1, 1, 1, 1, 1, 16, 16), id="length-1"),
]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """An output that the kernel does not write cannot pass by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kv = (case.batch, case.kv_heads, case.keys)
    query = torch.randn(case.batch, case.heads, case.queries, case.head_dim, generator=generator)
    key = torch.randn(*kv, case.head_dim, generator=generator)
    value = torch.randn(*kv, case.value_dim, generator=generator)
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype), value.to(DEVICE, dtype)


def signed_slots(case: Case, dtype: torch.dtype) -> Slots | None:
    """Slots for all heads but the first; every eighth has a negative weight, every ninth none."""
    if not case.slots:
        return None
    generator = torch.Generator().manual_seed(1)
    size = (case.batch, max(case.heads - 1, 1), case.slots)
    weight = 0.5 + torch.rand(size, generator=generator)
    weight[..., ::8] *= -0.3
    log_weight = torch.randn(size, generator=generator)
    log_weight[..., ::9] = float("-inf")
    head = torch.arange(-1, case.heads - 1, dtype=torch.int32) if case.heads > 1 else torch.zeros(1)
    return Slots(
        torch.randn(*size, case.head_dim, generator=generator).to(DEVICE, dtype),
        log_weight.to(DEVICE),
        weight.to(DEVICE),
        torch.randn(*size, case.value_dim, generator=generator).to(DEVICE, dtype),
        head.int().to(DEVICE),
    )


def mixed_list(case: Case, seed: int) -> TileList:
    """Tiles of every kind in any order; some rows of the list, and some queries, read nothing."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=generator) < share)

    def some_mask() -> int:
        if chance(0.3):
            return FULL
        keep = torch.rand(BLOCK, BLOCK, generator=generator) < 0.5
        keep[torch.rand(BLOCK, generator=generator) < 0.1] = False
        masks.append(pack_bits(keep))
        return len(masks) - 1

    blocks = -(-case.queries // BLOCK)
    row, tiles, gather, masks = [], [], [], []
    for r in range(case.batch * case.heads * blocks):
        if chance(0.1):
            continue
        mine: list[tuple[int, int, int]] = []
        free = torch.ones(case.keys, dtype=torch.bool)
        for block in range(-(-case.keys // BLOCK)):
            if chance(0.6):
                mask = some_mask()
                if (block + 1) * BLOCK > case.keys and mask == FULL:
                    masks.append(torch.full((BLOCK,), -1, dtype=torch.int64))
                    mask = len(masks) - 1
                mine.append((CONTIGUOUS, block, mask))
                free[block * BLOCK : (block + 1) * BLOCK] = False
        left = free.nonzero()[:, 0]
        if len(left):
            chosen = left[torch.randperm(len(left), generator=generator)[:BLOCK]]
            columns = torch.full((BLOCK,), -1, dtype=torch.int32)
            columns[torch.randperm(BLOCK, generator=generator)[: len(chosen)]] = chosen.int()
            mask = some_mask()
            if mask == FULL and len(chosen) < BLOCK:
                masks.append(pack_bits(columns >= 0).expand(BLOCK))
                mask = len(masks) - 1
            mine.append((GATHER, len(gather), mask))
            gather.append(columns)
        if case.slots and r // blocks % case.heads > 0:
            mine += [(SLOTS, index, some_mask()) for index in range(case.slots // BLOCK)]
        order = torch.randperm(len(mine), generator=generator).tolist()
        tiles += [mine[t] for t in order]
        row += [r] * len(mine)
    none = empty(case.batch, case.heads, blocks, torch.device("cpu"))
    return from_rows(
        case.batch,
        case.heads,
        blocks,
        torch.tensor(row, dtype=torch.int64),
        torch.tensor(tiles).view(-1, 3),
        torch.stack(gather) if gather else none.gather,
        torch.stack(masks) if masks else none.masks,
    ).to(DEVICE)


def one_row(*tiles: tuple[int, int, int], gather: Tensor | None = None, masks: Tensor) -> TileList:
    """The list of a single row."""
    return from_rows(
        1,
        1,
        1,
        torch.zeros(len(tiles), dtype=torch.int64),
        torch.tensor(tiles),
        torch.zeros(0, BLOCK, dtype=torch.int32) if gather is None else gather,
        masks,
    ).to(DEVICE)


def assert_as_accurate(actual: Tensor, low: Tensor, exact: Tensor) -> None:
    """The kernel may err at most twice as much as torch does at the same precision."""
    assert torch.equal(actual == float("-inf"), exact == float("-inf"))
    finite = exact.isfinite()
    actual, low, exact = actual[finite], low[finite], exact[finite]
    if exact.numel() == 0:
        return
    assert actual.isfinite().all()
    rounding = torch.finfo(low.dtype).eps * exact.abs().max()
    budget = 2 * ((low.double() - exact).abs().max() + rounding)
    assert (actual.double() - exact).abs().max() <= budget


def assert_matches_reference(
    case: Case, dtype: torch.dtype, tiles: TileList, slots: Slots | None = None
) -> None:
    tensors = inputs(case, dtype)
    common = {"scale": case.head_dim**-0.5, "kv_head": case.kv_head, "tiles": tiles, "slots": slots}
    output, log_mass = gpu_prefill.attend(*tensors, **common)
    assert output.dtype == dtype and log_mass.dtype == torch.float32
    low_output, low_log_mass = reference_prefill.attend(*tensors, **common)
    exact_output, exact_log_mass = reference_prefill.attend(
        *(x.double() for x in tensors), **common
    )
    assert_as_accurate(output, low_output, exact_output)
    assert_as_accurate(log_mass, low_log_mass, exact_log_mass)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_list_gives_what_the_reference_gives(dtype: torch.dtype, case: Case) -> None:
    for seed in range(2):
        assert_matches_reference(case, dtype, mixed_list(case, seed), signed_slots(case, dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("copies", [False, True], ids=["loads", "copies"])
def test_tile_copies_and_loads_give_the_same(
    copies: bool, dtype: torch.dtype, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copies and DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this device has no tile copies")
    monkeypatch.setattr(gpu_prefill, "_has_tile_copies", lambda _: copies)
    assert_matches_reference(case, dtype, mixed_list(case, 2), signed_slots(case, dtype))


def test_tile_copies_need_rows_at_multiples_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_prefill, "_has_tile_copies", lambda _: True)
    whole = torch.zeros(1, 2, 70, 64, dtype=torch.bfloat16)
    assert gpu_prefill.copies_tiles(DEVICE, whole)
    assert not gpu_prefill.copies_tiles(DEVICE, whole.float())
    assert not gpu_prefill.copies_tiles(DEVICE, whole, torch.zeros_like(whole)[..., 1:])
    assert not gpu_prefill.copies_tiles(DEVICE, torch.zeros(1, 2, 70, 60, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_reads_nothing_is_zero(dtype: torch.dtype) -> None:
    case = Case(1, 1, 1, 3, 64, 16, 16)
    masks = torch.zeros(1, BLOCK, dtype=torch.int64)
    masks[0, 1] = 1
    tiles = one_row((CONTIGUOUS, 0, 0), masks=masks)
    query, key, value = inputs(case, dtype)
    output, log_mass = gpu_prefill.attend(query, key, value, scale=1.0, kv_head=(0,), tiles=tiles)
    assert torch.equal(output[0, 0, [0, 2]], torch.zeros_like(output[0, 0, [0, 2]]))
    assert torch.equal(output[0, 0, 1], value[0, 0, 0])
    assert (log_mass[0, 0] == float("-inf")).tolist() == [True, False, True]


def test_a_list_without_tiles_gives_zeros() -> None:
    query, key, value = inputs(Case(2, 2, 1, 70, 70, 16, 16), torch.float32)
    tiles = empty(2, 2, 2, DEVICE)
    output, log_mass = gpu_prefill.attend(query, key, value, scale=1.0, kv_head=(0, 0), tiles=tiles)
    assert not output.any() and (log_mass == float("-inf")).all()


@pytest.mark.parametrize("column", [0, 31, 32, 63])
@pytest.mark.parametrize("kind", [CONTIGUOUS, GATHER])
def test_every_bit_of_a_mask_word_names_its_column(kind: int, column: int) -> None:
    case = Case(1, 1, 1, BLOCK, BLOCK, 16, 16)
    query, key, value = inputs(case, torch.float32)
    keep = torch.zeros(BLOCK, BLOCK, dtype=torch.bool)
    keep[:, column] = True
    keys = torch.arange(BLOCK - 1, -1, -1, dtype=torch.int32)
    tiles = one_row((kind, 0, 0), gather=keys[None], masks=pack_bits(keep)[None])
    output, _ = gpu_prefill.attend(query, key, value, scale=1.0, kv_head=(0,), tiles=tiles)
    read = column if kind == CONTIGUOUS else BLOCK - 1 - column
    # a GPU divides by a mass of 1 with an error in the last place
    torch.testing.assert_close(output[0, 0], value[0, 0, read].expand(BLOCK, 16), atol=0, rtol=1e-6)


def test_a_column_without_a_key_is_not_read() -> None:
    case = Case(1, 1, 1, BLOCK, BLOCK, 16, 16)
    keys = torch.full((1, BLOCK), -1, dtype=torch.int32)
    keys[0, 63], keys[0, 5] = 63, 7
    tiles = one_row(
        (GATHER, 0, 0), gather=keys, masks=torch.full((1, BLOCK), -1, dtype=torch.int64)
    )
    assert_matches_reference(case, torch.float32, tiles)


def test_a_contiguous_tile_ends_with_the_text() -> None:
    case = Case(1, 1, 1, 70, 70, 16, 16)
    query, key, value = inputs(case, torch.float32)
    tiles = from_rows(
        1,
        1,
        2,
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([(CONTIGUOUS, 0, FULL), (CONTIGUOUS, 1, FULL)] * 2),
        torch.zeros(0, BLOCK, dtype=torch.int32),
        torch.zeros(0, BLOCK, dtype=torch.int64),
    ).to(DEVICE)
    output, _ = gpu_prefill.attend(query, key, value, scale=0.25, kv_head=(0,), tiles=tiles)
    expected = torch.softmax(query @ key.mT * 0.25, dim=-1) @ value
    torch.testing.assert_close(output, expected)


def test_an_empty_slot_adds_nothing() -> None:
    case = Case(1, 1, 1, BLOCK, BLOCK, 16, 16, slots=BLOCK)
    query, key, value = inputs(case, torch.float32)
    slots = signed_slots(case, torch.float32)
    assert slots is not None
    slots = dataclasses.replace(slots, log_weight=torch.full_like(slots.weight, float("-inf")))
    masks = torch.zeros(0, BLOCK, dtype=torch.int64)
    near = one_row((CONTIGUOUS, 0, FULL), masks=masks)
    both = one_row((CONTIGUOUS, 0, FULL), (SLOTS, 0, FULL), masks=masks)
    far = one_row((SLOTS, 0, FULL), masks=masks)
    common = {"scale": 0.25, "kv_head": (0,)}
    expected = gpu_prefill.attend(query, key, value, tiles=near, **common)
    actual = gpu_prefill.attend(query, key, value, tiles=both, slots=slots, **common)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    output, log_mass = gpu_prefill.attend(query, key, value, tiles=far, slots=slots, **common)
    assert not output.any() and (log_mass == float("-inf")).all()


def test_large_logits_neither_overflow_nor_vanish() -> None:
    case = Case(1, 1, 1, BLOCK, 2 * BLOCK, 16, 16)
    query, key, value = inputs(case, torch.float32)
    tiles = one_row(
        (CONTIGUOUS, 0, FULL), (CONTIGUOUS, 1, FULL), masks=torch.zeros(0, BLOCK, dtype=torch.int64)
    )
    common = {"scale": 100.0, "kv_head": (0,), "tiles": tiles}
    output, log_mass = gpu_prefill.attend(query, key, value, **common)
    exact = reference_prefill.attend(query.double(), key.double(), value.double(), **common)
    low = reference_prefill.attend(query, key, value, **common)
    assert_as_accurate(output, low[0], exact[0])
    assert_as_accurate(log_mass, low[1], exact[1])


def test_strided_tensors_are_read_in_place() -> None:
    case = Case(2, 2, 1, 70, 70, 16, 16)
    tiles = mixed_list(case, 0)
    tensors = inputs(case, torch.float32)
    common = {"scale": 0.25, "kv_head": case.kv_head, "tiles": tiles}
    expected = gpu_prefill.attend(*tensors, **common)
    as_in_models = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    columns_first = [x.mT.contiguous().mT for x in tensors]
    for strided in (as_in_models, columns_first):
        actual = gpu_prefill.attend(*strided, **common)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_output_is_laid_out_as_models_want_it() -> None:
    case = Case(1, 2, 1, 70, 70, 16, 16)
    output, _ = gpu_prefill.attend(
        *inputs(case, torch.float32), scale=1.0, kv_head=case.kv_head, tiles=mixed_list(case, 0)
    )
    assert output.transpose(1, 2).is_contiguous()


def test_rows_start_longest_first_and_only_whole_blocks_go_without_a_mask() -> None:
    case = Case(1, 2, 1, 200, 200, 16, 16)
    tiles = mixed_list(case, 0)
    schedule = gpu_prefill.schedule_of(tiles, case.keys, case.kv_head)
    lengths = (schedule.work[:, 6] - schedule.work[:, 1]).tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(schedule.work[:, 0].tolist()) == list(range(tiles.rows))
    for _, full, until, *_ in schedule.work.tolist():
        assert (schedule.mask[full:until] == FULL).all()
        assert ((schedule.index[full:until] + 1) * BLOCK <= case.keys).all()


def test_the_schedule_of_a_list_is_made_once_and_dies_with_it() -> None:
    case = Case(1, 2, 1, 70, 70, 16, 16)
    tiles = mixed_list(case, 0)
    schedule = gpu_prefill.schedule_of(tiles, case.keys, case.kv_head)
    assert gpu_prefill.schedule_of(tiles, case.keys, case.kv_head) is schedule
    assert gpu_prefill.schedule_of(tiles, case.keys, (0, 1)) is not schedule
    alive = weakref.ref(schedule)
    del tiles, schedule
    gc.collect()
    assert alive() is None


def test_what_the_kernel_cannot_do_is_refused() -> None:
    query, key, value = inputs(Case(1, 1, 1, 70, 70, 16, 16), torch.float32)
    tiles = empty(1, 1, 2, DEVICE)
    common = {"kv_head": (0,), "tiles": tiles}
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        gpu_prefill.attend(query.double(), key.double(), value.double(), scale=1.0, **common)
    with pytest.raises(ValueError, match="share a dtype"):
        gpu_prefill.attend(query, key.half(), value, scale=1.0, **common)
    with pytest.raises(ValueError, match=r"list is on meta.* move it with TileList\.to"):
        meta = tiles.to(torch.device("meta"))
        gpu_prefill.attend(query, key, value, scale=1.0, kv_head=(0,), tiles=meta)
    with pytest.raises(ValueError, match="scale must be more than 0, got -1"):
        gpu_prefill.attend(query, key, value, scale=-1.0, **common)
    with pytest.raises(ValueError, match=r"\(1, 1, 2\), the query has \(1, 1, 1\)"):
        gpu_prefill.attend(query[:, :, :64], key, value, scale=1.0, **common)
