"""Measure an assignment on held-out text and on the device, and hold it against its budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.plan.plan import Fitted
from attnplan.quality.prefill import Quality, Reference, prefill_latency
from attnplan.runtime.patch import patch_assignment, unpatch
from attnplan.search.budget import Budget
from attnplan.search.evaluation import BROKEN_KL

INDUCTION_LOSS = 0.03
"""A plan may copy at most this much less of a repeated random string than the original."""
FASTER = 1.03
"""A plan must beat dense by this factor at a length to be used there."""
LENGTHS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536)

Layers = Sequence[Sequence[Approximation]]


@dataclass(frozen=True)
class Measured:
    """What a plan costs and gains, as measured.

    Attributes:
        density: multiply-adds, selection included, over those of dense causal attention.
        quality: on held-out text.
        induction, induction_dense: share of a repeated random string that is copied.
        speedup: of the whole prefill at the context, dense time over the plan's.
        latency_ms, dense_ms: of that prefill.
        crossover: shortest tested length from which on the plan is faster; None if it never is.
        speedups: by tested length.
    """

    density: float
    quality: Quality
    induction: float
    induction_dense: float
    latency_ms: float
    dense_ms: float
    crossover: int | None
    speedups: dict[int, float]

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.latency_ms

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the store."""
        plain = asdict(self)
        plain["quality"]["kl_by_sequence"] = list(self.quality.kl_by_sequence)
        plain["speedups"] = {str(length): value for length, value in self.speedups.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Measured:
        quality = dict(plain["quality"])
        quality["kl_by_sequence"] = tuple(quality["kl_by_sequence"])
        speedups = {int(length): value for length, value in plain["speedups"].items()}
        return cls(**{**plain, "quality": Quality(**quality), "speedups": speedups})


@contextmanager
def running(model: Any, layers: Layers, fitted: Fitted) -> Iterator[None]:
    """The model under an assignment, at every length."""
    patch_assignment(model, layers, fitted)
    try:
        yield
    finally:
        unpatch(model)


def density(layers: Layers, shape: AttentionShape) -> float:
    """Share of dense multiply-adds, the mean over layers and heads."""
    known: dict[Approximation, float] = {}
    total = 0.0
    for row in layers:
        for approximation in row:
            if approximation not in known:
                known[approximation] = approximation.density(shape)
            total += known[approximation]
    return total / sum(len(row) for row in layers)


def measure(
    model: Any,
    layers: Layers,
    fitted: Fitted,
    reference: Reference,
    shape: AttentionShape,
    *,
    prefill: tuple[float, float],
    induction: float,
    induction_dense: float,
    repeats: int = 3,
    lengths: bool = True,
    advance: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measure an assignment at the context of `reference`.

    Args:
        model: not patched.
        layers: the assignment.
        fitted: layer to fitted data.
        reference: the original model on held-out texts.
        shape: of one layer's attention at the context.
        prefill: times at the context of the assignment and of the original, in ms.
        induction, induction_dense: what the assignment and the original copy.
        repeats: pairs of timed prefills at shorter lengths.
        lengths: also find the crossover on shorter texts.
        advance: called with what comes next.
    """
    context = shape.keys

    def applied() -> Any:
        return running(model, layers, fitted)

    advance("held-out text")
    quality = reference.quality(applied)
    latency_ms, dense_ms = prefill
    speedups = {context: dense_ms / latency_ms}
    text = reference.sequences[0]
    if lengths:
        speedups |= shorter_speedups(model, applied, text, speedups[context], repeats, advance)
    return Measured(
        density=density(layers, shape),
        quality=quality,
        induction=induction,
        induction_dense=induction_dense,
        latency_ms=latency_ms,
        dense_ms=dense_ms,
        crossover=crossover(speedups),
        speedups=dict(sorted(speedups.items())),
    )


def shorter_speedups(
    model: Any,
    applied: Callable[[], Any],
    text: Tensor,
    at_context: float,
    repeats: int,
    advance: Callable[[str], None],
) -> dict[int, float]:
    """Speed-ups at shorter lengths, from long to short, until the plan is slower."""
    found: dict[int, float] = {}
    if at_context < FASTER:
        return found
    for length in sorted((n for n in LENGTHS if n < len(text)), reverse=True):
        advance(f"prefill of {length}")
        timing = prefill_latency(model, applied, text[:length], repeats=repeats + 1)
        found[length] = timing.dense_ms / timing.median_ms
        if found[length] < FASTER:
            break
    return found


def crossover(speedups: dict[int, float]) -> int | None:
    """Shortest length from which on every tested length is faster than dense."""
    shortest = None
    for length in sorted(speedups, reverse=True):
        if speedups[length] < FASTER:
            break
        shortest = length
    return shortest


def fast(plan_ms: float, dense_ms: float, budget: Budget) -> bool:
    """Whether a prefill is clearly faster than dense, and within the budget."""
    limit = budget.max_latency
    within = limit is None or plan_ms <= limit.of(dense_ms)
    return within and plan_ms * FASTER <= dense_ms


def copies(induction: float, induction_dense: float) -> bool:
    """The induction gate: a plan copies about as much as the original."""
    return induction >= induction_dense - INDUCTION_LOSS


def unjudged(induction_dense: float) -> str | None:
    """Why the induction gate could not fail, or None where it could."""
    if induction_dense > INDUCTION_LOSS:
        return None
    return (
        f"induction could not be judged: the original model copies {induction_dense:.3f} of a "
        f"repeated random string, no more than the {INDUCTION_LOSS:g} that a plan may lose"
    )


def misses(measured: Measured, budget: Budget) -> list[str]:
    """What a measured plan breaks, one sentence each; empty when it is feasible."""
    found = []
    if max(measured.quality.kl_by_sequence) >= BROKEN_KL:
        found.append("outputs are not finite")
    if budget.max_density is not None and measured.density > budget.max_density * (1 + 1e-9):
        found.append(f"density {measured.density:.3f} is above {budget.max_density:g}")
    if budget.max_kl is not None and measured.quality.kl_per_token > budget.max_kl:
        found.append(f"KL {measured.quality.kl_per_token:.4f} is above {budget.max_kl:g}")
    ratio = measured.quality.perplexity_ratio
    if budget.max_ppl_ratio is not None and ratio > budget.max_ppl_ratio:
        found.append(f"perplexity ratio {ratio:.4f} is above {budget.max_ppl_ratio:g}")
    if budget.max_latency is not None:
        limit = budget.max_latency.of(measured.dense_ms)
        if measured.latency_ms > limit:
            found.append(f"prefill of {measured.latency_ms:.0f} ms is above {limit:.0f} ms")
    if measured.crossover is None:
        found.append(f"prefill is not faster than dense (speed-up {measured.speedup:.2f}x)")
    if not copies(measured.induction, measured.induction_dense):
        copied, dense = measured.induction, measured.induction_dense
        found.append(f"induction copies {copied:.3f}, the original {dense:.3f}")
    return found
