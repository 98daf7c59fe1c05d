"""An approximation against dense attention, for tests of methods."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnplan.kernels import catalog
from attnplan.kernels.compressors._chunk_slots import ChunkCompressor
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.reference import prefill as reference_prefill
from attnplan.kernels.operands.inputs import Inputs, Moments
from attnplan.kernels.selectors._static_pattern import causal

Engine = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def moments(query: torch.Tensor, key: torch.Tensor) -> Moments:
    return Moments(
        query.mean((0, 2)),
        torch.einsum("bhid,bhie->hde", query, query) / (query.shape[0] * query.shape[2]),
        key.mean((0, 2)),
        torch.einsum("bhid,bhie->hde", key, key) / (key.shape[0] * key.shape[2]),
    )


def all_blocks(inputs: Inputs) -> torch.Tensor:
    return torch.arange(inputs.blocks)


def run(
    approximation: Approximation,
    inputs: Inputs,
    attend: Engine = reference_prefill.attend,
    blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The output for all query rows, or for those of some query blocks."""
    some = all_blocks(inputs) if blocks is None else blocks
    tiles, slots = approximation.tiles(inputs, some)
    output, log_mass = attend(
        inputs.query if blocks is None else inputs.rows(blocks),
        inputs.key,
        inputs.value,
        scale=inputs.scale,
        kv_head=inputs.kv_head,
        tiles=tiles,
        slots=slots,
    )
    part = approximation.part(inputs, some)
    return output if part is None else part.merge(output, log_mass)[0]


def dense(inputs: Inputs) -> torch.Tensor:
    heads = list(inputs.kv_head)
    return reference_prefill.masked(
        inputs.query, inputs.key[:, heads], inputs.value[:, heads], causal(inputs), inputs.scale
    )[0]


def text(queries: int = 500, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Four heads over two kv heads, keys with a common part, and what the catalog fits to them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, queries, 16, generator=generator, dtype=torch.float64)

    query, key, value = randn(4) * 1.2 + 0.4, randn(2) + 0.6, randn(2)
    fitted = catalog.fit(moments(query, key))
    tensors = (t.to(dtype) for t in (query, key, value))
    return Inputs.of_layer(*tensors, scale=0.25, fitted=fitted)


def pair(far: str, window: int = 32, **knobs: int) -> Approximation:
    near = {"name": "window", "window": window}
    return catalog.from_dict({"near": near, "far": {"name": far, **knobs}})


def small(compressor: type[ChunkCompressor]) -> ChunkCompressor:
    """Chunks of 64 keys, or of as many as the method must have."""
    try:
        return compressor(64, 8)
    except ValueError:
        return compressor()


def chosen_pairs() -> list[Approximation]:
    """Every selector that keeps chunks, with every compressor whose chunks it may keep."""
    near = [cls(top=1, local=1) for cls in catalog.NEAR.values() if cls.keeps_chunks]  # type: ignore[call-arg]
    far = [small(cls) for cls in catalog.FAR.values() if issubclass(cls, ChunkCompressor)]
    return [Approximation(n, f) for n in near for f in far]


def error(approximation: Approximation, inputs: Inputs) -> float:
    exact = dense(inputs)
    return float((run(approximation, inputs) - exact).norm() / exact.norm())
