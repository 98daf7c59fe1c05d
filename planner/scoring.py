"""Score all candidates of all heads on the calibration texts, once per model and data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.approximation import Approximation, Fitted, Inputs
from attnplan.kernels.tile_list import BLOCK
from attnplan.models import LoadedModel
from attnplan.profiles import records
from attnplan.profiles.capture import LayerCapture
from attnplan.profiles.capture_files import CaptureFiles
from attnplan.profiles.database import Store
from attnplan.profiles.digest import digest
from attnplan.profiles.side_by_side import side_by_side
from attnplan.profiling import Advance, Workload, captured_text, fitted_tensors, silent
from attnplan.search.scores import Observed, sampled_blocks, score_layer

BLOCKS = 12
"""Query blocks of a text that candidates are compared on."""

_Scored = tuple[int, list[records.CandidateScore]]


@dataclass(frozen=True)
class ScoreTable:
    """Predicted KL of every candidate on every head, in nats per token.

    Attributes:
        candidates: dense first.
        texts: float64 [layers, heads, candidates], mean over the calibration texts.
        copying: same, on the repeated random string.
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
) -> ScoreTable:
    """Score what is not scored yet, and read all scores back.

    Captured tensors are used where they are still there and captured again where not; once
    everything is scored they are deleted.
    """
    names = [catalog.key(candidate) for candidate in candidates]
    asked = digest([names, BLOCKS])
    layers = loaded.identity.layers
    done = store.scores_done(run.id, asked)
    missing = {
        text: [layer for layer in range(layers) if (text, layer) not in done]
        for text in range(work.texts + 1)
    }
    if any(missing.values()):
        fitted = fitted_tensors(store, run.id)
        scored = store.scored(run.id)
        for text, wanted in missing.items():
            if not wanted:
                continue
            advance(f"text {text + 1} of {work.texts + 1}")
            if not files.has(text):
                files.save(text, captured_text(loaded, work, text))
            blocks = _blocks(work, text)
            todo = (layer for layer in files.layers(text) if layer.layer in wanted)

            def rows(layer: LayerCapture, text: int = text, blocks: Tensor = blocks) -> _Scored:
                known = scored.get((text, layer.layer), frozenset())
                observed = _observed(layer, loaded.model.device, fitted[layer.layer])
                found = _rows(observed, candidates, names, known, blocks.to(loaded.model.device))
                return layer.layer, found

            for layer, found in side_by_side(rows, todo, loaded.model.device):
                store.save_scores(run.id, text, layer, asked, found)
    files.discard()
    return table(store, run, work, candidates, loaded.identity.layers, loaded.identity.heads)


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
    scores = store.load_scores(run.id)
    column = np.array([names.index(n) if n in names else -1 for n in scores.names], np.int64)
    which = column[scores.approximation] if len(column) else scores.approximation
    known = which >= 0
    place = (scores.sequence[known], scores.layer[known], scores.head[known], which[known])
    shape = (work.texts + 1, layers, heads, len(names))
    fisher, error = np.full(shape, np.nan), np.full(shape, np.nan)
    fisher[place], error[place] = scores.fisher[known], scores.relative_error[known]
    if np.isnan(fisher).any():
        text, layer, head, c = np.argwhere(np.isnan(fisher))[0]
        raise ValueError(
            f"no score of {names[c]} for layer {layer}, head {head} on text {text}: "
            "run `attnplan search` again without interrupting it"
        )
    # half the Fisher cost is the KL divergence, to second order
    return ScoreTable(candidates, 0.5 * fisher[:-1].mean(0), 0.5 * fisher[-1], error[:-1].mean(0))


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
    known: frozenset[str],
    blocks: Tensor,
) -> list[records.CandidateScore]:
    heads = len(observed.inputs.head)
    new = [c for c, name in enumerate(names) if name not in known]
    scores = score_layer(
        observed, [candidates[c] for c in new], np.ones((heads, len(new)), bool), blocks
    )
    return [
        records.CandidateScore(
            head=head,
            approximation=names[c],
            fisher=float(scores.fisher[head, n]),
            relative_error=float(scores.relative_error[head, n]),
            mass_dropped=None,
            positions=scores.positions,
        )
        for head in range(heads)
        for n, c in enumerate(new)
    ]
