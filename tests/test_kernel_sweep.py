"""The sweep over attention kernels, at tiny sizes on the CPU."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests import attention
from torch import Tensor

from attnplan.bench import rows as kernel_rows
from attnplan.bench import sweep as kernel_sweep
from attnplan.bench.rows import Row, Source, at_density, calls, efficiency, parse
from attnplan.bench.sweep import METHODS, Outcome, Sweep, sweep
from attnplan.cli import app as cli
from attnplan.kernels import catalog
from attnplan.kernels.bench.measure import Timing, WrongKernel
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.block_topk import BlockTopK
from attnplan.kernels.selectors.window import Window
from attnplan.report.kernel_tables import tables

CPU = torch.device("cpu")
TINY = Sweep(
    lengths=(256, 512),
    head_dims=(32,),
    densities=(0.5,),
    heads=4,
    kv_heads=2,
    checked_dims=(32, 48),
    checked_dtypes=(torch.bfloat16, torch.float32),
    checked_length=256,
    first_length=128,
    steps=4,
    repeats=1,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny kernels on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """All parts of a tiny sweep, and its file."""
    path = tmp_path_factory.mktemp("sweep") / "rows.jsonl"
    return sweep(TINY, path), path


class Clock:
    """Every row takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, label: str) -> None:
        self.now += 1.0


def asked(row: Row) -> tuple[object, ...]:
    return row.part, row.name, row.length, row.head_dim, row.dtype, row.target


def test_efficiency_is_one_where_time_falls_as_work_does() -> None:
    assert efficiency(10.0, 0.25, 2.5) == 1.0
    assert efficiency(10.0, 0.25, 5.0) == 0.5
    assert efficiency(10.0, 1.0, 12.5) == 0.8


def test_a_timing_becomes_figures_of_the_row() -> None:
    shape = AttentionShape(1, 4, 2, 256, 256, 32)
    row = Row("layers", "any", 256, 32, 4, 2, "float32")
    timed = row.timed(Timing(2.0, 1.5, 3.0, 8.0, 7, "cudnn", 1.8, 22.0), 0.2, shape)
    assert timed.eta == pytest.approx(8.0 * 0.2 / 2.0)
    # 4 heads, 256 * 257 / 2 pairs, 2 multiply-adds of 32 numbers each, in 8 ms
    assert timed.dense_tflops == pytest.approx(4 * 32896 * 2 * 32 * 2 / 8e-3 / 1e12)
    assert (timed.dense_backend, timed.warm_ms, timed.host_us) == ("cudnn", 1.8, 22.0)
    assert (timed.median_ms, timed.q25_ms, timed.q75_ms, timed.repeats) == (2.0, 1.5, 3.0, 7)


