"""Slots of clusters by one kernel are those of the torch code, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention import moments
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import ChunkCompressor
from attnplan.kernels.compressors._clustered_chunks import ClusterCompressor
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.compressors.multipole import Multipole
from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.slots import Slots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAR = {
    "centroid_t": CentroidT(64, 8),
    "centroid_t-long": CentroidT(256, 16),
    "centroid_t-odd": CentroidT(100, 5),
    "multipole": Multipole(128, 16),
    "multipole-many": Multipole(64, 64),
}
CALLS = {
    "plain": {},
    "padded": {"start": (0, 130)},
    "odd-dims": {"dims": (24, 40)},
    "one-kv-head": {"heads": (3, 1)},
}


def text(
    tokens: int = 420,
    *,
    start: tuple[int, ...] = (0,),
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.bfloat16,
) -> Inputs:
    """Queries and keys that have means, and what is fitted to such."""
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int, dim: int) -> Tensor:
        return torch.randn(len(start), heads, tokens, dim, generator=generator)

    query, key = randn(heads[0], dims[0]) * 1.2 + 0.4, randn(heads[1], dims[0]) + 0.6
    value = randn(heads[1], dims[1])
    fitted = {
        name: tensor.to(DEVICE)
        for cls in (CentroidT, Multipole)
        for name, tensor in cls.fit(moments(query, key)).items()
    }
    tensors = (t.to(DEVICE, dtype) for t in (query, key, value))
    return Inputs.of_layer(*tensors, scale=dims[0] ** -0.5, start=start, fitted=fitted)


def both(
    far: ClusterCompressor, inputs: Inputs, sinks: int = 4, chunks: int | None = None
) -> tuple[Slots, Slots]:
    """By the kernel and by torch."""
    count = (inputs.key.shape[2] - max(inputs.start)) // far.chunk if chunks is None else chunks
    every = (sinks,) * len(inputs.head)
    found = far.by_kernel(inputs, count, every)
    assert found is not None
    return found, ChunkCompressor.build(far, inputs, count, every)


def agree(found: Slots, exact: Slots, far: ClusterCompressor, chunks: int) -> None:
    """Slot by slot, but for chunks in which a key is about as near to two centres.

    The kernel multiplies with 10 bits of mantissa. Those chunks have clusters that are as good.
    """
    assert found.key.shape == exact.key.shape and found.value.shape == exact.value.shape
    assert torch.equal(found.head, exact.head)
    used = chunks * far.slots
    names = ("key", "log_weight", "weight", "value")
    right: Tensor | bool = True
    for name in names:
        mine, theirs = (getattr(s, name)[:, :, :used] for s in (found, exact))
        if name == "key":  # of a slot that is left out it does not matter
            kept = exact.weight[:, :, :used, None] > 0
            mine, theirs = mine * kept, theirs * kept
        close = torch.isclose(mine, theirs, atol=2e-3, rtol=2e-3)
        by_chunk = close.flatten(3) if close.dim() == 4 else close[..., None]
        right = right & by_chunk.unflatten(2, (chunks, far.slots)).flatten(3).all(-1)
    assert isinstance(right, Tensor)
    assert float(right.double().mean()) >= 0.75
    between = [
        (s.weight[..., None] * s.key.square())
        .sum(-1)[:, :, :used]
        .unflatten(2, (chunks, -1))
        .sum(3)
        for s in (found, exact)
    ]
    torch.testing.assert_close(*between, rtol=0.02, atol=0)
    # whatever the clusters, nothing is lost
    for name in ("weight", "value"):
        mine, theirs = (
            getattr(s, name)[:, :, :used].unflatten(2, (chunks, far.slots)).sum(3)
            for s in (found, exact)
        )
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-3)
    for slots in (found, exact):  # padding to whole tiles
        assert bool(slots.log_weight[:, :, used:].isneginf().all())
        assert not slots.weight[:, :, used:].any() and not slots.key[:, :, used:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAR)
def test_the_kernel_makes_the_slots_of_the_torch_code(name: str, dtype: torch.dtype) -> None:
    far, inputs = FAR[name], text(dtype=dtype)
    agree(*both(far, inputs), far, 420 // far.chunk)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["centroid_t-odd", "multipole"])
def test_at_any_shape(name: str, call: str) -> None:
    far, inputs = FAR[name], text(**CALLS[call])  # type: ignore[arg-type]
    found, exact = both(far, inputs)
    agree(found, exact, far, (420 - max(inputs.start)) // far.chunk)


@pytest.mark.parametrize("sinks", [0, 70, 400])
def test_sinks_are_left_out(sinks: int) -> None:
    far, inputs = FAR["centroid_t"], text()
    found, exact = both(far, inputs, sinks)
    agree(found, exact, far, 6)
    whole = sinks // far.chunk * far.slots
    assert not found.weight[:, :, :whole].any()
    assert bool(found.log_weight[:, :, :whole].isneginf().all())


def test_some_heads_are_those_of_the_layer() -> None:
    far, inputs = FAR["centroid_t"], text()
    whole, _ = both(far, inputs)
    some, _ = both(far, inputs.heads((3, 1)))
    for name in ("key", "log_weight", "weight", "value"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[:, [3, 1]])


def test_coinciding_keys_become_slots_exactly() -> None:
    inputs = text(dtype=torch.float16)
    key = inputs.key[:, :, torch.arange(420) % 3]
    inputs = Inputs.of_layer(
        inputs.query, key, inputs.value, scale=inputs.scale, fitted=inputs.fitted
    )
    for name in ("centroid_t", "multipole"):
        far = FAR[name]
        found, _ = both(far, inputs, sinks=0, chunks=2)
        kept = found.weight > 0
        slot = found.key[0, 0][kept[0, 0]]
        nearest = torch.cdist(slot.double(), key[0, 0, :3].double()).amin(1)
        assert float(nearest.max()) < 2e-3 * float(key.abs().max())


def test_what_does_not_fit_is_left_to_torch() -> None:
    inputs, every = text(), (4,) * 4
    assert CentroidT(1024, 8).by_kernel(inputs, 1, every) is None
    assert CentroidT(256, 80).by_kernel(inputs, 1, every) is None
    wide = text(70, dims=(256, 32))
    assert FAR["centroid_t"].by_kernel(wide, 1, every) is None
    assert FAR["centroid_t"].by_kernel(text(dtype=torch.float32), 1, every) is None
