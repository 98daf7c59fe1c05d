"""Tables from the outcome of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnplan.pipeline.request import Choice, Outcome
from attnplan.pipeline.search_cache import Memory, Remembered
from attnplan.pipeline.verify import unjudged
from attnplan.quality.retrieval import SHORT

HEADERS = (
    "plan",
    "density",
    "KL",
    "ppl ratio",
    "prefill",
    "induction",
    "predicted KL",
    "predicted prefill",
    "misses",
)


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: what was compared.
        density: share of dense multiply-adds.
        kl: held-out KL per token, in nats.
        ppl_ratio: perplexity over the original's.
        speedup: of the whole prefill, measured.
        induction: share of a repeated random string that is copied.
        predicted_kl: by the scores.
        predicted_speedup: by the device's cost model.
        note: what it breaks.
    """

    name: str
    density: float
    kl: float
    ppl_ratio: float
    speedup: float
    induction: float
    predicted_kl: float
    predicted_speedup: float
    note: str = ""


def comparison(outcome: Outcome) -> list[Row]:
    """Dense, the baselines, and the last per-head plan; says where a baseline is the plan."""
    last = outcome.attempts[-1]
    dense = Row("dense", 1.0, 0.0, 1.0, 1.0, last.measured.induction_dense, 0.0, 1.0)
    order = {"uniform": 0, "per layer": 1}
    others = sorted(outcome.baselines, key=lambda choice: order[choice.name])
    rows = [dense, *(_row(choice, f"best {choice.name}") for choice in others)]
    own = _row(last, "per head")
    if outcome.plan is not None and outcome.plan.name != last.name:
        told = f"the best {outcome.plan.name} plan does better, and is the plan"
        own = replace(own, note="; ".join(filter(None, (own.note, told))))
    return [*rows, own]


def _row(choice: Choice, name: str) -> Row:
    measured = choice.measured
    return Row(
        name=name,
        density=measured.density,
        kl=measured.quality.kl_per_token,
        ppl_ratio=measured.quality.perplexity_ratio,
        speedup=measured.speedup,
        induction=measured.induction,
        predicted_kl=choice.predicted_kl,
        predicted_speedup=measured.dense_ms / choice.predicted_ms,
        note="; ".join(choice.misses),
    )


MEMORY_HEADERS = (
    "plan",
    "bytes after prompt",
    "after continuation",
    "continuation KL",
    "predicted KL",
    "ms per token",
    "dense",
)


def memory_lines(memory: Memory) -> list[list[str]]:
    """The best uniform keeper and what was chosen per kv head, as text."""
    found = []
    for one in (memory.uniform, memory.best):
        if one is not None:
            held = [f"{a / b:.3f}x" for a, b in zip(one.held, one.held_dense, strict=True)]
            kls = [f"{kl:.4f}" for kl in (one.continuation_kl, one.predicted_kl)]
            found.append([one.name, *held, *kls, *(f"{ms:.1f}" for ms in one.decode_ms)])
    return found


def memory_notes(one: Remembered) -> list[str]:
    """What the verification of a memory could not judge, one sentence each."""
    if one.recall is None:
        return [SHORT]
    note = one.recall[1].unjudged()
    return [] if note is None else [note]


def notes(outcome: Outcome) -> list[str]:
    """What the verification of a prefill could not judge, or rests on; one sentence each."""
    note = None if outcome.plan is None else unjudged(outcome.plan.measured.induction_dense)
    return [told for told in (note, outcome.costs.other_engine) if told]


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of a comparison as text."""
    return [
        [
            row.name,
            f"{row.density:.3f}",
            f"{row.kl:.4f}",
            f"{row.ppl_ratio:.4f}",
            f"{row.speedup:.2f}x",
            f"{row.induction:.3f}",
            f"{row.predicted_kl:.4f}",
            f"{row.predicted_speedup:.2f}x",
            row.note,
        ]
        for row in rows
    ]
