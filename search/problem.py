"""The numbers that a search works on: what every candidate costs and loses, for every head."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnplan.search.latency import LatencyModel

Assignment = NDArray[np.int64]
"""[layers, heads], the index of each head's candidate."""


@dataclass(frozen=True)
class Prediction:
    """What an assignment is expected to lose and to cost.

    Attributes:
        kl: nats per token.
        density: multiply-adds, selection included, as a share of dense.
        latency_ms: of the whole prefill.
        kv_share: bytes of the KV cache, as a share of dense.
    """

    kl: float
    density: float
    latency_ms: float
    kv_share: float


@dataclass(frozen=True, eq=False)
class Problem:
    """What every candidate loses and costs; candidate 0 is dense.

    Attributes:
        names: of the candidates; the first is 'dense'.
        families: of the candidates.
        windows: minimum local window of each candidate, in keys.
        fisher: float64 [layers, heads, candidates], KL that assigning the candidate to the head
            adds, in nats per token; 0 for dense, +inf where it is not offered.
        density: float64 [candidates], multiply-adds with selection, relative to dense.
        kv_bytes: float64 [candidates], KV cache relative to dense. A kv head stores what the most
            demanding head of its group needs.
        group: heads per kv head.
        latency: cost of layers on the device.
        cache_bytes: the KV cache of the dense model; needed by budgets in bytes only.
        calibration: measured over predicted KL, once some assignments have been evaluated.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]
    windows: tuple[int, ...]
    fisher: NDArray[np.float64]
    density: NDArray[np.float64]
    kv_bytes: NDArray[np.float64]
    group: int
    latency: LatencyModel
    cache_bytes: float = 0.0
    calibration: float = 1.0

    def __post_init__(self) -> None:
        if not self.names or self.names[0] != "dense":
            raise ValueError(f"the first candidate must be dense, got {self.names[:1]}")
        if self.fisher.ndim != 3:
            raise ValueError(f"fisher must be [layers, heads, candidates], got {self.fisher.shape}")
        sizes = {
            "families": len(self.families),
            "windows": len(self.windows),
            "fisher": self.fisher.shape[2],
            "density": len(self.density),
            "kv_bytes": len(self.kv_bytes),
            "latency": self.latency.candidates,
        }
        for name, size in sizes.items():
            if size != len(self.names):
                raise ValueError(f"{name} has {size} candidates, names has {len(self.names)}")
        if self.fisher.shape[1] % self.group:
            raise ValueError(
                f"{self.fisher.shape[1]} heads do not divide into groups of {self.group}"
            )
        if np.isnan(self.fisher).any() or (self.fisher < 0).any():
            where = np.argwhere(~(self.fisher >= 0))[0]
            raise ValueError(
                f"layer {where[0]}, head {where[1]}: KL of {self.names[where[2]]} must not be "
                f"negative, got {self.fisher[tuple(where)]}"
            )
        if self.fisher[:, :, 0].any():
            raise ValueError("dense loses nothing: fisher[:, :, 0] must be 0")

    @property
    def layers(self) -> int:
        return int(self.fisher.shape[0])

    @property
    def heads(self) -> int:
        return int(self.fisher.shape[1])

    @property
    def candidates(self) -> int:
        return len(self.names)

    @property
    def dense(self) -> Assignment:
        """All heads dense."""
        return np.zeros((self.layers, self.heads), np.int64)

    def predict(self, assignment: Assignment) -> Prediction:
        """Expected KL and costs of an assignment.

        Raises:
            ValueError: wrong shape, or a candidate that does not exist.
        """
        self.check(assignment)
        kl, _, latency_ms, kv_share = self.layer_totals(assignment).sum(0)
        return Prediction(
            float(kl),
            float(self.density[assignment].mean()),
            float(latency_ms + self.latency.rest_ms),
            float(round(kv_share, 12)),
        )

    def layer_totals(
        self, assignment: Assignment, fisher: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """What each layer adds to (kl, density, latency_ms, kv_share).

        Args:
            assignment: [..., layers, heads].
            fisher: other scores than the problem's, already calibrated.

        Returns:
            float64 [..., layers, 4]; the time outside attention is not in it.
        """
        if fisher is None:
            fisher = self.fisher * self.calibration
        layer, head = np.ogrid[: self.layers, : self.heads]
        stored = self.kv_bytes[assignment]
        stored = stored.reshape(*stored.shape[:-1], self.heads // self.group, self.group).max(-1)
        return np.stack(
            [
                fisher[layer, head, assignment].sum(-1),
                self.density[assignment].mean(-1) / self.layers,
                self.latency.layer_ms(assignment),
                stored.mean(-1) / self.layers,
            ],
            axis=-1,
        )

    def check(self, assignment: Assignment) -> None:
        """Raise ValueError unless `assignment` fits this problem."""
        if assignment.shape != (self.layers, self.heads):
            raise ValueError(
                f"an assignment needs shape ({self.layers}, {self.heads}), got {assignment.shape}"
            )
        if assignment.min() < 0 or assignment.max() >= self.candidates:
            raise ValueError(
                f"candidates are numbered 0 to {self.candidates - 1}, got {assignment.min()} to "
                f"{assignment.max()}"
            )


def to_lists(assignment: Assignment) -> list[list[int]]:
    """Plain integers, for JSON."""
    lists: list[list[int]] = assignment.tolist()
    return lists


def from_lists(lists: Sequence[Sequence[int]]) -> Assignment:
    """The assignment that `to_lists` wrote."""
    return np.array(lists, np.int64)


def digest(assignment: Assignment) -> str:
    """32 hexadecimal digits that identify an assignment."""
    text = f"{assignment.shape}{to_lists(assignment)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
