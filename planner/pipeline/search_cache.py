"""From a memory budget to what every kv head keeps: score, solve, search, verify.

The best assignment of scored keepers within a budget is a knapsack; an Optuna study corrects it by
measured continuations, and held-out text has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attnplan.costs.decode import MIXTURES, decode_costs, dense_token_ms
from attnplan.costs.prefill import this_device
from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.contracts.cache_policy import SLACK, Keeper
from attnplan.kernels.kv_cache.layer_cache import capacity, row_bytes
from attnplan.models.load import LoadedModel
from attnplan.pipeline.progress import Progress, Quiet
from attnplan.pipeline.score_policies import candidates_for, score_layer
from attnplan.pipeline.study import study
from attnplan.plan.plan import ModelIdentity
from attnplan.profiles.capture.capture import capture
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import TokenSet
from attnplan.profiling.profiling import (
    Workload,
    captured_text,
    fitted_tensors,
    model_record,
    profile,
)
from attnplan.quality.continuation import Continuation, check_length, decode_ms, held_bytes
from attnplan.quality.prefill import Reference, original
from attnplan.quality.retrieval import PROBED, TOLERANCE, Recall, rehearsal, retrieval
from attnplan.runtime.patch import patch_assignment, unpatch
from attnplan.search.budget import Budget, BudgetError, Limit
from attnplan.search.latency import LatencyModel
from attnplan.search.problem import Assignment, Problem
from attnplan.search.problem import digest as assignment_digest
from attnplan.search.solve import limits_of, meets, solve

ATTEMPTS = 3
"""Plans that are verified until one holds; each counts retrieval five times as much as the last."""
RECALLING = 0.2
"""Weight of questions about a text among the scores, beside texts."""
CALIBRATIONS = 2
"""Measured tokens that the cost model of decoding is corrected by."""

Kept = tuple[tuple[Keeper, ...], ...]
"""For each layer, what each kv head keeps."""


@dataclass(frozen=True)
class Remembered:
    """One way to spend a memory budget, measured on held-out text.

    Attributes:
        name: 'per kv head', or 'uniform' and what all kv heads keep.
        kept: for each layer, what each kv head keeps.
        predicted_kl: of the scores, per continuation token.
        continuation_kl: as measured.
        kl_by_sequence: the same by sequence.
        held: bytes of the cache after a prompt of the whole context, and after as many further
            tokens as a continuation has.
        held_dense: the same of the model as it is.
        decode_ms: one token under the plan, and dense.
        recall: what the model still finds under the plan, and dense; None where the texts are too
            short to hide facts in.
    """

    name: str
    kept: Kept
    predicted_kl: float
    continuation_kl: float
    kl_by_sequence: tuple[float, ...]
    held: tuple[int, int]
    held_dense: tuple[int, int]
    decode_ms: tuple[float, float]
    recall: tuple[Recall, Recall] | None = None

    @property
    def share(self) -> float:
        """The larger share of dense bytes, after the prompt or after the continuation."""
        return max(a / b for a, b in zip(self.held, self.held_dense, strict=True))


@dataclass(frozen=True)
class Memory:
    """What a search for memory found.

    Attributes:
        best: the best per kv head.
        uniform: the best single keeper for all kv heads, by what is measured on held-out text of
            the best of every kind.
        fitted: layer to fitted data.
        run: id of the profile run.
        search: id in the store.
        misses: what the best breaks; empty when it is feasible.
    """

    best: Remembered
    uniform: Remembered | None
    fitted: dict[int, dict[str, Tensor]]
    run: int
    search: int
    misses: tuple[str, ...]


@dataclass
class _Memory:
    """A search in progress."""

    loaded: LoadedModel
    work: Workload
    store: Store
    run: records.ProfileRun
    fitted: dict[int, dict[str, Tensor]]
    candidates: tuple[Keeper, ...]
    progress: Progress
    latency: LatencyModel | None = None
    """Of one token; None where decoding is not limited."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """Bytes of each candidate over those of the dense cache, at the context."""
        context, identity = self.work.context, self.loaded.identity
        size = self.loaded.model.dtype.itemsize
        dense = context * row_bytes(cache_catalog.FULL, identity.head_dim, identity.head_dim, size)
        # recent queries wait until their attention is looked at; every kv head pays for its own
        waiting = SLACK * identity.heads // identity.kv_heads * identity.head_dim * size
        found = [
            capacity(k, context) * row_bytes(k, identity.head_dim, identity.head_dim, size)
            + waiting * k.observes
            for k in self.candidates
        ]
        return np.array(found) / dense

    def kept(self, assignment: Assignment) -> Kept:
        return tuple(tuple(self.candidates[c] for c in row) for row in assignment.tolist())

    @contextmanager
    def running(self, kept: Kept) -> Iterator[None]:
        """The model under an assignment of keepers; prefill stays dense."""
        identity = self.loaded.identity
        dense = [[catalog.DENSE] * identity.heads] * identity.layers
        patch_assignment(self.loaded.model, dense, self.fitted, keepers=kept)
        try:
            yield
        finally:
            unpatch(self.loaded.model)

    def key(self, kind: str, subject: Any, **conditions: Any) -> records.MeasurementKey:
        more = {"run": self.run.id, "context": self.work.context, **conditions}
        return records.MeasurementKey(model_record(self.loaded), kind, digest(subject), more)

    def scores(self) -> NDArray[np.float64]:
        """KL per continuation token, [texts, layers, kv_heads, candidates]; kept in the store."""
        names = [cache_catalog.key(k) for k in self.candidates]
        found = []
        for text in range(self.work.texts):
            self.progress.advance(f"text {text + 1} of {self.work.texts}")
            key = self.key("keeper scores", names, text=text, data=self.work.tokens.digest)
            values = self.store.load_measurement(key)
            if values is None:
                captured = captured_text(self.loaded, self.work, text)
                rows = [
                    score_layer(layer, self.candidates, self.fitted[layer.layer])
                    for layer in captured.layers
                ]
                values = {"kl": np.stack(rows).tolist()}
                self.store.save_measurement(key, values)
            found.append(np.array(values["kl"]))
        return np.stack(found)

    def recall_scores(self) -> NDArray[np.float64] | None:
        """KL per token of questions about a text and their answers, [layers, kv_heads, candidates].

        None where texts are too short to ask about; kept in the store.
        """
        names = [cache_catalog.key(k) for k in self.candidates]
        key = self.key("keeper recall scores", names, data=self.work.tokens.digest)
        values = self.store.load_measurement(key)
        if values is None:
            model, seed = self.loaded.model, self.work.seed + 1
            made = rehearsal(model, self.loaded.tokenizer, self.work.tokens.tokens[0], seed=seed)
            if made is None:
                return None
            self.progress.advance("questions about a text")
            captured = capture(model, made[0], seed=seed)
            rows = [
                score_layer(layer, self.candidates, self.fitted[layer.layer], made[1])
                for layer in captured.layers
            ]
            values = {"kl": np.stack(rows).tolist()}
            self.store.save_measurement(key, values)
        return np.array(values["kl"])

    def share(self, keeper: Keeper) -> float:
        """Bytes of one keeper over those of the dense cache."""
        return float(replace(self, candidates=(keeper,)).shares[0])

    def limit(self, budget: Budget) -> float:
        """The limit on memory as a share of the dense cache; infinite without one."""
        if budget.max_memory is None:
            return float("inf")
        size = self.cache_bytes
        return budget.max_memory.of(size) / size

    @property
    def cache_bytes(self) -> float:
        """Of the dense cache at the context."""
        identity = self.loaded.identity
        size = 2 * identity.layers * identity.kv_heads * self.work.context * identity.head_dim
        return float(size * self.loaded.model.dtype.itemsize)

    def within(
        self, budget: Budget, limit: float, scores: NDArray[np.float64]
    ) -> tuple[Budget, Problem]:
        """A budget in the terms of the problem, and the problem with what a token costs.

        Raises:
            BudgetError: less memory than the smallest keeper needs, or less time than the fastest.
        """
        problem = self.problem(scores)
        smallest = float(problem.kv_bytes.min())
        if limit < smallest:
            raise BudgetError(
                f"no plan stores {limit:.3g}x of the KV cache: sinks and the smallest window need "
                f"{smallest:.3g}x at {self.work.context} tokens",
                "kv_share",
                smallest,
            )
        memory = Limit(limit, "x") if limit < float("inf") else None
        if budget.max_decode is None:
            return Budget(max_memory=memory), problem
        self.progress.stage("Timing tokens", len(self.candidates) + MIXTURES)
        costs = decode_costs(
            self.loaded,
            self.work,
            self.store,
            self.fitted,
            self.candidates,
            advance=self.progress.advance,
        )
        token_ms = dense_token_ms(self.loaded, self.work, self.store)
        self.latency = costs.model
        limited = Budget(max_memory=memory, max_latency=Limit(budget.max_decode.of(token_ms), "ms"))
        text = self.work.tokens.tokens[0]
        for left in range(CALIBRATIONS, -1, -1):
            problem = self.problem(scores)
            try:
                assignment = solve(problem, limited).assignment
            except BudgetError as error:
                raise BudgetError(
                    f"no plan generates a token in {limited.max_latency}: the fastest needs "
                    f"{error.smallest:.3g} ms, dense {token_ms:.3g} ms",
                    error.resource,
                    error.smallest,
                ) from None
            if left:
                applied = partial(self.running, self.kept(assignment))
                plan, dense = decode_ms(self.loaded.model, applied, text)
                factor = self.latency.factor(assignment, plan / dense * token_ms)
                self.latency = self.latency.calibrated(factor)
        return limited, problem

    def kl(self, continuation: Continuation, assignment: Assignment, text: int) -> float:
        """Measured on one text of the workload; kept in the store."""
        kept = self.kept(assignment)
        subject = [[cache_catalog.key(k) for k in row] for row in kept]
        key = self.key("continuation kl", subject, text=text, data=self.work.tokens.digest)
        values = self.store.load_measurement(key)
        if values is None:
            values = {"kl": continuation.kl(partial(self.running, kept), text)}
            self.store.save_measurement(key, values)
        return float(values["kl"])

    def problem(self, scores: NDArray[np.float64]) -> Problem:
        """Kv heads in place of heads; candidate 0 keeps everything.

        Args:
            scores: KL, [layers, kv_heads, candidates].
        """
        shares = self.shares
        zero = np.zeros(len(shares))
        return Problem(
            names=("dense", *(cache_catalog.key(k) for k in self.candidates[1:])),
            families=tuple(k.family for k in self.candidates),
            windows=tuple(min(k.recent, self.work.context) for k in self.candidates),
            fisher=np.maximum(scores, 0.0),
            density=np.minimum(shares, 1.0),
            kv_bytes=shares,
            group=1,
            latency=self.latency or LatencyModel(0.0, 0.0, zero, zero, 1.0),
            cache_bytes=self.cache_bytes,
        )


def check_room(identity: ModelIdentity, context: int) -> None:
    """Raises ValueError where nothing can be generated, and measured, after `context` tokens."""
    check_length(context)
    longest = identity.max_context
    if longest is not None and context >= longest:
        raise ValueError(
            f"context {context} leaves no room for a generated token in the {longest} tokens that "
            f"{identity.name} was made for: with --max-memory or --max-decode the longest context "
            f"that fits is {longest - 1}"
        )


def remember(
    loaded: LoadedModel,
    work: Workload,
    holdout: TokenSet,
    store: Store,
    database: str,
    files: CaptureFiles,
    budget: Budget,
    *,
    trials: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Memory:
    """Search for what every kv head keeps within a memory budget, and verify it.

    Args:
        loaded: the model, not patched.
        work: calibration texts.
        holdout: texts that share nothing with them, of the same length.
        store: where everything that is learnt is kept.
        database: URL of the same store, for the study.
        files: captured tensors of the profile.
        budget: with a limit on memory or decoding; one on KL holds for continuation tokens.
        trials: of the Optuna study.
        seed: of the study.
        progress: where long steps report to.

    Raises:
        BudgetError: less than the smallest keeper of all kv heads needs.
        ValueError: the context leaves no room to generate in.
    """
    check_room(loaded.identity, work.context)
    progress = progress or Quiet()
    progress.stage("Profiling", work.texts + 1)
    run = profile(loaded, work, store, files, progress.advance)
    search = _Memory(loaded, work, store, run, fitted_tensors(store, run.id), (), progress)
    limit = search.limit(budget)
    timed = budget.max_decode is not None
    search.candidates = candidates_for(work.context, limit, search.share, timed=timed)
    progress.stage("Scoring what is kept", work.texts + 1)
    scores = search.scores().mean(0)
    recalling = search.recall_scores()
    within, problem = search.within(budget, limit, scores)
    name = f"attnplan-memory-{run.id}-{limit:g}-{seed}"
    device = this_device(loaded.model.device)
    kept = store.open_search(records.SearchKey(run.id, device, budget.canonical(), seed), name)
    calibration = Continuation(Reference(loaded.model, work.tokens.tokens))
    reference = Continuation(Reference(loaded.model, holdout.tokens))
    probes = retrieval(loaded.model, loaded.tokenizer, holdout.tokens[:PROBED], seed=seed)
    dense_recall = None if probes is None else probes.recall(original)

    def evaluate(assignment: Assignment, text: int) -> float:
        return search.kl(calibration, assignment, text)

    fallback: Remembered | None = None
    for attempt in range(1 if recalling is None else ATTEMPTS):
        weighed = scores
        if recalling is not None:
            weighed = scores + RECALLING * 5**attempt * recalling
        assignment = _searched(
            search, search.problem(weighed), within, evaluate, trials, database, name, seed
        )
        progress.stage("Verifying", None)
        best = _measured(search, "per kv head", assignment, problem, reference)
        if probes is not None and dense_recall is not None:
            progress.advance("retrieval")
            recall = probes.recall(partial(search.running, best.kept))
            best = replace(best, recall=(recall, dense_recall))
        misses = _misses(best, budget, limit, TOLERANCE)
        if not misses:
            break
        if fallback is None and probes and not _misses(best, budget, limit, probes.tolerance):
            fallback = best  # one fact less, where there are few
    if misses and fallback is not None:
        best, misses = fallback, ()
    fits = [np.full_like(assignment, c) for c in range(1, problem.candidates)]
    fits = [a for a in fits if meets(problem.predict(a), limits_of(problem, within))]
    uniform = [
        _measured(
            search,
            f"uniform {cache_catalog.key(search.candidates[int(a[0, 0])])}",
            a,
            problem,
            reference,
        )
        for a in _uniform_of_every_kind(search, fits, problem)
    ]
    other = min(uniform, key=lambda one: one.continuation_kl, default=None)
    store.finish_search(
        kept.id,
        "infeasible" if misses else "complete",
        {"misses": list(misses), "held": list(best.held), "continuation_kl": best.continuation_kl},
    )
    return Memory(best, other, search.fitted, run.id, kept.id, misses)


def _searched(
    search: _Memory,
    problem: Problem,
    within: Budget,
    evaluate: Callable[[Assignment, int], float],
    trials: int,
    database: str,
    name: str,
    seed: int,
) -> Assignment:
    """The solver's answer, or the best of a study around it."""
    answer = solve(problem, within).assignment
    if trials == 0:
        return answer
    result = study(
        problem,
        within,
        evaluate,
        resource="kv_share" if within.max_memory is not None else "latency_ms",
        steps=search.work.texts,
        trials=trials,
        database=database,
        name=f"{name}-{assignment_digest(answer)[:12]}",
        seed=seed,
        progress=search.progress,
    )
    return result.best.assignment


