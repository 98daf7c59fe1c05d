"""What is measured of assignments while plans are searched for; all of it is kept in the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from attnplan.costs.prefill import DeviceCosts, candidate_name, engine_of
from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.models.load import LoadedModel
from attnplan.pipeline.learnt import Corrections
from attnplan.pipeline.progress import Progress
from attnplan.pipeline.request import Choice, Request
from attnplan.pipeline.score_methods import ScoreTable
from attnplan.pipeline.verify import Layers, Measured, copies, fast, measure, misses, running
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import TokenSet
from attnplan.profiling.profiling import Workload, model_record
from attnplan.quality.prefill import Reference, induction_accuracy, original, prefill_latency
from attnplan.search.problem import Assignment, Problem
from attnplan.search.problem import digest as assignment_digest

STRIDE = 4
"""The study compares every fourth position; verification compares all."""


@dataclass
class Planner:
    """A search in progress: the model, its scores and costs, and what has been measured."""

    loaded: LoadedModel
    work: Workload
    holdout: TokenSet
    store: Store
    database: str
    request: Request
    progress: Progress
    run: records.ProfileRun
    scores: ScoreTable
    costs: DeviceCosts
    fitted: dict[int, dict[str, Tensor]]
    calibration: Reference = field(init=False)
    reference: Reference = field(init=False)
    measured_kl: dict[tuple[str, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calibration = Reference(self.loaded.model, self.work.tokens.tokens)
        self.reference = Reference(self.loaded.model, self.holdout.tokens)

    @property
    def shape(self) -> AttentionShape:
        return self.loaded.identity.prefill_shape(self.work.context)

    def problem(self, corrections: Corrections) -> Problem:
        """The separable problem with corrections learnt from measurements."""
        choices = self.scores.candidates
        model = self.costs.fit.model.calibrated(corrections.ms)
        fisher = self.scores.texts + corrections.copying * self.scores.copying
        return Problem(
            names=tuple(candidate_name(a) for a in choices),
            families=tuple(a.family for a in choices),
            windows=tuple(self._window(a) for a in choices),
            fisher=fisher,
            density=np.array([a.density(self.shape) for a in choices]),
            kv_bytes=np.ones(len(choices)),
            group=self.shape.group,
            latency=model,
            cache_bytes=self._cache_bytes(),
        )

    def _cache_bytes(self) -> float:
        """The dense KV cache of one sequence."""
        shape, model = self.shape, self.loaded.model
        values = 2 * self.loaded.identity.layers * shape.kv_heads * shape.keys * shape.head_dim
        return float(values * model.dtype.itemsize)

    def _window(self, approximation: Approximation) -> int:
        """Nearest keys that a candidate always keeps."""
        near = approximation.near
        return self.work.context if approximation.is_dense else int(getattr(near, "window", 0))

    def layers(self, assignment: Assignment) -> Layers:
        choices = self.scores.candidates
        return [[choices[c] for c in row] for row in assignment.tolist()]

    def evaluate(self, assignment: Assignment, step: int) -> float:
        """Measured KL of an assignment on one calibration text; kept in the store."""
        name = assignment_digest(assignment)
        if (name, step) not in self.measured_kl:
            key = self._key("calibration kl", assignment, {"step": step, "stride": STRIDE})
            values = self.store.load_measurement(key)
            if values is None:
                layers = self.layers(assignment)
                kl, _, _ = self.calibration.compare(
                    lambda: running(self.loaded.model, layers, self.fitted), step, STRIDE
                )
                values = {"kl": kl}
                self.store.save_measurement(key, values)
            self.measured_kl[name, step] = float(values["kl"])
        return self.measured_kl[name, step]

    def measure(self, assignment: Assignment, *, lengths: bool = True) -> Measured:
        """Everything about an assignment on held-out text and on the device; kept in the store."""
        conditions = {
            **self._device_conditions(assignment),
            "holdout": self.holdout.digest,
            "lengths": lengths,
            "repeats": self.request.repeats,
        }
        if not self.costs.is_here:
            conditions["predicted_ms"] = self.prefill(assignment)
        key = self._key("verification", assignment, conditions)
        values = self.store.load_measurement(key)
        if values is None:
            found = measure(
                self.loaded.model,
                self.layers(assignment),
                self.fitted,
                self.reference,
                self.shape,
                prefill=self.prefill(assignment),
                induction=self.induction(assignment),
                induction_dense=self.induction(None),
                repeats=self.request.repeats,
                lengths=lengths,
                advance=self.progress.advance,
            )
            self.store.save_measurement(key, found.as_dict())
            return found
        return Measured.from_dict(values)

    def prefill(self, assignment: Assignment) -> tuple[float, float]:
        """Prefill times (plan, dense) in ms of an assignment; kept in the store.

        Measured, or as predicted for a device that is not here.
        """
        if not self.costs.is_here:
            model = self.costs.fit.model
            return model.predict(assignment), model.predict(np.zeros_like(assignment))
        conditions = {**self._device_conditions(assignment), "repeats": self.request.repeats}
        key = self._key("prefill", assignment, conditions)
        values = self.store.load_measurement(key)
        if values is None:
            layers = self.layers(assignment)
            timing = prefill_latency(
                self.loaded.model,
                lambda: running(self.loaded.model, layers, self.fitted),
                self.work.tokens.tokens[0],
                repeats=self.request.repeats,
            )
            values = {"plan_ms": timing.median_ms, "dense_ms": timing.dense_ms}
            self.store.save_measurement(key, values)
        return float(values["plan_ms"]), float(values["dense_ms"])

    def _device_conditions(self, assignment: Assignment) -> dict[str, Any]:
        """What the times of an assignment depend on: the device, and the code of its methods."""
        engine = self.costs.engine
        if self.costs.is_here:
            run = {a for layer in self.layers(assignment) for a in layer}
            engine = engine_of(self.costs.device.kind, run)
        return {"device": self.costs.device.digest, "engine": engine}

    def induction(self, assignment: Assignment | None) -> float:
        """What the model copies under an assignment, or as it is; kept in the store."""
        key = self._key(
            "induction", assignment, {"seed": self.request.seed, "length": self.work.string}
        )
        values = self.store.load_measurement(key)
        if values is None:
            layers = None if assignment is None else self.layers(assignment)
            accuracy = induction_accuracy(
                self.loaded.model,
                lambda: (
                    original()
                    if layers is None
                    else running(self.loaded.model, layers, self.fitted)
                ),
                length=self.work.string,
                seed=self.request.seed,
            )
            values = {"accuracy": accuracy}
            self.store.save_measurement(key, values)
        return float(values["accuracy"])

    def copies(self, assignment: Assignment) -> bool:
        """Whether the model under an assignment passes the induction gate."""
        return copies(self.induction(assignment), self.induction(None))

    def is_fast(self, assignment: Assignment) -> bool:
        """Whether the prefill under an assignment, as measured, is within the budget."""
        return fast(*self.prefill(assignment), self.request.budget)

    def passes(self, assignment: Assignment) -> bool:
        """Whether an assignment passes what can be measured without held-out text."""
        return self.copies(assignment) and self.is_fast(assignment)

    def _key(
        self, kind: str, assignment: Assignment | None, conditions: dict[str, Any]
    ) -> records.MeasurementKey:
        names = None
        if assignment is not None:
            names = [[catalog.key(a) for a in row] for row in self.layers(assignment)]
        return records.MeasurementKey(
            model=model_record(self.loaded),
            kind=kind,
            subject=digest(names),
            conditions={"run": self.run.id, "context": self.work.context, **conditions},
        )


def verified(
    planner: Planner,
    name: str,
    assignment: Assignment,
    problem: Problem,
    *,
    lengths: bool = False,
) -> Choice:
    """Verify an assignment against the budget; with `lengths`, time it at shorter ones too."""
    predicted = problem.predict(assignment)
    measured = planner.measure(assignment, lengths=lengths and planner.costs.is_here)
    dense_ms = problem.predict(problem.dense).latency_ms
    return Choice(
        name=name,
        layers=planner.layers(assignment),
        predicted_kl=predicted.kl,
        predicted_ms=predicted.latency_ms * measured.dense_ms / dense_ms,
        measured=measured,
        misses=tuple(misses(measured, planner.request.budget)),
    )
