"""What attention is asked to compute, in numbers, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one causal attention call; query row r stands at position keys - queries + r."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )
        if self.queries > self.keys:
            raise ValueError(f"more queries than keys: {self.queries} and {self.keys}")

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def causal_pairs(self) -> int:
        """Query-key pairs of dense causal attention of one head of one sequence."""
        first = self.keys - self.queries
        return self.queries * first + self.queries * (self.queries + 1) // 2

    @property
    def dense_macs(self) -> float:
        """Multiply-adds of dense causal attention of one head of one sequence."""
        return float(self.causal_pairs * 2 * self.head_dim)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one head of one sequence; they predict, benchmarks measure.

    Sorts, top-k, hashes, gathers and exponentials are not counted: they are no multiply-adds, and
    what they take depends on the device. Where cost decides, measured time does.

    Attributes:
        attention: scores and weighted values, over keys and slots.
        selection: whatever it takes to choose the keys, to make the slots, or to sum over keys
            without tiles.
    """

    attention: float
    selection: float = 0.0

    @property
    def macs(self) -> float:
        return self.attention + self.selection

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.attention + other.attention, self.selection + other.selection)
