"""From a memory budget to what every kv head keeps: score, solve, search, verify.

Keepers are scored on captured tensors: the past before the last tokens of a text is condensed, the
last tokens are fed as they would be generated, and what changes in the output of a kv head's group
is weighed by its gradient. The best assignment within the budget is a knapsack; an Optuna study
corrects it by measured continuations, and held-out text has the last word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnplan.continuation import Continuation, continued, decode_ms, held_bytes
from attnplan.evaluate import Reference, original
from attnplan.kernels import catalog, keepers
from attnplan.kernels.approximation import Fitted
from attnplan.kernels.keeper import SLACK, Keeper
from attnplan.kernels.layer_store import LayerStore, capacity, row_bytes
from attnplan.models import LoadedModel
from attnplan.patch import patch_assignment, unpatch
from attnplan.planning import Progress, Quiet
from attnplan.profiles import records
from attnplan.profiles.calibration import TokenSet
from attnplan.profiles.capture import LayerCapture
from attnplan.profiles.capture_files import CaptureFiles
from attnplan.profiles.database import Store
from attnplan.profiles.digest import digest
from attnplan.profiling import Workload, captured_text, fitted_tensors, model_record, profile
from attnplan.retrieval import PROBED, Recall, retrieval
from attnplan.search.budget import Budget, BudgetError, Limit
from attnplan.search.latency import LatencyModel
from attnplan.search.problem import Assignment, Problem
from attnplan.search.problem import digest as assignment_digest
from attnplan.search.solve import front, limits_of, meets, solve
from attnplan.search.study import run_study

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
        uniform: the best single keeper for all kv heads, of those that fit.
        fitted: layer to fitted data.
        run: id of the profile run.
        misses: what the best breaks; empty when it is feasible.
    """

    best: Remembered
    uniform: Remembered | None
    fitted: dict[int, dict[str, Tensor]]
    run: int
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

    @property
    def shares(self) -> NDArray[np.float64]:
        """Bytes of each candidate over those of the dense cache, at the context."""
        context, identity = self.work.context, self.loaded.identity
        size = self.loaded.model.dtype.itemsize
        dense = context * row_bytes(keepers.FULL, identity.head_dim, identity.head_dim, size)
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
        names = [keepers.key(k) for k in self.candidates]
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

    def problem(self, scores: NDArray[np.float64]) -> Problem:
        """Kv heads in place of heads; candidate 0 keeps everything."""
        shares = self.shares
        identity = self.loaded.identity
        size = 2 * identity.layers * identity.kv_heads * self.work.context * identity.head_dim
        zero = np.zeros(len(shares))
        return Problem(
            names=("dense", *(keepers.key(k) for k in self.candidates[1:])),
            families=tuple(k.family for k in self.candidates),
            windows=tuple(min(k.recent, self.work.context) for k in self.candidates),
            fisher=np.maximum(scores.mean(0), 0.0),
            density=np.minimum(shares, 1.0),
            kv_bytes=shares,
            group=1,
            latency=LatencyModel(0.0, 0.0, zero, zero, 1.0),
            cache_bytes=float(size * self.loaded.model.dtype.itemsize),
        )


def score_layer(
    layer: LayerCapture, candidates: tuple[Keeper, ...], fitted: Fitted
) -> NDArray[np.float64]:
    """What each keeper adds to the KL of a continuation token, [kv_heads, candidates].

    Args:
        layer: captured with gradients.
        candidates: the first keeps everything.
        fitted: calibrated data of the layer.

    Raises:
        ValueError: there is no gradient.
    """
    if layer.gradient is None:
        raise ValueError("keepers are scored by gradients; capture the text with them")
    kv_heads, tokens = layer.key.shape[1:3]
    new = continued(tokens)
    first = tokens - new
    gradient, exact = (t[:, :, first:].float() for t in (layer.gradient, layer.output))
    found = np.zeros((kv_heads, len(candidates)))
    for number, keeper in enumerate(candidates):
        if keeper.limit is None:
            continue
        store = LayerStore((keeper,) * kv_heads, scale=layer.scale, fitted=fitted)
        store.append(layer.key[:, :, :first], layer.value[:, :, :first])
        store.settle(layer.query[:, :, :first])
        parts = []
        for begin in range(first, tokens, SLACK):
            some = slice(begin, min(begin + SLACK, tokens))
            store.append(layer.key[:, :, some], layer.value[:, :, some])
            parts.append(store.attend(layer.query[:, :, some]))
            store.settle(layer.query[:, :, some])
        change = ((torch.cat(parts, 2).float() - exact) * gradient).sum(-1)  # [1, heads, new]
        # half the Fisher cost is the KL divergence, to second order; a group changes together
        cost = 0.5 * change.unflatten(1, (kv_heads, -1)).square().sum(2).mean((0, 2))
        found[:, number] = cost.double().cpu().numpy()
    return found


