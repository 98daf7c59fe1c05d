"""Everything a profile knows of one layer, in a form that adds up.

Each text gives one `LayerStatistics`: counts, sums, Gram matrices and histograms, which are added,
and maxima, of which the larger is taken. So profiles of any shards of the texts, in any order,
merge to the profile of all of them; only `finalise` of `head_profile.py` divides.

What is not a sum by nature is made one so:

- quantiles come from histograms of fixed bins (entropy: 1/32 nat; key norms: 1/16 octave);
- spectra of A: squares of the singular values, by index. Their mean over texts is the spectrum of
  a typical text, weighted by energy (not the spectrum of all texts in one matrix);
- vertical and slash mass, and k-means: chosen anew in every text, added as far as they went;
- heat maps: cells of 64 x 2^p tokens, p as small as 64 cells allow. Of two maps the finer one is
  added up into the cells of the coarser one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnplan.kernels.operands.inputs import POSITIONS, Moments
from attnplan.profiles.statistics import probes
from attnplan.profiles.statistics.clusters import cluster_inertia
from attnplan.profiles.statistics.parallel import side_by_side
from attnplan.profiles.statistics.probes import CELLS, AttentionProbe

if TYPE_CHECKING:
    from attnplan.profiles.capture.capture import LayerCapture

Array = NDArray[np.float64]

RANK = 64
"""Singular values of A that are kept."""
CLUSTERS = 64
ENTROPY_EDGES = np.arange(0, 16 + 1 / 64, 1 / 32)
NORM_EDGES = 2.0 ** np.arange(-20, 20 + 1 / 32, 1 / 16)
MAXIMA = ("max_logit", "key_norm_max")
HEAT = ("heat", "heat_queries", "heat_cell")
LATER = ("key_position_gram", "position_chunks")
"""Sums that statistics stored by earlier versions lack: nothing is known of those texts."""


@dataclass(frozen=True)
class LayerStatistics:
    """Mergeable statistics of one layer.

    Attributes:
        layer: its index.
        scale: factor before the softmax.
        arrays: float64, by name. Per query head: masses and entropies as in `AttentionProbe`, query
            moments, output and Fisher energies. Per kv head: key and value moments. Counts
            (`texts`, `queries`, `pre_rope_queries`, `gradient_queries`, ...) have shape [1].
    """

    layer: int
    scale: float
    arrays: dict[str, Array]

    @property
    def heads(self) -> int:
        return int(self.arrays["query_sum"].shape[0])

    @property
    def kv_heads(self) -> int:
        return int(self.arrays["key_sum"].shape[0])

    def to_bytes(self) -> bytes:
        """A compressed npz file."""
        file = io.BytesIO()
        np.savez_compressed(
            file,
            allow_pickle=False,
            **{"layer": np.array(self.layer), "scale": np.array(self.scale), **self.arrays},
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> LayerStatistics:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return cls(int(arrays.pop("layer")), float(arrays.pop("scale")), arrays)


def measure(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    *,
    scale: float,
    gradient: Tensor | None = None,
    projection: Tensor | None = None,
    query_pre_gram: Tensor | None = None,
    key_pre_gram: Tensor | None = None,
    seed: int = 0,
) -> LayerStatistics:
    """Statistics of one layer on one text; arguments as in `capture.LayerCapture`.

    The tensors have a batch dimension of one. A query head's Fisher energy without a gradient is
    that of its output behind the output projection.
    """
    query, key, value, output = (_single(t) for t in (query, key, value, output))
    probe = probes.probe(query, key, scale=scale, rank=RANK, seed=seed)
    arrays = _of_attention(probe) | _of_vectors(query, key, value, seed)
    arrays |= _of_output(output, gradient, projection)
    kinds = (("query", query_pre_gram, query), ("key", key_pre_gram, key))
    known = query_pre_gram is not None and key_pre_gram is not None
    arrays["pre_rope_queries"] = np.array([float(query.shape[1]) if known else 0.0])
    for name, gram, after in kinds:
        if not known or gram is None:
            gram = after.new_zeros(after.shape[0], after.shape[2], after.shape[2])
        arrays[f"{name}_pre_gram"] = _numpy(gram)
    return LayerStatistics(layer, scale, arrays)


def measure_layers(layers: Sequence[LayerCapture], *, seed: int = 0) -> list[LayerStatistics]:
    """Statistics of every captured layer of one text, in the same order."""
    if not layers:
        return []
    work = partial(_measure_captured, seed=seed)
    return list(side_by_side(work, layers, layers[0].query.device))


def _measure_captured(layer: LayerCapture, *, seed: int) -> LayerStatistics:
    return measure(
        layer.layer,
        layer.query,
        layer.key,
        layer.value,
        layer.output,
        scale=layer.scale,
        gradient=layer.gradient,
        projection=layer.projection,
        query_pre_gram=layer.query_pre_gram,
        key_pre_gram=layer.key_pre_gram,
        seed=seed,
    )


def merge(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    """The statistics of both sets of texts.

    Raises:
        ValueError: they are of different layers or models.
    """
    mine, theirs = (_shape(s) for s in (a, b))
    if mine != theirs:
        raise ValueError(f"cannot merge statistics of different layers: {mine} and {theirs}")
    arrays = _merged_heat(a.arrays, b.arrays)
    for name, x in (b.arrays | a.arrays).items():
        if name in LATER and not (name in a.arrays and name in b.arrays):
            arrays[name] = x
        elif name in MAXIMA:
            arrays[name] = np.maximum(x, b.arrays[name])
        elif name not in HEAT:
            arrays[name] = x + b.arrays[name]
    return LayerStatistics(a.layer, a.scale, arrays)


def merge_all(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """`merge` over one or more."""
    return reduce(merge, parts)


def moments(statistics: LayerStatistics) -> Moments:
    """Means and second moments after RoPE, that methods are fitted with (float32)."""
    arrays, count = statistics.arrays, statistics.arrays["queries"]

    def mean(name: str) -> Tensor:
        return torch.from_numpy(arrays[name] / count).float()

    positions = None
    if "position_chunks" in arrays and arrays["position_chunks"][0]:
        positions = arrays["key_position_gram"] / arrays["position_chunks"]
    return Moments(
        mean("query_sum"),
        mean("query_gram"),
        mean("key_sum"),
        mean("key_gram"),
        None if positions is None else torch.from_numpy(positions).float(),
    )


def _of_attention(probe: AttentionProbe) -> dict[str, Array]:
    arrays = {
        name: _numpy(getattr(probe, name))
        for name in (
            "sink_mass",
            "sink_mass_64",
            "local_mass",
            "far_mass",
            "top_block_mass",
            "vertical_mass",
            "slash_mass",
            "max_logit",
        )
    }
    tokens = probe.tokens
    arrays["texts"] = np.array([1.0])
    arrays["queries"] = np.array([float(tokens)])
    entropy, collision = _numpy(probe.entropy).clip(min=0.0), _numpy(probe.collision)
    arrays["entropy_sum"] = entropy.sum(1)
    arrays["entropy_counts"] = _histograms(entropy, ENTROPY_EDGES)
    arrays["collision_entropy_sum"] = -np.log(collision).sum(1)
    arrays["effective_keys_sum"] = (1 / collision).sum(1)
    arrays["frobenius"] = collision.sum(1)
    energy = _numpy(probe.energy)
    arrays["energy"] = np.pad(energy, ((0, 0), (0, RANK - energy.shape[1])))
    cells = probe.heat.shape[1]
    arrays["heat"] = np.pad(_numpy(probe.heat), ((0, 0), (0, CELLS - cells), (0, CELLS - cells)))
    first = np.arange(CELLS) * probe.cell
    arrays["heat_queries"] = (tokens - first).clip(0, probe.cell).astype(np.float64)
    arrays["heat_cell"] = np.array([float(probe.cell)])
    return arrays


def _of_vectors(query: Tensor, key: Tensor, value: Tensor, seed: int) -> dict[str, Array]:
    arrays = {}
    for name, x in (("query", query), ("key", key), ("value", value)):
        x = x if x.dtype == torch.float64 else x.float()
        arrays[f"{name}_sum"] = _numpy(x.sum(1, dtype=torch.float64))
        arrays[f"{name}_gram"] = _numpy(x.mT @ x)
    arrays["key_position_gram"], arrays["position_chunks"] = _by_position(key)
    norms = _numpy(key.float().norm(dim=2))
    arrays["key_norm_max"] = norms.max(1)
    arrays["key_norm_counts"] = _histograms(norms, NORM_EDGES)
    clusters = min(CLUSTERS, -(-key.shape[1] // 16))
    within, total = cluster_inertia(key, clusters=clusters, seed=seed)
    arrays["cluster_within"], arrays["cluster_total"] = _numpy(within), _numpy(total)
    return arrays


def _by_position(key: Tensor) -> tuple[Array, Array]:
    """Products of keys by their positions in complete chunks, summed, and how many chunks."""
    kv_heads, tokens, head_dim = key.shape
    chunks = tokens // POSITIONS
    key = key if key.dtype == torch.float64 else key.float()
    rows = key[:, : chunks * POSITIONS].reshape(kv_heads, chunks, POSITIONS, head_dim)
    rows = rows.transpose(1, 2).flatten(2)
    return _numpy(rows @ rows.mT), np.array([float(chunks)])


def _of_output(
    output: Tensor, gradient: Tensor | None, projection: Tensor | None
) -> dict[str, Array]:
    tokens = output.shape[1]
    output = output.double()
    energy = output.square().sum((1, 2))
    felt, steep = torch.zeros_like(energy), torch.zeros_like(energy)
    if gradient is not None:
        slope = _single(gradient).double()
        felt = (slope * output).sum(2).square().sum(1)
        steep = slope.square().sum((1, 2))
    projected = torch.zeros_like(energy)
    if projection is not None:
        projected = energy * projection.double().square()
    return {
        "output_energy": _numpy(energy),
        "fisher": _numpy(felt),
        "gradient_energy": _numpy(steep),
        "projected_energy": _numpy(projected),
        "gradient_queries": np.array([0.0 if gradient is None else float(tokens)]),
        "projected_queries": np.array([0.0 if projection is None else float(tokens)]),
    }


def _histograms(values: Array, edges: Array) -> Array:
    """One row of counts per row of values; values outside the edges go to the outermost bins."""
    inside = values.clip(edges[0], edges[-1])
    return np.stack([np.histogram(row, edges)[0] for row in inside]).astype(np.float64)


def _merged_heat(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    cell = max(float(a["heat_cell"][0]), float(b["heat_cell"][0]))
    heat, queries = np.zeros_like(a["heat"]), np.zeros_like(a["heat_queries"])
    for part in (a, b):
        ratio = int(cell / float(part["heat_cell"][0]))
        cells = -(-CELLS // ratio)
        starts = np.arange(cells) * ratio
        rows = np.add.reduceat(np.add.reduceat(part["heat"], starts, 1), starts, 2)
        heat[:, :cells, :cells] += rows
        queries[:cells] += np.add.reduceat(part["heat_queries"], starts)
    return {"heat": heat, "heat_queries": queries, "heat_cell": np.array([cell])}


def _shape(statistics: LayerStatistics) -> dict[str, float]:
    arrays = statistics.arrays
    return {
        "layer": statistics.layer,
        "heads": statistics.heads,
        "kv_heads": statistics.kv_heads,
        "head_dim": arrays["key_sum"].shape[1],
        "value_dim": arrays["value_sum"].shape[1],
        "scale": statistics.scale,
    }


def _single(tensor: Tensor) -> Tensor:
    if tensor.shape[0] != 1:
        raise ValueError(
            f"statistics are measured one text at a time, got a batch of {len(tensor)}"
        )
    return tensor[0]


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().double().cpu().numpy()
    return array
