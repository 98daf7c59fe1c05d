"""Score all candidates of all heads on the calibration texts, once per model and data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.inputs import Fitted, Inputs
from attnplan.kernels.operands.tile_list import BLOCK
from attnplan.models.load import LoadedModel
from attnplan.profiles.capture.capture import LayerCapture
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.statistics.parallel import side_by_side
from attnplan.profiles.store.database import Store
from attnplan.profiling.profiling import Advance, Workload, captured_text, fitted_tensors, silent
from attnplan.search.scores import Observed, sampled_blocks, score_layer
from attnplan.search.shortlist import shortlist

BLOCKS = 12
"""Query blocks of a text that candidates are compared on."""
SLACK = 1.5
"""After the first text a candidate is dropped on a head where one that costs no more, in
multiply-adds and in time, loses less by this factor."""
SCOUTED = 4
"""One layer in so many is scouted, of models with `HEADS` heads in these."""
HEADS = 64
"""Fewer heads than this tell too little of the others."""
NOISE = 1.05
"""Times that differ by less than this factor are the same."""

_Scored = tuple[int, list[records.CandidateScore]]


@dataclass(frozen=True)
class ScoreTable:
    """Predicted KL of every candidate on every head, in nats per token.

    Attributes:
        candidates: dense first.
        texts: float64 [layers, heads, candidates], mean over the calibration texts. What was
            dropped after the first text is taken to lose on the others as the head's other
            candidates do.
        copying: same, on the repeated random string; what was dropped is taken to lose as the worst
            of the head's other candidates do.
        relative_error: same, of the head's output, mean over the calibration texts.
    """

    candidates: tuple[Approximation, ...]
    texts: NDArray[np.float64]
    copying: NDArray[np.float64]
    relative_error: NDArray[np.float64]


def score(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    files: CaptureFiles,
    run: records.ProfileRun,
    candidates: tuple[Approximation, ...],
    advance: Advance = silent,
    *,
    head_ms: NDArray[np.float64] | None = None,
) -> ScoreTable:
    """Score what is not scored yet, and read all scores back.

    Captured tensors are used where they are still there and captured again where not; once
    everything is scored they are deleted.

    Args:
        loaded: the model.
        work: calibration texts.
        store: where scores are kept.
        files: captured tensors.
        run: the profile run.
        candidates: what to score, dense first.
        advance: called with what comes next.
        head_ms: time per head of every candidate: what the first text shows to be hopeless on a
            head is not scored on the others. Without it, everything is scored on all texts.
    """
    how = "thorough" if head_ms is None else f"slack {SLACK}"
    job = _Job(loaded, work, store, files, run, candidates, how)
    done = store.scores_done(run.id, job.asked)
    for text in range(work.texts + 1):
        wanted = [n for n in range(loaded.identity.layers) if (text, n) not in done]
        if wanted:
            advance(f"text {text + 1} of {work.texts + 1}")
            known = job.known()
            offered = np.isnan(known[text])
            if text and head_ms is not None:
                offered &= promising(known[0], job.density, head_ms)
            job.score(text, wanted, offered)
    files.discard()
    return table(store, run, work, candidates, loaded.identity.layers, loaded.identity.heads)


def scout(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    files: CaptureFiles,
    run: records.ProfileRun,
    candidates: tuple[Approximation, ...],
) -> tuple[Approximation, ...]:
    """The candidates that some heads of a few layers would miss, on the first text.

    Candidates are held against all others, and again among those that pick no single keys and among
    the static ones: both are faster than their density tells.
    """
    job = _Job(loaded, work, store, files, run, candidates, "scout")
    every = max(1, min(SCOUTED, loaded.identity.layers * loaded.identity.heads // HEADS))
    first = min(every // 2, loaded.identity.layers - 1)
    layers = list(range(first, loaded.identity.layers, every))
    done = store.scores_done(run.id, job.asked)
    wanted = [layer for layer in layers if (0, layer) not in done]
    if wanted:
        job.score(0, wanted, np.isnan(job.known()[0]))
    fisher = job.known()[0][layers].reshape(-1, len(candidates))
    classes = [
        np.array([true(candidate) for candidate in candidates])
        for true in (lambda a: True, lambda a: not a.near.picks_keys, lambda a: a.static)
    ]
    return tuple(candidates[c] for c in shortlist(fisher, job.density, classes))


@dataclass(frozen=True)
class _Job:
    """Candidates to score on the texts of a run, and how; shards are known by both."""

    loaded: LoadedModel
    work: Workload
    store: Store
    files: CaptureFiles
    run: records.ProfileRun
    candidates: tuple[Approximation, ...]
    how: str

    @property
    def names(self) -> list[str]:
        return [catalog.key(candidate) for candidate in self.candidates]

    @property
    def asked(self) -> str:
        return digest([self.names, BLOCKS, self.how])

    @property
    def density(self) -> NDArray[np.float64]:
        shape = self.loaded.identity.prefill_shape(self.work.context)
        return np.array([candidate.density(shape) for candidate in self.candidates])

    def known(self) -> NDArray[np.float64]:
        """Stored Fisher costs [texts + 1, layers, heads, candidates], NaN where there is none."""
        sizes = (self.loaded.identity.layers, self.loaded.identity.heads, len(self.names))
        return _matrix(self.store.load_scores(self.run.id), self.names, self.work, sizes)[0]

    def score(self, text: int, wanted: list[int], offered: NDArray[np.bool_]) -> None:
        """Score what is offered, [layers, heads, candidates], on the layers `wanted` of a text."""
        store, run, device = self.store, self.run.id, self.loaded.model.device
        if not offered[wanted].any():
            for layer in wanted:
                store.save_scores(run, text, layer, self.asked, [])
            return
        if not self.files.has(text):
            self.files.claim()  # before the work, where it cannot be had
            self.files.save(text, captured_text(self.loaded, self.work, text))
        fitted = fitted_tensors(store, run)
        blocks = _blocks(self.work, text).to(device)
        todo = (layer for layer in self.files.layers(text) if layer.layer in wanted)

        def rows(layer: LayerCapture) -> _Scored:
            number = layer.layer
            observed = _observed(layer, device, fitted[number])
            found = _rows(observed, self.candidates, self.names, offered[number], blocks)
            return number, found

        for layer, found in side_by_side(rows, todo, device):
            store.save_scores(run, text, layer, self.asked, found)


def table(
    store: Store,
    run: records.ProfileRun,
    work: Workload,
    candidates: tuple[Approximation, ...],
    layers: int,
    heads: int,
) -> ScoreTable:
    """The stored scores of some candidates.

    Raises:
        ValueError: a score is missing.
    """
    names = [catalog.key(candidate) for candidate in candidates]
    shape = (layers, heads, len(names))
    fisher, error = _matrix(store.load_scores(run.id), names, work, shape)
    if np.isnan(fisher[0]).any():
        layer, head, c = np.argwhere(np.isnan(fisher[0]))[0]
        raise ValueError(
            f"no score of {names[c]} for layer {layer}, head {head} on the first text: "
            "run `attnplan search` again without interrupting it"
        )
    for values in (fisher, error):
        for text in range(1, work.texts + 1):
            _fill(values[0], values[text], typical=text < work.texts)
    # half the Fisher cost is the KL divergence, to second order
    return ScoreTable(candidates, 0.5 * fisher[:-1].mean(0), 0.5 * fisher[-1], error[:-1].mean(0))


def promising(
    fisher: NDArray[np.float64], density: NDArray[np.float64], head_ms: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Candidates that no cheaper one of the same head makes hopeless.

    Args:
        fisher: [..., candidates].
        density, head_ms: what they cost, [candidates]. Any other cost may stand for time.
    """
    kept = np.zeros(fisher.shape, bool)
    for c in range(len(density)):
        rivals = (density <= density[c] * (1 + 1e-9)) & (head_ms <= head_ms[c] * NOISE)
        kept[..., c] = fisher[..., c] <= SLACK * fisher[..., rivals].min(-1)
    return kept


