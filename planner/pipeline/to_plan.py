"""The plan of a search, with its evidence, written to its file and into the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attnplan.costs.prefill import this_device
from attnplan.kernels import cache_catalog
from attnplan.kernels.digest import decode_digest
from attnplan.models.load import LoadedModel
from attnplan.pipeline.request import Choice, Outcome
from attnplan.pipeline.search_cache import Memory, Remembered
from attnplan.plan.plan import DecodeSection, Plan, Target
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import TokenSet
from attnplan.profiling.profiling import Workload
from attnplan.quality.retrieval import KINDS
from attnplan.search.budget import Budget

ESTIMATE = "attention, estimated by a static model: no timing of the device exists"


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


def _short(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def keep(store: Store, search: int, plan: Plan, path: Path, numbers: Mapping[str, float]) -> None:
    """Write a plan to its file, and into the store as a plan of its search.

    Args:
        store: where `attnplan query plans` finds it.
        search: id of the search that made it.
        plan: what was found.
        path: of the YAML file.
        numbers: what was measured, by the names of `PLAN_FIGURES`.

    Raises:
        PlanError: the file, or the one of its fitted data, cannot be written.
        DatabaseError: the store cannot be written.
    """
    plan.save(path)
    text = path.read_text(encoding="utf-8")
    store.save_plan(records.PlanRecord(search, digest(text), str(path), text, True, numbers))