def _uniform_of_every_kind(
    search: _Memory, fits: list[Assignment], problem: Problem
) -> list[Assignment]:
    """The best of every kind by scores."""
    of_name: dict[str, Assignment] = {}
    for assignment in sorted(fits, key=lambda a: problem.predict(a).kl):
        of_name.setdefault(search.candidates[int(assignment[0, 0])].name, assignment)
    return list(of_name.values())


def _misses(best: Remembered, budget: Budget, limit: float, tolerance: float) -> tuple[str, ...]:
    """What measured figures break."""
    misses = []
    if best.recall is not None:
        for kind in best.recall[0].worse(best.recall[1], tolerance):
            plan, dense = (recall.in_prompt[kind] for recall in best.recall)
            misses.append(f"retrieval of {kind} is {plan:.2f}, dense {dense:.2f}")
    if best.share > limit * (1 + 1e-9):
        misses.append(f"the cache holds {best.share:.3f} of dense, above {limit:g}")
    if budget.max_decode is not None and best.decode_ms[0] > budget.max_decode.of(
        best.decode_ms[1]
    ):
        plan, dense = best.decode_ms
        misses.append(f"a token takes {plan:.1f} ms (dense {dense:.1f}), above {budget.max_decode}")
    if budget.max_kl is not None and best.continuation_kl > budget.max_kl:
        misses.append(f"continuation KL {best.continuation_kl:.4f} is above {budget.max_kl:g}")
    return tuple(misses)


def _measured(
    search: _Memory,
    name: str,
    assignment: Assignment,
    problem: Problem,
    reference: Continuation,
) -> Remembered:
    """An assignment on held-out text."""
    search.progress.advance(name)
    kept = search.kept(assignment)
    texts = reference.reference.sequences
    model = search.loaded.model

    applied = partial(search.running, kept)
    longest = search.loaded.identity.max_context
    more = reference.tokens if longest is None else min(reference.tokens, longest - texts.shape[1])
    kls = tuple(reference.kl(applied, index) for index in range(len(texts)))
    return Remembered(
        name=name,
        kept=kept,
        predicted_kl=problem.predict(assignment).kl,
        continuation_kl=float(np.mean(kls)),
        kl_by_sequence=kls,
        held=held_bytes(model, applied, texts[0], more),
        held_dense=held_bytes(model, original, texts[0], more),
        decode_ms=decode_ms(model, applied, texts[0]),
    )