def _matrix(
    scores: records.Scores, names: list[str], work: Workload, shape: tuple[int, int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stored Fisher costs and relative errors, [texts + 1, *shape]; NaN where there is none."""
    column = np.array([names.index(n) if n in names else -1 for n in scores.names], np.int64)
    which = column[scores.approximation] if len(column) else scores.approximation
    known = which >= 0
    place = (scores.sequence[known], scores.layer[known], scores.head[known], which[known])
    fisher, error = (np.full((work.texts + 1, *shape), np.nan) for _ in range(2))
    fisher[place], error[place] = scores.fisher[known], scores.relative_error[known]
    return fisher, error


def _fill(first: NDArray[np.float64], values: NDArray[np.float64], *, typical: bool) -> None:
    """Estimate what was dropped from the first text, by the other candidates of a head.

    Args:
        first: [layers, heads, candidates].
        values: the same of another text; NaN where dropped.
        typical: as the others lost on the whole, instead of as the worst of them did.
    """
    both = np.isfinite(values) & np.isfinite(first) & (first > 0)
    if typical:
        lost = [np.where(both, x, 0).sum(-1, keepdims=True) for x in (values, first)]
        ratio = np.where(lost[1] > 0, lost[0] / np.maximum(lost[1], 1e-300), 1.0)
    else:
        each = np.where(both, values / np.where(both, first, 1.0), 0.0)
        ratio = np.maximum(each.max(-1, keepdims=True), 1.0)
    dropped = np.isnan(values)
    values[dropped] = (first * ratio)[dropped]


def _observed(layer: LayerCapture, device: torch.device, fitted: Fitted) -> Observed:
    """One captured layer on the device that will run the plan."""
    query, key, value = (t.to(device) for t in (layer.query, layer.key, layer.value))
    return Observed(
        Inputs.of_layer(query, key, value, scale=layer.scale, fitted=fitted),
        None if layer.gradient is None else layer.gradient.to(device),
        None if layer.projection is None else layer.projection.to(device),
    )


def _blocks(work: Workload, text: int) -> Tensor:
    """Query blocks to compare on: spread over a text, in the copy of the repeated string."""
    if text < work.texts:
        return sampled_blocks(work.context, BLOCKS, work.seed + text)
    half = work.string // 2 // BLOCK
    blocks = sampled_blocks(work.string - half * BLOCK, BLOCKS // 2, work.seed + text)
    return torch.unique(blocks + half)


def _rows(
    observed: Observed,
    candidates: tuple[Approximation, ...],
    names: list[str],
    offered: NDArray[np.bool_],
    blocks: Tensor,
) -> list[records.CandidateScore]:
    scores = score_layer(observed, candidates, offered, blocks)
    return [
        records.CandidateScore(
            head=head,
            approximation=names[c],
            fisher=float(scores.fisher[head, c]),
            relative_error=float(scores.relative_error[head, c]),
            mass_dropped=None,
            positions=scores.positions,
        )
        for head, c in np.argwhere(offered).tolist()
    ]
