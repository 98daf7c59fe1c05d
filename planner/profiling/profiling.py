"""Profile a model: capture every calibration text, keep its statistics, and fit what methods need.

Each text is one unit of work: its statistics are stored in one transaction, so that an interrupted
profile goes on with the next text. A last text, a random string that is repeated once, is captured
for scoring only: copying is what approximations break first, and prose hardly shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnplan.kernels import cache_catalog, catalog
from attnplan.models.load import LoadedModel, check_context
from attnplan.profiles.capture.capture import SequenceCapture, capture
from attnplan.profiles.capture.capture_files import CaptureFiles
from attnplan.profiles.records import records
from attnplan.profiles.records.digest import digest
from attnplan.profiles.statistics.head_profile import finalise
from attnplan.profiles.statistics.layer_statistics import (
    LayerStatistics,
    measure_layers,
    merge_all,
    moments,
)
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import TokenSet

VERSION = 2
"""Of what a profile measures; a new one makes new runs."""
COPIED = 2048
"""Longest repeated random string: small models cannot copy much longer ones at all."""

Advance = Callable[[str], None]
"""Called after every unit of work, with what comes next."""


def silent(description: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class Workload:
    """What a profile and the searches on it look at.

    Attributes:
        tokens: calibration texts.
        seed: of sampled labels, random strings and sketches.
    """

    tokens: TokenSet
    seed: int

    @property
    def context(self) -> int:
        return int(self.tokens.tokens.shape[1])

    @property
    def texts(self) -> int:
        return int(self.tokens.tokens.shape[0])

    @property
    def string(self) -> int:
        """Length of the repeated random string."""
        return min(self.context, COPIED)

    def text(self, index: int, vocabulary: int) -> Tensor:
        """Calibration text `index`; the one after the last is the repeated random string."""
        if index < self.texts:
            return self.tokens.tokens[index]
        return repeated_string(self.string, vocabulary, self.seed)


def repeated_string(length: int, vocabulary: int, seed: int) -> Tensor:
    """A random string of tokens and its copy, int64 [length]."""
    generator = torch.Generator().manual_seed(seed)
    # the first ids of a vocabulary are special tokens and single bytes
    low = min(1000, vocabulary // 4)
    once = torch.randint(low, vocabulary, (-(-length // 2),), generator=generator)
    return torch.cat([once, once])[:length]


def model_record(loaded: LoadedModel) -> records.ModelIdentity:
    """The model's identity as the store keeps it."""
    found = loaded.identity
    return records.ModelIdentity(
        fingerprint=found.fingerprint,
        name=found.name,
        architecture=found.architecture,
        layers=found.layers,
        heads=found.heads,
        kv_heads=found.kv_heads,
        head_dim=found.head_dim,
        rope=found.rope,
        weights_digest=found.weights,
    )


def run_key(loaded: LoadedModel, work: Workload) -> records.RunKey:
    """What determines a profile run."""
    large = loaded.identity.magnitudes
    return records.RunKey(
        model=model_record(loaded),
        dataset=work.tokens.identity,
        context=work.context,
        sequences=work.texts,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        seed=work.seed,
        settings={"version": VERSION, **({} if large is None else {"magnitudes": dict(large)})},
    )


def capture_files(key: records.RunKey, folder: Path) -> CaptureFiles:
    """Where the captured tensors of a run are kept between profiling and scoring."""
    name = digest(
        [
            *(key.model.fingerprint, key.dataset.digest, key.context, key.sequences),
            *(key.dtype, key.seed, dict(key.settings)),
        ]
    )
    return CaptureFiles(folder / name[:16])


@contextmanager
def captures(
    loaded: LoadedModel, work: Workload, folder: Path, *, keep: bool = False
) -> Iterator[CaptureFiles]:
    """Captured tensors of a run, deleted at the end of the block.

    They stay where the block is interrupted: the same command goes on with them.

    Args:
        loaded: the model.
        work: calibration texts.
        folder: for the captured tensors of all runs.
        keep: leave them to the next run on the same model and texts.
    """
    files = capture_files(run_key(loaded, work), folder)
    try:
        yield files
    except Exception:
        files.discard()
        raise
    else:
        if not keep:
            files.discard()
    finally:
        files.release()
        with suppress(OSError):
            folder.rmdir()  # where it is empty


def profile(
    loaded: LoadedModel,
    work: Workload,
    store: Store,
    files: CaptureFiles,
    advance: Advance = silent,
) -> records.ProfileRun:
    """Profile a model, or continue or read back a profile.

    Raises:
        ValueError: the context is longer than the model's, or the model cannot be captured.
    """
    check_context(loaded.identity, work.context)
    run = store.open_run(run_key(loaded, work))
    if run.complete:
        known = store.load_fitted(run.id)
        wanted = catalog.fitted_names(loaded.identity.head_dim) | cache_catalog.fitted_names(
            loaded.identity.head_dim
        )
        if any(wanted - known.get(layer, {}).keys() for layer in range(loaded.identity.layers)):
            # a method is newer than the profile: what it fits comes from the stored statistics
            store.save_fitted(run.id, _fitted(_merged(store, run.id)))
        return run
    files.claim()
    for index in range(work.texts):
        if index in store.shards_done(run.id):
            continue
        advance(f"text {index + 1} of {work.texts}")
        captured = captured_text(loaded, work, index)
        store.save_shard(run.id, index, _pack(captured, work.seed))
        files.save(index, captured)
    advance("fitting")
    layers = _merged(store, run.id)
    heads = [head for layer in layers for head in finalise(layer)]
    store.finish_run(run.id, heads, _fitted(layers))
    return store.run(run.id)


def _fitted(layers: list[LayerStatistics]) -> dict[int, dict[str, np.ndarray]]:
    """What methods and keepers fit, layer to name to array."""
    fitted = {}
    for layer in layers:
        seen = moments(layer)
        tensors = catalog.fit(seen) | cache_catalog.fit(seen)
        fitted[layer.layer] = {name: tensor.numpy() for name, tensor in tensors.items()}
    return fitted


def captured_text(loaded: LoadedModel, work: Workload, index: int) -> SequenceCapture:
    """Run one text through the model and keep what its attention layers saw."""
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    return capture(loaded.model, work.text(index, vocabulary), seed=work.seed + index)


def fitted_tensors(store: Store, run: int) -> dict[int, dict[str, Tensor]]:
    """Fitted data of a run as tensors, layer to name to tensor."""
    return {
        layer: {name: torch.from_numpy(np.array(array)) for name, array in data.items()}
        for layer, data in store.load_fitted(run).items()
    }


def _pack(captured: SequenceCapture, seed: int) -> dict[str, np.ndarray]:
    packed: dict[str, np.ndarray] = {}
    for statistics in measure_layers(captured.layers, seed=seed):
        packed[f"{statistics.layer}/"] = np.array([statistics.scale])
        for name, array in statistics.arrays.items():
            packed[f"{statistics.layer}/{name}"] = array
    return packed


def _merged(store: Store, run: int) -> list[LayerStatistics]:
    """Statistics of every layer over all texts."""
    parts: dict[int, list[LayerStatistics]] = {}
    for _, shard in store.load_shards(run):
        arrays: dict[int, dict[str, np.ndarray]] = {}
        for key, array in shard.items():
            layer, name = key.split("/", 1)
            arrays.setdefault(int(layer), {})[name] = array
        for layer_index, found in arrays.items():
            scale = float(found.pop("")[0])
            parts.setdefault(layer_index, []).append(LayerStatistics(layer_index, scale, found))
    return [merge_all(parts[layer]) for layer in sorted(parts)]
