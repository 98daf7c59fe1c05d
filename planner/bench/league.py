"""The league table: every method of the catalog on the same heads, at the same cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from attnplan.costs.prefill import candidate_name, spell, timings
from attnplan.kernels import catalog
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.models.load import LoadedModel
from attnplan.pipeline.progress import Progress, Quiet
from attnplan.pipeline.score_methods import ScoreTable
from attnplan.pipeline.search_prefill import prepare
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.store.database import Store
from attnplan.profiling.profiling import Workload, model_record
from attnplan.search.budget import Budget, BudgetError
from attnplan.search.latency import LatencyModel
from attnplan.search.problem import Problem
from attnplan.search.solve import solve

HEADERS = (
    "method",
    "uniform setting",
    "density",
    "error",
    "error p90",
    "KL",
    "vs dense",
    "KL per head",
    "wins",
    "predictor",
)
COSTS = (
    "Density counts multiply-adds alone, of attention, selection and slots: sorts, top-k, hashes, "
    "gathers and exponentials are not in it. What a method costs is its time, measured, vs dense."
)


@dataclass(frozen=True)
class Entry:
    """One method of the catalog, or one pair of methods.

    Attributes:
        name: of the method.
        setting: its best setting for all heads within the density, None where none is.
        density: of that setting.
        error, error_p90: relative output error over the heads, median and 90th percentile.
        kl: predicted, with all heads on that setting, in nats per token.
        speedup: of a layer with all heads on it, over dense attention, measured.
        kl_per_head: predicted, when every head chooses among the method's settings and dense
            within the same mean density; None where that cannot be.
        wins: heads on which none of the other methods loses less within the density.
        predictor: the profile statistic that should tell its loss.
        correlation: Spearman's, of that statistic with the loss over all heads.
    """

    name: str
    setting: str | None
    density: float | None
    error: float | None
    error_p90: float | None
    kl: float | None
    speedup: float | None
    kl_per_head: float | None
    wins: int
    predictor: str
    correlation: float | None


def league(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    files: CaptureFiles,
    density: float,
    *,
    repeats: int = 3,
    progress: Progress | None = None,
) -> list[Entry]:
    """Every method on every head, at most at `density`; best first.

    Profile, scores and timings are those of a search, and are stored for it.

    Raises:
        ValueError: the density is not between 0 and 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be more than 0 and at most 1, got {density}")
    run, scores, costs = prepare(
        loaded, work, store, files, repeats, progress or Quiet(), thorough=True
    )
    shape = loaded.identity.prefill_shape(work.context)
    statistics = _statistics(store.head_profiles(run.id, arrays=False))
    stored = timings(loaded, work, store, costs.device)
    ms = {timing.approximation: timing.median_ms for timing in stored}
    entries = table(scores, costs.fit.model, ms, shape, density, statistics)
    key = records.MeasurementKey(
        model=model_record(loaded),
        kind="league",
        subject=digest([candidate_name(a) for a in scores.candidates]),
        conditions={
            "run": run.id,
            "density": density,
            "device": costs.device.digest,
            "engine": costs.engine,
        },
    )
    store.save_measurement(key, {"entries": [asdict(entry) for entry in entries]})
    return entries


