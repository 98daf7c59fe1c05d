"""Block top-k: every query block reads the key blocks whose mean key it agrees with most.

A query block keeps the first key block (sinks), its own and the `local - 1` blocks before it, and
of the rest the `top` blocks J with the largest

    log(e^a(J) + e^a(J-1))      a(J) = s mean(q) . mean(K_J)

where the mean query is that of the 16 queries up to the block's first, and s the scale. The block
after one that those queries like is what later queries of the block often read (a copied passage).

Sources: Jiang et al., MInference 1.0, https://arxiv.org/abs/2407.02490, section 3.2 (block-sparse
heads); Lu et al., MoBA, https://arxiv.org/abs/2502.13189, section 2.2 (its gate, per query). Unlike
MInference, which pools all queries of a block, so that a row depends on later ones, no query after
the block's first has a say. Scores are computed in float32; ties go to the earlier block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Self

from torch import Tensor

from attnplan.kernels.operands.inputs import Inputs
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.kernels.selectors._scored_blocks import (
    ASKING,
    ScoredBlocks,
    pooled_keys,
    pooled_queries,
)


@dataclass(frozen=True)
class BlockTopK(ScoredBlocks):
    """Keep the sink block, `local` recent key blocks, and the `top` best-scoring others."""

    name: ClassVar[str] = "block_topk"
    predictor: ClassVar[str] = "top_block_mass_4"
    follows: ClassVar[bool] = True

    settings: ClassVar[tuple[tuple[int, int, int], ...]] = (
        (1, 1, 4),
        (3, 1, 4),
        (2, 2, BLOCK),
        (4, 2, BLOCK),
        (8, 2, BLOCK),
        (8, 4, BLOCK),
        (16, 4, BLOCK),
        (32, 4, BLOCK),
    )
    settings_with_far: ClassVar[tuple[tuple[int, int], ...]] = ((2, 2), (8, 2))

    def scores(self, inputs: Inputs, blocks: Tensor) -> Tensor:
        keys = pooled_keys(inputs)[:, list(inputs.kv_head)]  # [batch, heads, key blocks, head_dim]
        return pooled_queries(inputs, blocks) * inputs.scale @ keys.mT

    @classmethod
    def layer_scores(
        cls, selectors: Sequence[Self], inputs: Inputs, heads: tuple[int, ...]
    ) -> Tensor:
        from attnplan.kernels.engines.gpu import top_blocks as engine

        kv_head = inputs.kv_head
        read = tuple(kv_head[head] for head in heads)
        used, row = _grouped(read)
        integers = partial(engine.integers, device=inputs.query.device)
        start = integers(inputs.start)
        queries = engine.block_means(
            inputs.query, integers(heads), start, inputs.offset, up_to=ASKING, scale=inputs.scale
        )
        keys = engine.block_means(inputs.key, integers(used), start, 0)
        if row is not None:
            return queries @ keys.index_select(1, integers(row)).mT
        scores = queries.view(len(start), len(used), -1, queries.shape[3]) @ keys.mT
        return scores.view(*queries.shape[:3], -1)

    def score_macs(self, shape: AttentionShape, candidates: int) -> float:
        asking = shape.queries * ASKING / BLOCK
        pooling = (asking + shape.keys / shape.group) * shape.head_dim
        return float(candidates) * shape.head_dim + pooling


@lru_cache(maxsize=256)
def _grouped(read: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The kv heads that some heads read, and the place of each among them.

    The places are None where equally many heads, side by side, read each.
    """
    used = tuple(dict.fromkeys(read))
    each = len(read) // len(used)
    if read == tuple(kv for kv in used for _ in range(each)):
        return used, None
    return used, tuple(used.index(kv) for kv in read)
