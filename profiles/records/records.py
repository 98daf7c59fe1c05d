"""What goes into the store and comes out of it: plain values, no database in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attnplan.profiles.records.arrays import Array
from attnplan.profiles.records.digest import digest
from attnplan.profiles.records.scalars import ARRAY_NAMES, SCALAR_NAMES

PLAN_FIGURES: tuple[tuple[str, str], ...] = (
    ("density", "multiply-adds, selection included, over those of dense causal attention"),
    ("kl_per_token", "KL(original || planned) on held-out text, nats per token"),
    ("perplexity", "perplexity of the planned model on held-out text"),
    ("perplexity_dense", "perplexity of the original model on the same text"),
    ("latency_ms", "median time of a whole prefill with the plan"),
    ("latency_dense_ms", "median time of a whole dense prefill, interleaved with it"),
    ("kv_bytes", "bytes of the KV cache with the plan"),
    ("induction_accuracy", "share of correct tokens in the second half of a repeated string"),
)
"""(name, description) of the figures that are stored as columns of a plan."""


@dataclass(frozen=True)
class ModelIdentity:
    """A model; `fingerprint` determines the rest but for `name`."""

    fingerprint: str
    name: str
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]
    weights_digest: str


@dataclass(frozen=True)
class DatasetIdentity:
    """Calibration tokens; `digest` covers every token id.

    Attributes:
        identity: where the text comes from, such as a file's digest and the tokenizer.
    """

    digest: str
    name: str
    split: str
    tokens: int
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class RunKey:
    """What determines a profile run."""

    model: ModelIdentity
    dataset: DatasetIdentity
    context: int
    sequences: int
    dtype: str
    seed: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class ProfileRun:
    """A profile run in the store.

    Attributes:
        status: 'running' or 'complete'.
        created, finished: UTC, as in 2025-01-31T12:00:00Z.
    """

    id: int
    key: RunKey
    status: str
    created: str
    finished: str | None

    @property
    def complete(self) -> bool:
        return self.status == "complete"


@dataclass(frozen=True)
class HeadProfile:
    """The statistics of one head.

    Attributes:
        scalars: name of `profiles/records/scalars.py` to value; NaN, or left out, where the
            statistic does not exist for this head.
        arrays: spectra and block heat map, by the names of `profiles/records/scalars.py`.
    """

    layer: int
    head: int
    scalars: Mapping[str, float]
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"layer {self.layer}, head {self.head}"
        for name in [
            *self.scalars.keys() - set(SCALAR_NAMES),
            *self.arrays.keys() - set(ARRAY_NAMES),
        ]:
            raise ValueError(
                f"{where}: unknown statistic {name!r}; see profiles/records/scalars.py"
            )
        for name, value in self.scalars.items():
            if math.isinf(value):
                raise ValueError(f"{where}: {name} is {value}; leave it out or pass NaN")


@dataclass(frozen=True)
class CandidateScore:
    """How wrong one head is under one approximation, on one sequence.

    Attributes:
        approximation: canonical text of the approximation.
        fisher: mean over scored positions of (g . delta o)^2.
        relative_error: ||delta o|| / ||o|| over scored positions.
        mass_dropped: mean attention mass on keys that are neither near nor summarised.
        positions: how many queries were scored.
    """

    head: int
    approximation: str
    fisher: float
    relative_error: float
    mass_dropped: float | None
    positions: int


@dataclass(frozen=True)
class Scores:
    """All scores of a run, by column; row i is candidate `names[approximation[i]]`.

    Attributes:
        names: canonical texts, sorted.
        sequence, layer, head, approximation, positions: int64 [rows].
        fisher, relative_error, mass_dropped: float64 [rows]; NaN where there is no value.
    """

    names: tuple[str, ...]
    sequence: Array
    layer: Array
    head: Array
    approximation: Array
    fisher: Array
    relative_error: Array
    mass_dropped: Array
    positions: Array


@dataclass(frozen=True)
class DeviceIdentity:
    """What timings are true of.

    Attributes:
        name: such as 'NVIDIA H100 80GB HBM3'.
        kind: 'cpu' or 'cuda'.
        driver: driver or compiler version, '' where there is none.
        threads: CPU threads that computed; 0 on a GPU.
        versions: library to version.
    """

    name: str
    kind: str
    driver: str
    threads: int
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.kind not in ("cpu", "cuda"):
            raise ValueError(f"device kind must be cpu or cuda, got {self.kind!r}")

    @property
    def digest(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True)
class KernelTiming:
    """How long one approximation takes in all heads of a layer, on one device.

    Attributes:
        engine: digest of the code that ran.
        median_ms, q25_ms, q75_ms: over `repeats`, selection included.
        selection_ms: median of the selection alone, None where it was not timed apart.
    """

    engine: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    approximation: str
    median_ms: float
    q25_ms: float
    q75_ms: float
    repeats: int
    selection_ms: float | None = None


@dataclass(frozen=True)
class SearchKey:
    """What determines a search.

    Attributes:
        run: id of the profile run that it reads.
        budget: bounds, objective and settings.
    """

    run: int
    device: DeviceIdentity
    budget: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Search:
    """A search in the store.

    Attributes:
        study: name of its Optuna study.
        status: 'running', 'complete' or 'infeasible'.
        result: what it found, None while it runs.
    """

    id: int
    key: SearchKey
    study: str
    status: str
    result: Mapping[str, Any] | None
    created: str
    finished: str | None


@dataclass(frozen=True)
class PlanRecord:
    """A plan that was written.

    Attributes:
        search: id of the search that made it.
        digest: of the plan.
        figures: measured numbers, by the names of `PLAN_FIGURES`.
    """

    search: int
    digest: str
    path: str
    yaml: str
    feasible: bool
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [name for name, _ in PLAN_FIGURES]
        for name in self.figures.keys() - set(known):
            raise ValueError(f"unknown figure {name!r} of a plan; known: {', '.join(known)}")


@dataclass(frozen=True)
class MeasurementKey:
    """What determines a measurement on a model.

    Attributes:
        kind: what is measured, such as 'kl' or 'latency'.
        subject: what it is measured of, such as the digest of a plan.
        conditions: everything else that matters: data, context, device, dtype, seed.
    """

    model: ModelIdentity
    kind: str
    subject: str
    conditions: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest([self.model.fingerprint, self.kind, self.subject, dict(self.conditions)])