def table(
    scores: ScoreTable,
    latency: LatencyModel,
    ms: Mapping[str, float],
    shape: AttentionShape,
    density: float,
    statistics: dict[str, NDArray[np.float64]],
) -> list[Entry]:
    """The entries, from scores and costs; see `league`.

    Args:
        scores: of every candidate on every head.
        latency: cost model of the device.
        ms: measured time of a layer by the spelling of its heads (`costs.prefill.spell`).
        shape: of the calls.
        density: what a head may compute.
        statistics: name to [layers, heads].
    """
    dense_ms = ms[spell((scores.candidates[0],) * shape.heads)]
    shares = np.array([a.density(shape) for a in scores.candidates])
    methods: dict[str, list[int]] = {}
    for c, candidate in enumerate(scores.candidates):
        if not candidate.is_dense:
            methods.setdefault(candidate.name, []).append(c)
    wins = _wins(scores, shares, density)
    entries = []
    for name, members in methods.items():
        fitting = [c for c in members if shares[c] <= density]
        best = min(fitting, key=lambda c: float(scores.texts[:, :, c].sum()), default=None)
        candidate = scores.candidates[members[0]]
        predictor = candidate.near.predictor if candidate.far is None else candidate.far.predictor
        kl_per_head = _own_choice(scores, latency, shares, members, density)
        won = sum(wins.get(c, 0) for c in members)
        if best is None:
            unknown = (None,) * 6
            entries.append(Entry(name, *unknown, kl_per_head, won, predictor, None))
            continue
        errors = scores.relative_error[:, :, best]
        entries.append(
            Entry(
                name=name,
                setting=catalog.key(scores.candidates[best]),
                density=float(shares[best]),
                error=float(np.median(errors)),
                error_p90=float(np.quantile(errors, 0.9)),
                kl=float(scores.texts[:, :, best].sum()),
                speedup=dense_ms / ms[spell((scores.candidates[best],) * shape.heads)],
                kl_per_head=kl_per_head,
                wins=won,
                predictor=predictor,
                correlation=_correlation(statistics.get(predictor), scores.texts[:, :, best]),
            )
        )
    return sorted(entries, key=lambda e: np.inf if e.kl_per_head is None else e.kl_per_head)


def lines(entries: Sequence[Entry]) -> list[list[str]]:
    """The rows of a table for people."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        [
            e.name,
            (e.setting or "none so cheap").removeprefix(e.name),
            shown(e.density, ".3f"),
            shown(e.error, ".3f"),
            shown(e.error_p90, ".3f"),
            shown(e.kl, ".4f"),
            "" if e.speedup is None else f"{e.speedup:.2f}x",
            shown(e.kl_per_head, ".4f"),
            str(e.wins),
            f"{e.predictor} {shown(e.correlation, '+.2f')}",
        ]
        for e in entries
    ]


def _wins(scores: ScoreTable, shares: NDArray[np.float64], density: float) -> dict[int, int]:
    """On how many heads each candidate loses least, of those within the density."""
    fitting = np.flatnonzero(shares <= density)
    if not len(fitting):
        return {}
    best = fitting[scores.texts[:, :, fitting].argmin(-1)]
    names, counts = np.unique(best, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def _own_choice(
    scores: ScoreTable,
    latency: LatencyModel,
    shares: NDArray[np.float64],
    members: list[int],
    density: float,
) -> float | None:
    """Predicted KL when heads choose among dense and `members` within a mean density."""
    fisher = np.full_like(scores.texts, np.inf)
    fisher[:, :, [0, *members]] = scores.texts[:, :, [0, *members]]
    choices = scores.candidates
    heads = scores.texts.shape[1]
    problem = Problem(
        names=tuple(candidate_name(a) for a in choices),
        families=tuple(a.family for a in choices),
        windows=(0,) * len(choices),
        fisher=fisher,
        density=shares,
        kv_bytes=np.ones(len(choices)),
        group=heads,
        latency=latency,
    )
    try:
        return solve(problem, Budget(max_density=density)).prediction.kl
    except BudgetError:
        return None


def _statistics(heads: Sequence[Any]) -> dict[str, NDArray[np.float64]]:
    """Name to [layers, heads]."""
    layers = 1 + max(h.layer for h in heads)
    count = 1 + max(h.head for h in heads)
    found: dict[str, NDArray[np.float64]] = {}
    for head in heads:
        for name, value in head.scalars.items():
            place = found.setdefault(name, np.full((layers, count), np.nan))
            place[head.layer, head.head] = np.nan if value is None else value
    return found


def _correlation(statistic: NDArray[np.float64] | None, loss: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation over the heads; None where it is not defined."""
    if statistic is None:
        return None
    known = np.isfinite(statistic) & np.isfinite(loss)
    x, y = statistic[known], loss[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)
