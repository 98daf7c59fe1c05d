"""Tables and plans from the outcome of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from attnplan.costs.prefill import this_device
from attnplan.kernels import cache_catalog
from attnplan.kernels.digest import decode_digest
from attnplan.models.load import LoadedModel
from attnplan.pipeline.search_cache import Memory, Remembered
from attnplan.pipeline.search_prefill import Choice, Outcome
from attnplan.pipeline.verify import unjudged
from attnplan.plan.plan import DecodeSection, Plan, Target
from attnplan.profiles.text.calibration import TokenSet
from attnplan.profiling.profiling import Workload
from attnplan.quality.retrieval import KINDS, SHORT
from attnplan.search.budget import Budget

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

ESTIMATE = "attention, estimated by a static model: no timing of the device exists"


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
    """Dense, the baselines, and the per-head plan (or the last one that was tried)."""
    last = outcome.plan or outcome.attempts[-1]
    dense = Row("dense", 1.0, 0.0, 1.0, 1.0, last.measured.induction_dense, 0.0, 1.0)
    order = {"uniform": 0, "per layer": 1}
    others = sorted(outcome.baselines, key=lambda choice: order[choice.name])
    rows = [dense, *(_row(choice, f"best {choice.name}") for choice in others)]
    return [*rows, _row(last, "per head")]


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


def to_plan(
    loaded: LoadedModel,
    outcome: Outcome,
    work: Workload,
    holdout: TokenSet,
    budget: Budget,
) -> Plan:
    """The plan of a successful search, with its evidence.

    Raises:
        ValueError: nothing met the budget.
    """
    choice = outcome.plan
    if choice is None or choice.measured.crossover is None:
        raise ValueError("the search found no plan within its budget")
    costs = outcome.costs
    target = Target(
        device=costs.device.name,
        kind=costs.device.kind,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        engine=f"{costs.device.kind} {costs.engine}",
        versions={**costs.device.versions, "attnplan": version("attnplan")},
    )
    predicted: dict[str, Any] = {
        "kl_per_token": _short(choice.predicted_kl),
        "latency_ms": _short(choice.predicted_ms),
    }
    if not costs.is_here:
        # nothing ran there: times are those of the cost model, of attention alone
        predicted["latency_dense_ms"] = _short(choice.measured.dense_ms)
        predicted["latency_of"] = "attention, from the table of a device that was not here"
    if costs.is_estimate:
        predicted["latency_of"] = ESTIMATE
    evidence = {
        "calibration": {
            "data": work.tokens.name,
            "digest": work.tokens.digest,
            "sequences": work.texts,
            "context": work.context,
            "seed": work.seed,
        },
        "holdout": {
            "data": holdout.name,
            "split": holdout.split,
            "digest": holdout.digest,
            "sequences": int(holdout.tokens.shape[0]),
        },
        "budget": budget.canonical(),
        "measured": _figures(choice, timed=costs.is_here),
        "predicted": predicted,
        "baselines": {
            other.name: _figures(other, timed=costs.is_here) for other in outcome.baselines
        },
        **({} if costs.error is None else {"cost_model_error": _short(costs.error)}),
        "store": {"profile_run": outcome.run, "search": outcome.search},
    }
    return Plan.from_assignment(
        choice.layers,
        model=loaded.identity,
        target=target,
        context=(choice.measured.crossover, work.context),
        evidence=evidence,
        fitted=outcome.fitted,
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


def memory_figures(one: Remembered) -> dict[str, Any]:
    """Plain values of one way to spend a memory budget."""
    return {
        "kv_bytes": list(one.held),
        "kv_bytes_dense": list(one.held_dense),
        "continuation_kl": _short(one.continuation_kl),
        "kl_by_sequence": [_short(kl) for kl in one.kl_by_sequence],
        "predicted_kl": _short(one.predicted_kl),
        "decode_ms": [_short(ms) for ms in one.decode_ms],
        **_recall_figures(one),
    }


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


def _recall_figures(one: Remembered) -> dict[str, Any]:
    """Share of hidden facts that are found, [plan, dense] by time of asking and kind."""
    if one.recall is None:
        return {}
    plan, dense = (asdict(found) for found in one.recall)
    return {
        "retrieval": {
            when: {kind: [_short(plan[when][kind]), _short(dense[when][kind])] for kind in KINDS}
            for when in plan
        }
    }


def with_memory(
    loaded: LoadedModel,
    memory: Memory,
    work: Workload,
    holdout: TokenSet,
    budget: Budget,
    prefill: Plan | None = None,
) -> Plan:
    """A plan that keeps what `memory` chose; with the prefill of another plan, or dense.

    Raises:
        ValueError: nothing met the budget.
    """
    if memory.misses:
        raise ValueError("the search found no plan within its budget")
    model = loaded.model
    kinds = {type(keeper) for row in memory.best.kept for keeper in row}
    needed = {
        name
        for kind in kinds
        for name in cache_catalog.fitted_names(loaded.identity.head_dim, kind)
    }
    fitted = {
        layer: {name: tensor for name, tensor in found.items() if name in needed}
        for layer, found in memory.fitted.items()
    }
    if prefill is not None:
        for layer, found in prefill.fitted.items():
            fitted[layer] = {**fitted.get(layer, {}), **found}
    fitted = {layer: found for layer, found in fitted.items() if found}
    device = this_device(model.device)
    target = Target(
        device=device.name,
        kind=model.device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        engine=f"{model.device.type} {decode_digest(model.device.type, kinds)}",
        versions={**device.versions, "attnplan": version("attnplan")},
    )
    evidence: dict[str, Any] = dict(prefill.evidence) if prefill is not None else {}
    evidence["memory"] = {
        "calibration": {"data": work.tokens.name, "digest": work.tokens.digest},
        "holdout": {"data": holdout.name, "digest": holdout.digest},
        "budget": budget.canonical(),
        "measured": memory_figures(memory.best),
        "baselines": {}
        if memory.uniform is None
        else {memory.uniform.name: memory_figures(memory.uniform)},
    }
    return Plan(
        loaded.identity,
        target if prefill is None else prefill.target,
        {} if prefill is None else prefill.methods,
        () if prefill is None else prefill.prefill,
        evidence,
        fitted,
        decode=(DecodeSection((1, work.context), memory.best.kept),),
    )


def figures(choice: Choice, *, timed: bool = True) -> dict[str, float]:
    """Measured numbers as the store keeps them beside a plan; times only where they were taken."""
    measured = choice.measured
    times = {"latency_ms": measured.latency_ms, "latency_dense_ms": measured.dense_ms}
    return {
        "density": measured.density,
        "kl_per_token": measured.quality.kl_per_token,
        "perplexity": measured.quality.perplexity,
        "perplexity_dense": measured.quality.perplexity_dense,
        "induction_accuracy": measured.induction,
        **(times if timed else {}),
    }


def _figures(choice: Choice, *, timed: bool) -> dict[str, Any]:
    measured = choice.measured
    quality = measured.quality
    times = {
        "latency_ms": [_short(measured.latency_ms), _short(measured.dense_ms)],
        "speedups": {length: _short(value) for length, value in measured.speedups.items()},
    }
    return {
        "density": _short(measured.density),
        "kl_per_token": _short(quality.kl_per_token),
        "kl_standard_error": None if quality.kl_spread is None else _short(quality.kl_spread),
        "perplexity_ratio": _short(quality.perplexity_ratio),
        "induction_accuracy": [_short(measured.induction), _short(measured.induction_dense)],
        **(times if timed else {}),
    }


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


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
