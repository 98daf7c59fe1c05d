"""Linformer, fitted: the keys of a chunk are projected onto a few slots by their positions.

Every kv head has two fixed matrices with non-negative entries: rows of E, which say of which
positions in a chunk a slot is the mean, and rows of D, which say to which slots a position belongs.
Both have sums of one, so that masses stay what they are:

    k~ = E W K / E W 1    mass = D^T W 1    value sums = D^T W V    E, D = argmin mean |K - D E K|^2

over the chunks of calibration text, whose Gram matrix by position is all that this needs. Without
it the slots are equal segments. W are the weights of the keys for a mean query, the only part that
depends on the text at hand. Exact where keys do not change within a slot.

Source: Wang et al., Linformer, https://arxiv.org/abs/2006.04768, section 4. Unlike the paper,
projections are fitted to keys rather than trained, are per kv head and chunk of `chunk` keys, so
that the form is causal, keys are weighted for a mean query, and a slot has the mass of the keys
that belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnplan.kernels.compressors._chunk_slots import ChunkCompressor, Chunks, Summary
from attnplan.kernels.numerics import balance, query_draws
from attnplan.kernels.operands.inputs import POSITIONS, Inputs, Moments

SIZES = {POSITIONS: (8, 16, 32), POSITIONS // 2: (1, 4)}
"""Keys of a chunk, and the slots that it may have."""
STEPS = 20


@dataclass(frozen=True)
class Linformer(ChunkCompressor):
    """Replace every far chunk of 128 or 64 keys by `slots` projections of them."""

    name: ClassVar[str] = "linformer"
    predictor: ClassVar[str] = "cluster_inertia"
    mean_name: ClassVar[str | None] = "balanced.query_mean"
    cheap: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": POSITIONS // 2, "slots": 1, "references": 8},
    )
    settings: ClassVar[tuple[tuple[int, int], ...]] = ((POSITIONS, 16),)
    matched: ClassVar[tuple[Mapping[str, int], ...]] = (
        {"chunk": POSITIONS, "slots": 16, "references": 16},
        {"chunk": POSITIONS // 2, "slots": 4, "references": 16},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk not in SIZES:
            known = " or ".join(map(str, SIZES))
            raise ValueError(f"chunk must be {known} keys, as is fitted, got {self.chunk}")
        if self.slots not in SIZES[self.chunk]:
            known = ", ".join(map(str, SIZES[self.chunk]))
            raise ValueError(f"slots must be one of {known}, as is fitted, got {self.slots}")

    def summarise(self, chunks: Chunks, inputs: Inputs) -> Summary:
        fitted = inputs.fitted_heads(_name(self.chunk, self.slots), inputs.kv_head)[:, None]
        mean, share = fitted.to(chunks.key.dtype).unbind(2)
        mean, share = (t * chunks.weight[..., None, :] for t in (mean, share))
        mass = share.sum(-1)
        mean = torch.where(mean.sum(-1, keepdim=True) > 0, mean, share)  # a mean of sinks alone
        total = mean.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
        return Summary(mean @ chunks.key / total, mass, share @ chunks.value)

    def build_macs(self, head_dim: int) -> float:
        return float(self.chunk * (head_dim + 2 * self.slots * (head_dim + 1)))

    @classmethod
    def fit(cls, moments: Moments) -> dict[str, Tensor]:
        fitted = balance.fit(moments) | query_draws.fit(moments)
        for chunk, sizes in SIZES.items():
            gram = _gram(moments, chunk)
            for slots in sizes:
                mean, share = _segments(chunk, slots)
                if gram is None:
                    mean, share = (t.expand(len(moments.key_mean), -1, -1) for t in (mean, share))
                else:
                    mean, share = project(gram, mean, share, STEPS)
                fitted[_name(chunk, slots)] = torch.stack([mean, share.mT], 1).float()
        return fitted

    def reads(self, fitted: frozenset[str]) -> frozenset[str]:
        own = _name(self.chunk, self.slots)
        names = super().reads(fitted)
        return frozenset(n for n in names if n == own or not n.startswith("linformer."))


def project(gram: Tensor, mean: Tensor, share: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """E [heads, slots, n] and D [heads, n, slots] that bring D E K close to K.

    Projected gradient steps on one of them at a time, with steps short enough that none makes
    the error larger (Bolte et al., https://doi.org/10.1007/s10107-013-0701-9).

    Args:
        gram: of K by row, [heads, n, n].
        mean: where E begins, [slots, n].
        share: where D begins, [n, slots].
        steps: of each.
    """
    centre = torch.eye(gram.shape[-1], dtype=gram.dtype) - 1 / gram.shape[-1]
    gram = centre @ gram @ centre  # what all keys have in common is kept by all E and D
    tiny = torch.finfo(gram.dtype).tiny
    largest = torch.linalg.matrix_norm(gram, 2)[:, None, None].clamp(min=tiny)
    mean, share = mean.to(gram.dtype), share.to(gram.dtype)
    for _ in range(steps):
        both = share.mT @ share
        bound = torch.linalg.matrix_norm(both)[..., None, None] * largest
        mean = _onto_simplex(mean - (both @ mean - share.mT) @ gram / bound)
        seen = mean @ gram
        both = seen @ mean.mT
        bound = torch.linalg.matrix_norm(both)[..., None, None].clamp(min=tiny)
        share = _onto_simplex(share - (share @ both - seen.mT) / bound)
    return mean, share


def _name(chunk: int, slots: int) -> str:
    """Of the fitted projections."""
    size = str(slots) if chunk == POSITIONS else f"{slots}_of_{chunk}"
    return f"linformer.projections_{size}"


def _gram(moments: Moments, chunk: int) -> Tensor | None:
    """Products of keys by their positions in chunks of `chunk`, a divisor of what is profiled."""
    gram = moments.key_position_gram
    if gram is None:
        return None
    parts = [
        gram.double()[:, at : at + chunk, at : at + chunk] for at in range(0, POSITIONS, chunk)
    ]
    return torch.stack(parts).mean(0)


def _segments(chunk: int, slots: int) -> tuple[Tensor, Tensor]:
    """E and D of equal segments."""
    run = torch.arange(chunk) * slots // chunk
    share = torch.nn.functional.one_hot(run, slots).double()
    return (share / share.sum(0)).mT, share


def _onto_simplex(rows: Tensor) -> Tensor:
    """The nearest rows with non-negative entries and sums of one."""
    sorted_, _ = rows.sort(-1, descending=True)
    excess = (sorted_.cumsum(-1) - 1) / torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype)
    last = (sorted_ > excess).sum(-1, keepdim=True) - 1
    return (rows - excess.gather(-1, last)).clamp(min=0)
