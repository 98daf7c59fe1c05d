"""The CPU engine, compiled and in torch alone, against the float64 reference."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnplan.kernels.engines.cpu import prefill as cpu_prefill
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.native import build
from attnplan.kernels.operands import tile_list
from attnplan.kernels.operands.slots import Slots
from attnplan.kernels.operands.tile_list import (
    BLOCK,
    CONTIGUOUS,
    FULL,
    GATHER,
    SLOTS,
    TAKEN,
    TileList,
)

Engine = Callable[..., tuple[Tensor, Tensor]]
ENGINES = [cpu_prefill.attend, cpu_prefill.attend_torch]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """One call, and how its tiles are drawn."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 1
    kv_heads: int = 2
    group: int = 2
    queries: int = 100
    keys: int = 170
    head_dim: int = 64
    value_dim: int = 64
    density: float = 0.5
    norm: float = 1.0
    slots: int = 0

    def draw(self) -> tuple[Tensor, Tensor, Tensor, dict[str, object]]:
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group

        def randn(count: int, rows: int, width: int) -> Tensor:
            size = (self.batch, rows, count, width)  # as a model's projections come
            return torch.randn(size, generator=generator).to(self.dtype).transpose(1, 2)

        query = randn(heads, self.queries, self.head_dim) * self.norm
        key = randn(self.kv_heads, self.keys, self.head_dim) * self.norm
        value = randn(self.kv_heads, self.keys, self.value_dim)
        slots = self._slots(generator, heads) if self.slots else None
        arguments = {
            "scale": self.head_dim**-0.5,
            "kv_head": tuple(h // self.group for h in range(heads)),
            "tiles": self._tiles(generator, heads, slots),
            "slots": slots,
        }
        return query, key, value, arguments

    def _slots(self, generator: torch.Generator, heads: int) -> Slots:
        """Pseudo-keys of all heads but the last, some empty, one in six of negative weight."""
        rows, count = max(1, heads - 1), self.slots * BLOCK

        def randn(*size: int) -> Tensor:
            drawn = torch.randn(self.batch, rows, count, *size, generator=generator)
            return drawn.to(self.dtype).float()

        log_weight = randn()
        log_weight[:, :, ::7] = float("-inf")
        weight = torch.rand(self.batch, rows, count, generator=generator) + 0.5
        weight[:, :, ::6] *= -0.05
        head = torch.arange(heads, dtype=torch.int32)
        head[-1] = -1 if heads > 1 else 0
        member = torch.randint(-1, count, (self.batch, rows, self.keys), generator=generator)
        share = torch.rand(self.batch, rows, self.keys, generator=generator) * 0.02
        made = (randn(self.head_dim), log_weight, weight, randn(self.value_dim), head)
        return Slots(*made, member.to(torch.int32), share)

    def _tiles(self, generator: torch.Generator, heads: int, slots: Slots | None) -> TileList:
        """Of each row's keys a part in contiguous tiles, full where that is possible, a part in
        gather tiles with empty columns, a part nowhere; one row in eight reads nothing."""
        blocks = -(-self.queries // BLOCK)
        rows: list[int] = []
        tiles: list[tuple[int, int, int]] = []
        gather: list[Tensor] = []
        masks: list[Tensor] = []

        def mask(columns: Tensor) -> int:
            keep = torch.rand(BLOCK, BLOCK, generator=generator) < self.density
            masks.append(tile_list.pack_bits(keep & columns))
            return len(masks) - 1

        def chance(p: float) -> bool:
            return float(torch.rand((), generator=generator)) < p

        for row in range(self.batch * heads * blocks):
            if chance(1 / 8):
                continue
            listed = []
            left: list[int] = []
            for tile in range(-(-self.keys // BLOCK)):
                present = torch.arange(tile * BLOCK, (tile + 1) * BLOCK) < self.keys
                if chance(0.3):
                    left += range(tile * BLOCK, min((tile + 1) * BLOCK, self.keys))
                elif chance(0.8):
                    full = bool(present.all()) and chance(0.5)
                    listed.append((CONTIGUOUS, tile, FULL if full else mask(present)))
            order = torch.randperm(len(left), generator=generator).tolist()
            chosen = [left[i] for i in order[: len(left) * 3 // 4]]
            for first in range(0, len(chosen), BLOCK):
                some = torch.full((BLOCK,), -1, dtype=torch.int32)
                part = torch.tensor(chosen[first : first + BLOCK], dtype=torch.int32)
                some[torch.randperm(BLOCK, generator=generator)[: len(part)]] = part
                gather.append(some)
                leaves = slots is not None and slots.head[row // blocks % heads] >= 0
                kind = TAKEN if leaves and chance(0.5) else GATHER
                listed.append((kind, len(gather) - 1, mask(some >= 0)))
            if slots is not None and slots.head[row // blocks % heads] >= 0:
                for tile in range(self.slots):
                    everything = torch.ones(BLOCK, dtype=torch.bool)
                    listed.append((SLOTS, tile, FULL if chance(0.5) else mask(everything)))
            rows += [row] * len(listed)
            tiles += listed
        return tile_list.from_rows(
            self.batch,
            heads,
            blocks,
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(tiles).reshape(-1, 3),
            torch.stack(gather) if gather else torch.zeros(0, BLOCK, dtype=torch.int32),
            torch.stack(masks) if masks else torch.zeros(0, BLOCK, dtype=torch.int64),
        )


def double(slots: Slots | None) -> Slots | None:
    if slots is None:
        return None
    floats = (slots.key, slots.log_weight, slots.weight, slots.value)
    return Slots(*(t.double() for t in floats), slots.head, slots.member, slots.share.double())


def magnitudes(slots: Slots | None) -> Slots | None:
    """Slots that add what `slots` subtract."""
    if slots is None:
        return None
    return replace(slots, weight=slots.weight.abs(), share=-slots.share)


def assert_as_accurate(
    actual: Tensor, low: Tensor, exact: Tensor, rounding: float, condition: Tensor
) -> None:
    """The engine may err at most twice as much as torch does at the same precision.

    `rounding` is the error that one rounding of the largest logit makes: a low-precision
    reference that happens to be exact on a small case must not be the only measure. `condition`
    (the size of `exact`, or one column) is the mass of a row without signs over its mass: what
    slots of negative weight and single keys that leave a slot cancel is lost to rounding.
    """
    assert torch.equal(actual.isfinite(), exact.isfinite())
    there = exact.isfinite()
    if not bool(there.any()):
        return
    largest = float(exact[there].abs().max())
    unit = torch.finfo(actual.dtype).eps * largest + rounding * max(1.0, largest) * condition
    error = (actual.double() - exact).abs()
    allowed = 2 * ((low.double() - exact)[there].abs().max() + unit.expand_as(exact))
    assert (error <= allowed)[there].all()


def check(engine: Engine, case: Case) -> None:
    query, key, value, arguments = case.draw()
    output, lse = engine(query, key, value, **arguments)
    assert output.dtype == case.dtype and lse.dtype == torch.float32
    low, low_lse = reference_prefill.attend(query, key, value, **arguments)
    arguments["slots"] = double(arguments["slots"])  # type: ignore[arg-type]
    wide = (query.double(), key.double(), value.double())
    exact, exact_lse = reference_prefill.attend(*wide, **arguments)  # type: ignore[arg-type]
    logit = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()
    rounding = torch.finfo(torch.float32).eps * max(1.0, float(logit) * case.head_dim**-0.5)
    arguments["slots"] = magnitudes(arguments["slots"])  # type: ignore[arg-type]
    unsigned = reference_prefill.attend(*wide, **arguments)[1]  # type: ignore[arg-type]
    condition = (unsigned - exact_lse).exp().nan_to_num(1.0)  # no mass at all: exactly zero
    condition[exact_lse.isnan()] = float("inf")  # a negative mass has no logarithm
    assert_as_accurate(output, low, exact, rounding, condition[..., None])
    assert_as_accurate(lse, low_lse, exact_lse, rounding, condition)
    assert torch.equal(lse == float("-inf"), exact_lse == float("-inf"))
    assert (output[lse == float("-inf")] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_mix_of_tiles_matches_the_reference(
    engine: Engine, dtype: torch.dtype, data: st.DataObject
) -> None:
    queries = data.draw(st.sampled_from([1, 3, 64, 65, 100, 128, 150]))
    case = Case(
        seed=data.draw(st.integers(0, 1000)),
        dtype=dtype,
        batch=data.draw(st.integers(1, 2)),
        kv_heads=data.draw(st.integers(1, 2)),
        group=data.draw(st.integers(1, 2)),
        queries=queries,
        keys=queries + data.draw(st.sampled_from([0, 1, 63, 64, 130])),
        head_dim=data.draw(st.sampled_from([1, 16, 40, 64, 80, 128, 256])),
        value_dim=data.draw(st.sampled_from([1, 16, 40, 64, 80, 128, 256])),
        density=data.draw(st.sampled_from([0.01, 0.05, 0.3, 1.0])),
        slots=data.draw(st.integers(0, 2)),
    )
    check(engine, case)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_whose_mass_nearly_cancels_errs_as_its_condition_says(engine: Engine) -> None:
    sizes = {"batch": 2, "queries": 65, "keys": 128, "head_dim": 40, "value_dim": 16}
    check(engine, Case(seed=109, density=0.01, slots=1, **sizes))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.03, 0.5])
def test_logits_of_ten_thousand_do_not_overflow(
    engine: Engine, dtype: torch.dtype, density: float
) -> None:
    norm = 25.0 if dtype == torch.float16 else 50.0  # the reference overflows at 65504
    check(engine, Case(dtype=dtype, norm=norm, density=density))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_list_is_torch_attention(engine: Engine) -> None:
    query, key, value = (torch.randn(2, 128, 4, 64).transpose(1, 2) for _ in range(3))
    rows = torch.arange(2 * 4 * 2).repeat_interleave(2)
    tiles = torch.tensor([[CONTIGUOUS, 0, FULL], [CONTIGUOUS, 1, FULL]]).repeat(16, 1)
    none = tile_list.empty(2, 4, 2, torch.device("cpu"))
    listed = tile_list.from_rows(2, 4, 2, rows, tiles, none.gather, none.masks)
    output, _ = engine(query, key, value, scale=0.125, kv_head=(0, 1, 2, 3), tiles=listed)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_list_gives_zeros(engine: Engine) -> None:
    query, key, value = (torch.randn(1, 2, 70, 32) for _ in range(3))
    tiles = tile_list.empty(1, 2, 2, torch.device("cpu"))
    output, lse = engine(query, key, value, scale=1.0, kv_head=(0, 1), tiles=tiles)
    assert (output == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nan_in_a_key_reaches_the_rows_that_read_it_and_no_other(engine: Engine) -> None:
    case = Case(queries=64, keys=128, batch=1, kv_heads=1, group=1)
    query, key, value, arguments = case.draw()
    words = torch.full((1, BLOCK), 1)
    words[0, 10] = 3
    none = torch.zeros(0, BLOCK, dtype=torch.int32)
    tiles = torch.tensor([[CONTIGUOUS, 0, 0]])
    arguments["tiles"] = tile_list.from_rows(1, 1, 1, torch.tensor([0]), tiles, none, words)
    key[0, 0, 1] = float("nan")
    output, lse = engine(query, key, value, **arguments)
    bad = torch.arange(64) == 10
    assert torch.equal(output.isnan().all(-1)[0, 0], bad)
    assert torch.equal(lse.isnan()[0, 0], bad)


def test_the_number_of_threads_does_not_change_the_result() -> None:
    query, key, value, arguments = Case(batch=2, queries=300, keys=300).draw()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(cpu_prefill.attend(query, key, value, **arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((3, 0, FULL), "unknown kind"),
        ((GATHER, 0, FULL), "outside `gather`"),
        ((CONTIGUOUS, 0, 0), "outside `masks`"),
        ((SLOTS, 0, FULL), "slots that its head does not have"),
    ],
)
def test_a_list_that_points_outside_its_pools_is_refused(
    tile: tuple[int, int, int], message: str
) -> None:
    if build.load().library is None:
        pytest.skip("needs a C++ compiler")
    query, key, value = (torch.randn(1, 1, 64, 16) for _ in range(3))
    none = tile_list.empty(1, 1, 1, torch.device("cpu"))
    tiles = tile_list.from_rows(
        1, 1, 1, torch.tensor([0]), torch.tensor([tile]), none.gather, none.masks
    )
    with pytest.raises(ValueError, match=message):
        cpu_prefill.attend(query, key, value, scale=1.0, kv_head=(0,), tiles=tiles)


def test_wrong_inputs_are_named() -> None:
    query, key, value, arguments = Case().draw()
    with pytest.raises(ValueError, match=r"query is torch.float64; the cpu engine takes float32"):
        cpu_prefill.attend(query.double(), key.double(), value.double(), **arguments)
    with pytest.raises(ValueError, match=r"kv_head \(9,\) does not name"):
        cpu_prefill.attend(query, key, value, **{**arguments, "kv_head": (9,)})
    with pytest.raises(ValueError, match="the query has batch 1, 4 heads, 20 rows"):
        cpu_prefill.attend(query[:, :, :20], key, value, **arguments)


def test_the_library_is_compiled_once_and_without_a_partial_file(tmp_path: Path) -> None:
    compiler = next((p for name in build.COMPILERS if (p := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    first = build.compile_with(compiler, tmp_path)
    assert first.library is not None
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 1 and all(path.suffix == ".so" for path in files)
    build.compile_with(compiler, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_a_compiler_that_fails_is_reported(tmp_path: Path) -> None:
    failing = tmp_path / "g++"
    failing.write_text("#!/bin/sh\necho 'no headers here' >&2\nexit 1\n")
    failing.chmod(0o755)
    outcome = build.compile_with(str(failing), tmp_path)
    assert outcome.library is None
    assert "no headers here" in outcome.description


def test_describe_names_the_path() -> None:
    assert cpu_prefill.describe().startswith("torch" if build.load().library is None else "C++")