@pytest.mark.parametrize("target", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("pattern", METHODS)
def test_the_knob_that_is_found_is_the_nearest(pattern: str, target: float) -> None:
    shape = AttentionShape(1, 4, 2, 4096, 4096, 64)
    found = at_density(pattern, shape, target)
    miss = abs(found.density(shape) - target)
    assert miss < 0.012  # one key block of 64 is 1.6 % of the keys
    name = "window" if isinstance(found.near, Window) else "top"
    for step in (-1, 1):
        other = replace(found.near, **{name: getattr(found.near, name) + step})  # type: ignore[type-var]
        assert abs(Approximation(other).density(shape) - target) >= miss


def test_a_density_out_of_reach_gives_the_nearest_end() -> None:
    shape = AttentionShape(1, 4, 2, 256, 256, 32)
    assert at_density("window(window=?)", shape, 1e-9).near == Window(1)
    assert at_density("window(window=?)", shape, 1.0).density(shape) == 1.0


def test_methods_are_spelled_as_the_catalog_spells_them() -> None:
    pair = parse("window(window=32) + multipole(chunk=64, slots=8)")
    for approximation in (Approximation(Window(70, 3)), Approximation(BlockTopK(5, 1)), pair):
        assert parse(catalog.key(approximation)) == approximation
    assert parse("dense()") == catalog.DENSE
    for line in ("window", "window(window)", "dense() + off() + off()", "window(window=2.5)"):
        with pytest.raises(ValueError, match="a method is spelled as window"):
            parse(line)
    with pytest.raises(ValueError, match="has no knob 'top'"):
        parse("window(top=3)")
    with pytest.raises(ValueError, match="needs one knob '\\?'"):
        at_density("window(window=3)", AttentionShape(1, 1, 1, 64, 64, 16), 0.5)


def test_one_pair_of_every_far_field_is_fitted_to_the_call() -> None:
    shape = AttentionShape(1, 4, 2, 1024, 1024, 32)
    found = kernel_rows.pairs(shape)
    tried = {a.far.name for a in catalog.choices(shape) if a.far is not None}
    assert len(found) == len({a.far.name for a in found if a.far}) and len(found) >= 8
    assert {a.far.name for a in found if a.far} <= tried
    inputs = Source(CPU).inputs(1024, 32, 4, 2, torch.float32)
    assert kernel_rows.with_fitted(inputs, [Approximation(Window(64))]) is inputs
    some = kernel_rows.with_fitted(inputs, found)
    mean = some.fitted["centroid_t.query_mean"]
    torch.testing.assert_close(mean, inputs.query.mean((0, 2)), atol=1e-5, rtol=0)
    LayerKernel(tuple(found[:4]), some.fitted)(some.query, some.key, some.value, scale=some.scale)
    assert kernel_rows.pairs(AttentionShape(1, 4, 2, 64, 64, 32)) == []


def test_a_sweep_answers_every_question(whole: tuple[Outcome, Path]) -> None:
    outcome, _ = whole
    assert not outcome.left_out and not outcome.wrong
    failed = {asked(row): row.error for row in outcome.rows if row.error}
    assert not failed
    good = [row for row in outcome.rows if row.error is None]
    found = {asked(row) for row in good}
    for length in (256, 512):
        for part, name, target in (
            ("dense", "dense()", 1.0),
            ("layers", "dense() by the kernel", 1.0),
            *(("layers", method, 0.5) for method in METHODS),
        ):
            assert (part, name, length, 32, "float32", target) in found
    for dtype in ("bfloat16", "float32"):
        for head_dim in (32, 48):
            for kind in ("dense", "window", "block_topk"):
                assert ("errors", kind, 256, head_dim, dtype, None) in found
    assert {row.part for row in good} >= {
        *("errors", "dense", "layers", "crossover", "decode", "host")
    }


def test_timed_rows_are_complete(whole: tuple[Outcome, Path]) -> None:
    outcome, _ = whole
    timed = [row for row in outcome.rows if row.part in ("dense", "layers")]
    assert len(timed) == 8
    for row in timed:
        assert row.median_ms and row.q25_ms and row.q75_ms and row.dense_ms and row.density
        assert row.q25_ms <= row.median_ms <= row.q75_ms
        assert row.eta == pytest.approx(row.dense_ms * row.density / row.median_ms)
        assert row.dense_backend == "sdpa" and row.dense_tflops and row.repeats == 1
        if "window" in row.name:  # 256 keys are too few blocks of 64 for others
            assert row.density == pytest.approx(0.5, abs=0.01)


def test_the_work_of_the_host_is_told_beside_that_of_the_dense_call(
    whole: tuple[Outcome, Path],
) -> None:
    outcome, _ = whole
    rows = {row.name: row for row in outcome.rows if row.part == "host"}
    assert {"full()", "the whole cache", "two kinds"} < set(rows)
    for row in rows.values():
        more = row.more
        assert more["q25_us"] <= row.host_us == more["median_us"] <= more["q75_us"]
        assert more["dense_median_us"] > 0 and more["steps"] == TINY.steps
    assert rows["the whole cache"].more["kept"] == ""
    assert rows["two kinds"].more["kept"].count(" x ") == 2
    assert not rows["full()"].more["kept"].count("|")


def test_crossovers_name_the_first_length_that_is_faster(whole: tuple[Outcome, Path]) -> None:
    outcome, _ = whole
    rows = [row for row in outcome.rows if row.part == "crossover"]
    assert len(rows) == 2
    for row in rows:
        tried = row.more["tried"]
        assert [step["length"] for step in tried] == [128, 256, 512][: len(tried)]
        faster = [step["length"] for step in tried if step["ms"] < step["dense_ms"]]
        assert row.more["crossover"] == (faster[0] if faster else None)
        assert len(faster) <= 1


def test_lines_are_complete_and_read_back(whole: tuple[Outcome, Path]) -> None:
    outcome, path = whole
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(outcome.rows)
    wanted = {"device", "driver", "torch", "triton", "engine", "decode_engine", "inputs"}
    for line, row in zip(lines, outcome.rows, strict=True):
        assert wanted | {field.name for field in fields(Row)} <= set(line)
        assert line["inputs"] == "random normal"
        assert Row(**{field.name: line[field.name] for field in fields(Row)}) == row
    read = kernel_sweep.read(path, outcome.conditions)
    assert read == {row.key: row for row in outcome.rows if row.error is None}


def test_rows_that_a_file_holds_are_not_measured_again(
    whole: tuple[Outcome, Path], tmp_path: Path
) -> None:
    outcome, path = whole
    copy = tmp_path / "rows.jsonl"
    copy.write_text(path.read_text())
    started: list[str] = []
    again = sweep(TINY, copy, advance=started.append)
    failed = sum(row.error is not None for row in outcome.rows)
    assert len(started) == failed
    assert [asked(row) for row in again.rows] == [asked(row) for row in outcome.rows]
    # other conditions, other numbers
    assert not kernel_sweep.read(path, {**outcome.conditions, "engine": "another"})


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"part": "layers"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no row of a sweep"):
        sweep(TINY, path)


def test_lengths_come_in_the_order_of_their_worth() -> None:
    assert Sweep(lengths=(131072, 2048, 4096, 8192, 32768)).ordered == [
        8192,
        32768,
        4096,
        131072,
        2048,
    ]


def test_no_row_is_started_after_the_time_is_over() -> None:
    clock = Clock()
    layers = replace(TINY, parts=("layers",), seconds=3.0)
    outcome = sweep(layers, advance=clock.advance, clock=clock)
    assert [row.length for row in outcome.rows] == [256] * 3
    assert len(outcome.left_out) == 5
    assert (
        outcome.left_out[0]
        == "layers block_topk(top=?, local=2) at density 0.5, float32, 4 heads of 32 x 256"
    )
    assert all("x 512" in label for label in outcome.left_out[1:])


def test_a_crossover_without_time_says_so(tmp_path: Path) -> None:
    clock = Clock()
    slow = Timing(2.0, 2.0, 2.0, 1.0, 1)
    steps = replace(TINY, parts=("crossover",), seconds=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_rows, "measure_layer", lambda *_, **__: slow)
        outcome = sweep(steps, tmp_path / "rows", advance=clock.advance, clock=clock)
        first = outcome.rows[0]
        assert first.error == "no time for more than 128 tokens"
        assert len(outcome.rows) == 1 and len(outcome.left_out) == 1
        patient = sweep(replace(steps, seconds=None), tmp_path / "rows")
    assert [row.more["crossover"] for row in patient.rows] == [None, None]
    assert len(patient.rows[0].more["tried"]) == 3


def broken(factor: float) -> object:
    engine = LayerKernel.__call__

    def attend(self: LayerKernel, *tensors: Tensor, **more: float) -> Tensor:
        output = engine(self, *tensors, **more)  # type: ignore[arg-type]
        return output * factor if isinstance(self.assignment[0].near, Window) else output

    return attend


@pytest.mark.parametrize("factor", [1.1, math.nan])
def test_a_wrong_kernel_is_refused(
    factor: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(LayerKernel, "__call__", broken(factor))
    some = replace(TINY, parts=("errors", "layers"), lengths=(256,))
    path = tmp_path / "rows.jsonl"
    outcome = sweep(some, path)
    wrong = [row for row in outcome.wrong if row.dtype == "float32" and row.head_dim == 32]
    assert [row.name for row in wrong] == ["window", "far"]  # which has a window too
    assert wrong[0].error and wrong[0].error.startswith("wrong: relative error")
    refused = [row for row in outcome.rows if row.part == "layers" and row.error]
    assert [row.name for row in refused] == [METHODS[0]]
    assert refused[0].error == "not timed: window gives wrong numbers"
    assert refused[0].median_ms is None
    # wrong numbers are kept, but never taken for an answer
    assert len(path.read_text().splitlines()) == len(outcome.rows)
    assert not {row.key for row in outcome.wrong} & set(kernel_sweep.read(path, outcome.conditions))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float16, 1 + 1e-3), (torch.bfloat16, 1 + 8e-3), (torch.float32, 1 + 2e-5)],
    ids=str,
)
def test_an_error_of_fewer_bits_than_the_dtype_has_is_wrong(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of weights in bfloat16 between values in float16, or of products in tf32."""
    some = replace(TINY, parts=("errors",), checked_dims=(32,), checked_dtypes=(dtype,))
    some = replace(some, dtype=dtype)
    assert not sweep(some).wrong
    exactly = LayerKernel.__call__

    def less(self: LayerKernel, *tensors: Tensor, **more: float) -> Tensor:
        return exactly(self, *tensors, **more).double() * factor  # type: ignore[arg-type]

    monkeypatch.setattr(LayerKernel, "__call__", less)
    assert {row.name for row in sweep(some).wrong} >= {"dense", "window", "block_topk"}


def test_dense_heads_that_are_wrong_count_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Timing:
        raise WrongKernel("dense heads are wrong")

    monkeypatch.setattr(kernel_rows, "measure_layer", refuse)
    outcome = sweep(replace(TINY, parts=("layers",), lengths=(256,)))
    assert len(outcome.wrong) == len(outcome.rows) == 4


def test_a_row_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Timing:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(kernel_rows, "measure_layer", fail)
    outcome = sweep(replace(TINY, parts=("layers",), lengths=(256,)))
    assert {row.error for row in outcome.rows} == {
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    }
    assert not outcome.wrong


@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (4, 1)])
def test_parts_and_single_heads_compute_what_the_layer_does(heads: tuple[int, int]) -> None:
    inputs = Source(CPU).inputs(300, 32, *heads, torch.float32)
    kinds = catalog.DENSE, Approximation(Window(70)), Approximation(BlockTopK(1, 1))
    layer = [kinds[head % 3] for head in range(heads[0])]
    whole = LayerKernel(tuple(layer))(inputs.query, inputs.key, inputs.value, scale=inputs.scale)
    found: list[Tensor] = []
    engine = LayerKernel.__call__

    def kept(self: LayerKernel, *tensors: Tensor, **more: float) -> Tensor:
        found.append(engine(self, *tensors, **more))  # type: ignore[arg-type]
        return found[-1]

    half = heads[0] // 2
    for groups in ([[h] for h in range(heads[0])], [range(half), range(half, heads[0])]):
        found.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerKernel, "__call__", kept)
            calls(inputs, layer, groups)()
        torch.testing.assert_close(torch.cat(found, 1), whole)


def test_groups_of_heads_that_cut_a_kv_head_are_refused() -> None:
    inputs = Source(CPU).inputs(64, 32, 4, 2, torch.float32)
    with pytest.raises(ValueError, match="no whole groups"):
        calls(inputs, [catalog.DENSE] * 4, [[0, 1, 2]])


def test_mixed_layers_are_held_against_their_parts() -> None:
    inputs = Source(CPU).inputs(256, 32, 4, 2, torch.float32)
    row = Row("mixed", "equal shares", 256, 32, 4, 2, "float32")
    kinds = catalog.DENSE, Approximation(Window(70))
    found = kernel_rows.mixed_row(row, inputs, kinds, repeats=1, flex=False)
    assert list(found.more["parts_ms"]) == [catalog.key(kind) for kind in kinds]
    assert found.more["sum_of_parts_ms"] == pytest.approx(sum(found.more["parts_ms"].values()))
    assert list(found.more["whole_ms"]) == list(found.more["parts_ms"])
    assert found.more["balanced_ms"] == pytest.approx(sum(found.more["whole_ms"].values()) / 2)
    assert found.density == pytest.approx((1 + kinds[1].density(inputs.shape)) / 2)
    with pytest.raises(ValueError, match="4 heads cannot be shared equally by 3 kinds"):
        kernel_rows.mixed_row(row, inputs, [catalog.DENSE] * 3, repeats=1, flex=False)


def test_the_reference_of_errors_defines_dense_attention() -> None:
    inputs = attention.text(200)
    kernel = LayerKernel((catalog.DENSE,) * inputs.query.shape[1])
    whole = replace(inputs, group=inputs.query.shape[1] // inputs.key.shape[1])
    made = kernel_rows.defined(kernel, whole, torch.float64)
    torch.testing.assert_close(made, attention.dense(inputs).double())


def test_the_reference_reads_the_keys_that_the_inputs_choose() -> None:
    inputs = Source(CPU).inputs(1024, 32, 4, 2, torch.float32)
    kernel = LayerKernel((Approximation(BlockTopK(3, 2)),) * 4)
    seen: list[Inputs] = []
    tiles = kernel.tiles
    kernel.tiles = lambda *asked: (seen.append(asked[0]), tiles(*asked))[1]  # type: ignore[method-assign, func-returns-value]
    exact = kernel_rows.defined(kernel, inputs, torch.float64)
    assert exact.dtype == torch.float64
    assert [asked.query.dtype for asked in seen] == [torch.float32]


def test_layers_of_other_shapes_are_timed_at_the_first_length() -> None:
    more = replace(TINY, parts=("layers",), beside=((3, 1, 32), (3, 1, 64)))
    rows = sweep(more).rows
    assert [row.length for row in rows if (row.heads, row.kv_heads) == (3, 1)] == [256] * 4
    assert {row.head_dim for row in rows} == {32}
    assert len({row.key for row in rows}) == len(rows) == 12


def test_stored_heads_are_tiled(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        f"3.{name}": torch.randn(heads, 100, 64, generator=generator)
        for name, heads in (("query", 3), ("key", 1), ("value", 1))
    }
    save_file(stored, tmp_path / "inputs.safetensors")
    source = Source(CPU, tmp_path / "inputs.safetensors")
    assert source.kind == "real text, inputs.safetensors"
    inputs: Inputs = source.inputs(150, 64, 4, 2, torch.float32)
    query = inputs.query
    torch.testing.assert_close(query[0, :3, :100], stored["3.query"])
    torch.testing.assert_close(query[0, 3], query[0, 0])
    torch.testing.assert_close(query[0, :, 100:], query[0, :, :50])
    wide = source.inputs(100, 96, 2, 1, torch.bfloat16)
    assert wide.query.shape == (1, 2, 100, 96) and wide.query.dtype == torch.bfloat16
    pair = torch.cat([stored["3.query"][0], stored["3.query"][1]], 1)[:, :96]
    torch.testing.assert_close(wide.query[0, 0], pair.bfloat16())


def test_tables_show_every_row(whole: tuple[Outcome, Path]) -> None:
    outcome, _ = whole
    shown = {title: cells for title, _, cells in tables(outcome)}
    for title, headers, cells in tables(outcome):
        assert all(len(row) == len(headers) for row in cells), title
    timed = ("dense", "layers", "mixed", "far")
    assert len(shown["Layers beside the best dense attention"]) == sum(
        row.part in timed and row.error is None for row in outcome.rows
    )
    failed = [row for row in outcome.rows if row.error]
    assert len(shown.get("Without numbers, or with wrong ones", [])) == len(failed)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"parts": ("layers", "speed")}, "unknown part 'speed'"),
        ({"lengths": ()}, "lengths must be positive"),
        ({"densities": (0.5, 1.5)}, "densities must be at most 1"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **knobs)  # type: ignore[arg-type]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`attnplan bench --kernels` on 256 tokens, in this process: exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        line = ["attnplan", "bench", "--kernels", "--lengths", "256", "--head-dims", "32"]
        monkeypatch.setattr(sys, "argv", [*line, "--repeats", "1", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return call


def test_the_command_prints_tables_or_one_object(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("--parts", "layers", "--out", "rows.jsonl")
    assert code == 0 and "window(window=" in out and "inputs: random normal" in out
    assert len(Path("rows.jsonl").read_text().splitlines()) == 8
    code, out, _ = run("--parts", "layers", "--out", "rows.jsonl", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["rows"]) == 8 and found["left_out"] == []
    assert len(Path("rows.jsonl").read_text().splitlines()) == 8
    code, out, _ = run("--parts", "layers", "--seconds", "0")
    assert code == 0 and out.count("left out for want of time: ") == 8


def test_the_command_ends_with_one_where_numbers_are_wrong(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerKernel, "__call__", broken(1.1))
    monkeypatch.setattr(kernel_sweep, "sweep", partial(_first_rows, sweep))
    code, out, err = run("--parts", "errors")
    assert code == 1 and "wrong: relative error" in out
    assert "wrong numbers: window, float32 of 32" in " ".join(err.split())


def _first_rows(measure: Callable[..., Outcome], asked: Sweep, *args: Any, **more: Any) -> Outcome:
    return measure(replace(asked, checked_dims=(), checked_length=256), *args, **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny",), "--kernels goes without MODEL"),
        (("--methods", "window"), "--kernels goes without MODEL, --decode, --methods"),
        (("--device", "tpu"), "unknown device 'tpu'; use cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "there is no device 'cuda:99'"),
        (("--lengths", "4k"), "--lengths takes whole numbers between commas, got '4k'"),
        (("--parts", "speed"), "unknown part 'speed'"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--dtype", "int3"), "unknown dtype 'int3'"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    run: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and message in " ".join(err.split())
