"""The Triton decode engine computes what the reference defines, in the interpreter or on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests import interpreter_memory
from tests.test_decode import cast, layer
from torch import Tensor

from attnplan.kernels.engines.gpu import decode as gpu_decode
from attnplan.kernels.engines.reference import decode as reference_decode
from attnplan.kernels.operands.kv_rows import StoredRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TENSORS = ("key", "value", "bias", "pages")
Lengths = list[tuple[tuple[int, ...], int]]
LAYERS: dict[str, tuple[Lengths, int, int, tuple[int, int]]] = {
    "one-row": ([((0,), 1)], 1, 1, (16, 16)),
    "ragged": ([((0, 2), 700), ((1,), 90)], 3, 1, (64, 64)),
    "several-queries": ([((1,), 600), ((0,), 33)], 2, 5, (64, 64)),
    "padded-dims": ([((0,), 130)], 4, 2, (80, 96)),
    "many-rows": ([((0,), 300)], 4, 20, (16, 32)),
}


def moved(rows: StoredRows) -> StoredRows:
    tensors = {name: getattr(rows, name) for name in TENSORS}
    there = {name: t if t is None else t.to(DEVICE) for name, t in tensors.items()}
    return dataclasses.replace(rows, **there)


@contextmanager
def reachable(tensors: list[Tensor]) -> Iterator[None]:
    """The interpreter lets kernels read these, whose addresses stand in a table."""
    interpreter_memory.REACHABLE.extend(tensors)
    try:
        yield
    finally:
        interpreter_memory.REACHABLE.clear()


def check(
    query: Tensor, stored: list[StoredRows], dtype: torch.dtype, programs: int
) -> tuple[Tensor, Tensor]:
    """Against the reference in float64 on the same rounded inputs."""
    given = [cast(rows, dtype) for rows in stored]
    exact = reference_decode.decode(
        query.to(dtype).double(), [cast(rows, torch.float64) for rows in given], scale=0.2
    )
    there = [moved(rows) for rows in given]
    tensors = [getattr(rows, name) for rows in there for name in TENSORS]
    with reachable([t for t in tensors if t is not None]):
        found = gpu_decode._decode(query.to(dtype).to(DEVICE), there, 0.2, programs)
    assert found[0].dtype == dtype
    torch.testing.assert_close(found[0].cpu().double(), exact[0], rtol=0, atol=2 * DTYPES[dtype])
    torch.testing.assert_close(found[1].cpu().double(), exact[1], rtol=0, atol=2e-5)
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("programs", [1, 12], ids=["whole", "split"])
def test_the_engine_agrees_with_the_reference(name: str, programs: int, padded: bool) -> None:
    lengths, group, queries, sizes = LAYERS[name]
    query, stored = layer(lengths, group=group, queries=queries, sizes=sizes, padded=padded)
    check(query, stored, torch.float32, programs)


@pytest.mark.parametrize("name", ["ragged", "several-queries"])
def test_pages_are_looked_up(name: str) -> None:
    """In some kv heads; others lie in one piece."""
    lengths, group, queries, sizes = LAYERS[name]
    query, stored = layer(
        lengths, group=group, queries=queries, sizes=sizes, padded=True, paged=True
    )
    stored[1] = stored[1].gathered()
    check(query, stored, torch.float32, 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_round_only_inputs_and_outputs(dtype: torch.dtype) -> None:
    query, stored = layer([((0, 1), 600)], group=3, queries=1, padded=True)
    check(query, stored, dtype, 12)


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "biased"])
def test_a_table_serves_while_rows_are_added(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer: another table is made where rows are condensed, or lie elsewhere."""
    made = []
    table = gpu_decode._table
    monkeypatch.setattr(
        gpu_decode, "_table", lambda *given: made.append(len(made)) or table(*given)
    )
    gpu_decode._layouts.clear()
    query, whole = layer([((0, 2), 700), ((1,), 400)], group=2, queries=1, padded=padded)
    whole = [moved(cast(rows, torch.float32)) for rows in whole]
    query = query.float()

    def step(lengths: tuple[int, ...], stored: list[StoredRows] = whole) -> int:
        """Tables that are made for a token."""
        before = len(made)
        stored = [
            dataclasses.replace(rows, length=n) for rows, n in zip(stored, lengths, strict=True)
        ]
        exact = reference_decode.decode(
            query.double(), [cast(moved_back(rows), torch.float64) for rows in stored], scale=0.2
        )
        tensors = [getattr(rows, name) for rows in stored for name in TENSORS]
        with reachable([t for t in tensors if t is not None]):
            found = gpu_decode._decode(query.to(DEVICE), stored, 0.2, 12)
        torch.testing.assert_close(found[0].cpu().double(), exact[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(found[1].cpu().double(), exact[1], rtol=0, atol=2e-5)
        return len(made) - before

    assert step((600, 300)) == 1
    for more in (0, 1, 7, gpu_decode.GROWTH - 1):
        assert step((600 + more, 300 + more)) == 0
    assert step((600 + gpu_decode.GROWTH, 300 + gpu_decode.GROWTH)) == 1
    assert step((600, 300)) == 1, "rows were taken back"
    assert step((601, 300)) == 1, "one kv head alone has grown"
    assert step((601, 300)) == 0
    elsewhere = [dataclasses.replace(rows, key=rows.key.clone()) for rows in whole]
    assert step((601, 300), elsewhere) == 1
    assert step((602, 301)) == 0
    with pytest.raises(ValueError, match="rows are in use of"):
        step((708, 407))


def moved_back(rows: StoredRows) -> StoredRows:
    tensors = {name: getattr(rows, name) for name in TENSORS}
    return dataclasses.replace(rows, **{n: t if t is None else t.cpu() for n, t in tensors.items()})


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    query, (rows,) = layer([((0,), 40)], group=2, queries=1, batch=1, padded=True)
    assert rows.bias is not None
    rows.bias.fill_(float("-inf"))
    output, log_mass = check(query, [rows], torch.float32, 1)
    assert (output == 0).all()
    assert (log_mass == float("-inf")).all()


def test_bad_input_is_refused() -> None:
    query, (rows,) = layer([((0,), 40)], group=2, queries=1)
    with pytest.raises(ValueError, match="computes in"):
        gpu_decode.decode(query, [rows], scale=1.0)
    single = cast(rows, torch.float32)
    strange = dataclasses.replace(single, bias=torch.zeros(rows.key.shape[:3]).double())
    with pytest.raises(ValueError, match="bias must be float32"):
        gpu_decode.decode(query.float(), [strange], scale=1.0)
    there = moved(single)
    there = dataclasses.replace(there, key=there.key.to("meta"))
    with pytest.raises(ValueError, match="stored rows are on meta, the query on"):
        gpu_decode.decode(query.float().to(DEVICE), [there], scale=1.0)