def candidates_for(context: int, limit: float, shares: Any) -> tuple[Keeper, ...]:
    """The catalog's choices, and of each keeper the largest that uses the whole limit.

    Args:
        context: tokens.
        limit: share of dense bytes.
        shares: from keepers to their shares.
    """
    found = list(keepers.choices(context))
    for cls in keepers.KEEPERS.values():
        sized = (cls.of(rows) for rows in range(int(limit * context), 0, -1))
        fits = (k for k in sized if k is not None and shares(k) <= limit)
        largest = next(fits, None)
        if largest is not None:
            found.append(largest)
    return tuple(dict.fromkeys(found))


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
        budget: with a limit on memory; a limit on KL holds for continuation tokens.
        trials: of the Optuna study.
        seed: of the study.
        progress: where long steps report to.

    Raises:
        BudgetError: less than the smallest keeper of all kv heads needs.
    """
    assert budget.max_memory is not None
    progress = progress or Quiet()
    progress.stage("Profiling", work.texts + 1)
    run = profile(loaded, work, store, files, progress.advance)
    search = _Memory(loaded, work, store, run, fitted_tensors(store, run.id), (), progress)
    search.candidates = (keepers.FULL,)
    dense_bytes = search.problem(np.zeros((1, 1, 1, 1))).cache_bytes
    limit = budget.max_memory.of(dense_bytes) / dense_bytes

    def share(keeper: Keeper) -> float:
        search.candidates = (keeper,)
        return float(search.shares[0])

    search.candidates = candidates_for(work.context, limit, share)
    progress.stage("Scoring what is kept", work.texts)
    problem = search.problem(search.scores())
    smallest = float(problem.kv_bytes.min())
    if limit < smallest:
        raise BudgetError(
            f"no plan stores {limit:.3g}x of the KV cache: sinks and the smallest window need "
            f"{smallest:.3g}x at {work.context} tokens",
            "kv_share",
            smallest,
        )
    within = Budget(max_memory=Limit(limit, "x"))
    calibration = Continuation(Reference(loaded.model, work.tokens.tokens))

    def evaluate(assignment: Assignment, text: int) -> float:
        subject = [[keepers.key(k) for k in row] for row in search.kept(assignment)]
        key = search.key("continuation kl", subject, text=text, data=work.tokens.digest)
        values = store.load_measurement(key)
        if values is None:
            kept = search.kept(assignment)
            values = {"kl": calibration.kl(lambda: search.running(kept), text)}
            store.save_measurement(key, values)
        return float(values["kl"])

    answer = solve(problem, within).assignment
    chosen = answer
    if trials > 0:
        progress.stage("Searching", trials)
        limits = limits_of(problem, within)
        others = [
            s.assignment
            for s in front(problem, "kv_share", points=16)
            if meets(s.prediction, limits)
        ]
        result = run_study(
            problem,
            within,
            evaluate,
            steps=work.texts,
            trials=trials,
            storage_url=database,
            study_name=f"attnplan-memory-{assignment_digest(answer)[:12]}-{run.id}-{limit:g}-{seed}",
            seed=seed,
            warm_start=[answer, *others[:1]],
            progress=lambda done, total, kl: progress.advance(
                "" if kl is None else f"best KL {kl:.4f}"
            ),
        )
        chosen = result.best.assignment
    progress.stage("Verifying", None)
    reference = Continuation(Reference(loaded.model, holdout.tokens))
    best = _measured(search, "per kv head", chosen, problem, reference)
    fits = [c for c in range(1, problem.candidates) if problem.kv_bytes[c] <= limit]
    uniform = [np.full_like(answer, c) for c in fits]
    uniform.sort(key=lambda a: problem.predict(a).kl)
    of_name: dict[str, Assignment] = {}
    for assignment in uniform:
        of_name.setdefault(search.candidates[int(assignment[0, 0])].name, assignment)
    ranked = sorted(
        of_name.values(), key=lambda a: sum(evaluate(a, text) for text in range(work.texts))
    )
    other = None
    if ranked:
        name = f"uniform {keepers.key(search.candidates[int(ranked[0][0, 0])])}"
        other = _measured(search, name, ranked[0], problem, reference)
    misses = []
    probes = retrieval(loaded.model, loaded.tokenizer, holdout.tokens[:PROBED], seed=seed)
    if probes is not None:
        progress.advance("retrieval")
        kept = best.kept
        found = probes.recall(lambda: search.running(kept)), probes.recall(original)
        best = replace(best, recall=found)
        for kind in found[0].worse(found[1]):
            plan, dense = (recall.in_prompt[kind] for recall in found)
            misses.append(f"retrieval of {kind} is {plan:.2f}, dense {dense:.2f}")
    if best.share > limit * (1 + 1e-9):
        misses.append(f"the cache holds {best.share:.3f} of dense, above {limit:g}")
    if budget.max_kl is not None and best.continuation_kl > budget.max_kl:
        misses.append(f"continuation KL {best.continuation_kl:.4f} is above {budget.max_kl:g}")
    return Memory(best, other, search.fitted, run.id, tuple(misses))


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

    def applied() -> Any:
        return search.running(kept)

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
