"""Statistics of exact attention, read off passes over it that never hold a tokens x tokens matrix.

Attention itself is the instrument: run it with designed values, and read its output.

    values := Gaussian        a sketch A G of the range of A, and the log-mass of every query
    blocks of 64 key columns  mass per block: sinks, locality, best blocks, heat map
    log p                     H_i = -sum_j p_ij log p_ij, and sum_j p_ij^2
    rows := basis of A G      A^T Q, whose singular values are those of A within that range

The first line is one flash attention. The rest reads rows of A, exactly normalised by the log-mass
of the first pass, in chunks of at most `CHUNK` numbers (or 64 rows of one head).

All tensors are of one text, without a batch dimension: query [heads, tokens, head_dim], key
[kv_heads, tokens, head_dim]. Computed in float64 if the query is, else in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.profiles.statistics.attention_rows import CHUNK, attend, log_rows

SINKS = 4
WINDOW = 128
"""Far keys of a query: those past the first `SINKS` and before its last `WINDOW`."""
WINDOWS = (64, 128, 256, 512)
TOPS = (1, 4, 8)
LINES = 32
"""Single key columns, or single diagonals, in vertical and slash mass."""
CELLS = 64
"""Rows and columns of a heat map at most."""


@dataclass(frozen=True)
class AttentionProbe:
    """What the probes read; a mass is a sum over all queries, so at most `tokens`.

    Attributes:
        tokens: queries.
        sink_mass: [heads], on the first 4 keys.
        sink_mass_64: [heads], on the first 64 keys.
        local_mass: [heads, 4], on the last 64, 128, 256 and 512 keys up to the query.
        far_mass: [heads], on all but the first 4 and the last 128 keys.
        top_block_mass: [heads, 3], far mass of each query's best 1, 4 and 8 key blocks.
        vertical_mass: [heads], far mass in the 32 key columns that have most of it.
        slash_mass: [heads], far mass in the 32 diagonals that have most of it.
        entropy: [heads, tokens], nats.
        collision: [heads, tokens], sum_j p_ij^2.
        max_logit: [heads], the largest score before the softmax.
        energy: [heads, rank], squares of the leading singular values of A, descending: lower
            bounds, exact where A has at most `rank` of them.
        heat: [heads, cells, cells], mass of the queries of a row on the keys of a column.
        cell: tokens per row and column of `heat`, 64 times a power of two.
    """

    tokens: int
    sink_mass: Tensor
    sink_mass_64: Tensor
    local_mass: Tensor
    far_mass: Tensor
    top_block_mass: Tensor
    vertical_mass: Tensor
    slash_mass: Tensor
    entropy: Tensor
    collision: Tensor
    max_logit: Tensor
    energy: Tensor
    heat: Tensor
    cell: int


def probe(
    query: Tensor, key: Tensor, *, scale: float, rank: int = 64, seed: int = 0
) -> AttentionProbe:
    """All statistics of a layer's attention matrices on one text.

    Args:
        query: [heads, tokens, head_dim], after RoPE.
        key: [kv_heads, tokens, head_dim], after RoPE.
        scale: factor before the softmax.
        rank: singular values asked for.
        seed: of the sketch.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(dtype), key.to(dtype)
    heads, tokens, _ = query.shape
    group = heads // key.shape[0]
    basis, log_mass = _range_of_attention(query, key, scale, rank, seed)
    together = max(1, min(group, 4 * CHUNK // (BLOCK * tokens)))
    parts, back = [], []
    for first in range(0, heads, group):
        for start in range(first, first + group, together):
            some = slice(start, min(start + together, first + group))
            sums = _Sums(some.stop - some.start, tokens, basis[some], log_mass[some])
            for row, log_p in log_rows(query[some], key[first // group], log_mass[some], scale):
                sums.add(row, log_p)
            parts.append(sums.result())
            back.append(sums.back[:, :tokens])
    energy = _energy(query, key, torch.cat(back), scale)
    fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return AttentionProbe(tokens=tokens, energy=energy, cell=_cell(tokens), **fields)


def _range_of_attention(
    query: Tensor, key: Tensor, scale: float, rank: int, seed: int
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis [heads, tokens, rank] of A G, and the log-mass of every query.

    Source: Halko, Martinsson, Tropp, Finding structure with randomness,
    https://arxiv.org/abs/0909.4061, algorithm 4.1.
    """
    tokens = query.shape[1]
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(tokens, min(rank, tokens), generator=generator, dtype=torch.float64)
    sketch = sketch.to(query).expand(key.shape[0], -1, -1)
    output, log_mass = attend(query, key, sketch, scale=scale)
    return torch.linalg.qr(output)[0], log_mass.to(query.dtype)


def _energy(query: Tensor, key: Tensor, back: Tensor, scale: float) -> Tensor:
    """Squared singular values of A within the row space of `back` = A^T Q, [heads, rank].

    One more product with A: half a step of subspace iteration, so that slowly decaying spectra are
    underestimated less than by the singular values of `back` itself.
    """
    right = torch.linalg.qr(back)[0]
    group = query.shape[0] // key.shape[0]
    images = [  # every query head has its own values: attend once per head of a group
        attend(query[g::group], key, right[g::group], scale=scale)[0] for g in range(group)
    ]
    image = torch.stack(images, dim=1).flatten(0, 1).double()
    return torch.linalg.eigvalsh(image.mT @ image).flip(1).clamp(min=0)


class _Sums:
    """What is added up over chunks of rows, for heads that share a kv head."""

    def __init__(self, heads: int, tokens: int, basis: Tensor, log_mass: Tensor) -> None:
        self.tokens = tokens
        self.log_mass = log_mass
        self.padded = tokens + -tokens % BLOCK
        self.basis = torch.nn.functional.pad(basis, (0, 0, 0, self.padded - tokens))
        self.per_cell = _cell(tokens) // BLOCK

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(heads, *shape, dtype=dtype, device=basis.device)

        self.sink, self.sink_64, self.far = zeros(), zeros(), zeros()
        self.local, self.top = zeros(len(WINDOWS)), zeros(len(TOPS))
        self.column, self.diagonal = zeros(self.padded), zeros(self.padded)
        self.entropy, self.collision = zeros(self.padded), zeros(self.padded)
        self.largest = torch.full_like(self.sink, -math.inf)
        self.back = zeros(self.padded, basis.shape[2], dtype=basis.dtype)
        cells = -(-self.padded // (self.per_cell * BLOCK))
        self.heat = zeros(cells, cells)
        self.buffer = basis.new_empty(0)
        ones = basis.new_ones(BLOCK, BLOCK)
        self.right = ones.triu(1)
        tall = basis.new_ones(4 * BLOCK, 4 * BLOCK)
        self.left = tall.tril(-1)
        self.not_near = basis.new_ones(4 * BLOCK, 4 * BLOCK + WINDOW).tril()  # from WINDOW back

    def add(self, first: int, log_p: Tensor) -> None:
        """Rows [first, first + n) of log A; `log_p` is used up."""
        heads, size, keys = log_p.shape
        rows, last = slice(first, first + size), min(first + size, self.tokens)
        top = log_p[:, : last - first].amax(2) + self.log_mass[:, first:last]
        self.largest = torch.maximum(self.largest, top.amax(1).double())
        if self.buffer.numel() < log_p.numel():
            self.buffer = torch.empty_like(log_p).view(-1)
        p = torch.exp(log_p, out=self.buffer[: log_p.numel()].view(log_p.shape))
        self.entropy[:, rows] = -log_p.mul_(p).sum(2).double()
        self.collision[:, rows] = torch.linalg.vector_norm(p, dim=2).double().square()
        self.back[:, :keys].baddbmm_(p.mT, self.basis[:, rows])
        self.sink += p[:, :, :SINKS].sum((1, 2), dtype=torch.float64)
        by_block = p.view(heads, size, -1, BLOCK).sum(3)
        blocks = by_block.view(heads, size // BLOCK, BLOCK, -1).sum(2).double()
        self.sink_64 += blocks[:, :, 0].sum(1)
        self._add_local(first, p, blocks)
        self._add_heat(first, blocks)
        self._add_far(first, p, by_block)

    def _add_local(self, first: int, p: Tensor, blocks: Tensor) -> None:
        """Windows are whole blocks, and the part of one block right of its diagonal."""
        tiles = p.view(p.shape[0], -1, BLOCK, blocks.shape[2], BLOCK)
        own = torch.arange(first // BLOCK, first // BLOCK + blocks.shape[1], device=p.device)
        block = torch.arange(blocks.shape[2], device=p.device)
        for w, window in enumerate(WINDOWS):
            cut = own - window // BLOCK
            whole = (block > cut[:, None]).double()
            self.local[:, w] += (blocks * whole).sum((1, 2))
            edge = tiles.diagonal((first - window) // BLOCK, 1, 3)  # [heads, 64, 64, blocks]
            self.local[:, w] += (edge * self.right[:, :, None]).sum((1, 2, 3)).double()

    def _add_heat(self, first: int, blocks: Tensor) -> None:
        row = torch.arange(blocks.shape[1], device=blocks.device) + first // BLOCK
        column = torch.arange(blocks.shape[2], device=blocks.device)
        pooled = torch.zeros(*blocks.shape[:2], self.heat.shape[2], dtype=torch.float64)
        pooled = pooled.to(blocks.device).index_add_(2, column // self.per_cell, blocks)
        self.heat.index_add_(1, row // self.per_cell, pooled)

    def _add_far(self, first: int, p: Tensor, by_block: Tensor) -> None:
        """Take the near keys out of `p` and `by_block`, and read what is left."""
        heads, size, keys = p.shape
        start = max(0, first - WINDOW) // BLOCK
        band = self.not_near[:size, : size + WINDOW]
        p[:, :, start * BLOCK :] *= band[:, band.shape[1] - (keys - start * BLOCK) :]
        p[:, :, :SINKS] = 0
        by_block[:, :, start:] = p[:, :, start * BLOCK :].view(heads, size, -1, BLOCK).sum(3)
        by_block[:, :, 0] = p[:, :, :BLOCK].sum(2)
        self.far += by_block.sum((1, 2), dtype=torch.float64)
        best = by_block.topk(min(max(TOPS), by_block.shape[2]), dim=2).values.sum(1).double()
        for t, top in enumerate(TOPS):
            self.top[:, t] += best[:, :top].sum(1)
        self.column[:, :keys] += p.sum(1)
        self._add_diagonals(first, p)

    def _add_diagonals(self, first: int, p: Tensor) -> None:
        """Sums along i - j: rows read with a stride of one column more than they have."""
        heads, size, keys = p.shape
        skewed = p.as_strided(
            (heads, size, first + 1), (size * keys, keys + 1, 1), p.storage_offset()
        )
        self.diagonal[:, : first + 1] += skewed.sum(1).flip(1)
        # keys before those diagonals: the corner below the diagonal of the first columns
        corner = p.new_zeros(heads, size, 2 * size)
        torch.mul(p[:, :, :size], self.left[:size, :size], out=corner[:, :, size:])
        skewed = corner.as_strided(
            (heads, size, size), (2 * size * size, 2 * size + 1, 1), corner.storage_offset() + 1
        )
        sums = skewed.sum(1).flip(1)  # columns: i - j = first + 0, first + 1, ...
        self.diagonal[:, first : first + size] += sums

    def result(self) -> dict[str, Tensor]:
        tokens, lines = self.tokens, min(LINES, self.tokens)
        return {
            "sink_mass": self.sink,
            "sink_mass_64": self.sink_64,
            "local_mass": self.local,
            "far_mass": self.far,
            "top_block_mass": self.top,
            "vertical_mass": self.column[:, :tokens].topk(lines, dim=1).values.sum(1),
            "slash_mass": self.diagonal[:, :tokens].topk(lines, dim=1).values.sum(1),
            "entropy": self.entropy[:, :tokens],
            "collision": self.collision[:, :tokens],
            "max_logit": self.largest,
            "heat": self.heat,
        }


def _cell(tokens: int) -> int:
    """Tokens per cell of a heat map of at most `CELLS` cells: 64, 128, 256, ..."""
    blocks = -(-tokens // BLOCK)
    return BLOCK << max(0, math.ceil(math.log2(blocks / CELLS)))
