"""The profile of a head: what all the sums say once they are divided."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnplan.profiles.records.records import HeadProfile
from attnplan.profiles.records.scalars import ARRAY_NAMES, SCALAR_NAMES
from attnplan.profiles.statistics import spectra
from attnplan.profiles.statistics.layer_statistics import ENTROPY_EDGES, NORM_EDGES, LayerStatistics
from attnplan.profiles.statistics.probes import TOPS, WINDOWS

Array = NDArray[np.float64]


def finalise(statistics: LayerStatistics) -> list[HeadProfile]:
    """The profile of every head of a layer.

    A scalar is NaN where the model or the texts do not tell: before RoPE where queries and keys are
    not exposed, shares of a far mass that is zero.
    """
    return [_profile(statistics, head) for head in range(statistics.heads)]


def _profile(statistics: LayerStatistics, head: int) -> HeadProfile:
    a = statistics.arrays
    kv_head = head * statistics.kv_heads // statistics.heads
    count = float(a["queries"][0])
    grams = {
        "q": a["query_gram"][head] / count,
        "k": a["key_gram"][kv_head] / count,
        "v": a["value_gram"][kv_head] / count,
    }
    spectrum = {name: spectra.eigenvalues(gram) for name, gram in grams.items()}
    sigma = np.sqrt(a["energy"][head] / float(a["texts"][0]))
    scalars = _masses(a, head, count)
    scalars |= _entropies(a, head, count)
    scalars |= _attention_spectrum(a, head)
    for name, energy in spectrum.items():
        for share in (90, 95, 99):
            scalars[f"{name}_rank{share}"] = spectra.energy_rank(energy, share / 100)
        scalars[f"{name}_effective_rank"] = spectra.effective_rank(energy)
    scalars |= _before_rope(a, head, kv_head)
    scalars |= _keys_and_scores(statistics, head, kv_head, grams)
    scalars |= _output(a, head, count)
    arrays = {f"{name}_spectrum": energy for name, energy in spectrum.items()}
    arrays["a_spectrum"] = sigma
    arrays["block_heat"] = _heat(a, head)
    return HeadProfile(
        statistics.layer,
        head,
        {name: scalars[name] for name in SCALAR_NAMES},
        {name: arrays[name] for name in ARRAY_NAMES},
    )


def _masses(a: dict[str, Array], head: int, count: float) -> dict[str, float]:
    far = float(a["far_mass"][head])
    scalars = {
        "sink_mass": float(a["sink_mass"][head]) / count,
        "sink_mass_64": float(a["sink_mass_64"][head]) / count,
        "sink_local_mass": 1 - far / count,
        "vertical_mass": _share(float(a["vertical_mass"][head]), far),
        "slash_mass": _share(float(a["slash_mass"][head]), far),
    }
    for w, window in enumerate(WINDOWS):
        scalars[f"local_mass_{window}"] = float(a["local_mass"][head, w]) / count
    for t, top in enumerate(TOPS):
        scalars[f"top_block_mass_{top}"] = float(a["top_block_mass"][head, t]) / count
    return scalars


def _entropies(a: dict[str, Array], head: int, count: float) -> dict[str, float]:
    counts = a["entropy_counts"][head]
    return {
        "entropy": float(a["entropy_sum"][head]) / count,
        "entropy_p10": spectra.histogram_quantile(counts, ENTROPY_EDGES, 0.1),
        "entropy_p90": spectra.histogram_quantile(counts, ENTROPY_EDGES, 0.9),
        "collision_entropy": float(a["collision_entropy_sum"][head]) / count,
        "effective_keys": float(a["effective_keys_sum"][head]) / count,
    }


def _attention_spectrum(a: dict[str, Array], head: int) -> dict[str, float]:
    """Of the mean energies: the attention matrix of a typical text."""
    texts = float(a["texts"][0])
    energy, total = a["energy"][head] / texts, float(a["frobenius"][head]) / texts
    size = float(a["queries"][0]) / texts
    return {
        "a_effective_rank": spectra.truncated_effective_rank(energy, total, size),
        "a_stable_rank": total / float(energy[0]),
        "a_decay": spectra.decay_exponent(np.sqrt(energy)),
    }


def _before_rope(a: dict[str, Array], head: int, kv_head: int) -> dict[str, float]:
    scalars = {"q_pre_rank95": float("nan"), "k_pre_rank95": float("nan")}
    if a["pre_rope_queries"][0] > 0:
        for name, gram in (
            ("q_pre_rank95", a["query_pre_gram"][head]),
            ("k_pre_rank95", a["key_pre_gram"][kv_head]),
        ):
            scalars[name] = spectra.energy_rank(spectra.eigenvalues(gram), 0.95)
    return scalars


def _keys_and_scores(
    statistics: LayerStatistics, head: int, kv_head: int, grams: dict[str, Array]
) -> dict[str, float]:
    """Scores are centred: subtracting the mean key shifts every score of a query alike."""
    a, count = statistics.arrays, float(statistics.arrays["queries"][0])
    mean = {
        "q": a["query_sum"][head] / count,
        "k": a["key_sum"][kv_head] / count,
        "v": a["value_sum"][kv_head] / count,
    }
    centred = {name: grams[name] - np.outer(mean[name], mean[name]) for name in grams}
    balanced = spectra.balanced_scores(grams["q"], centred["k"])
    both = spectra.balanced_scores(centred["q"], centred["k"])
    median = spectra.histogram_quantile(a["key_norm_counts"][kv_head], NORM_EDGES, 0.5)
    return {
        "max_logit": float(a["max_logit"][head]),
        "key_norm_ratio": _share(float(a["key_norm_max"][kv_head]), median),
        "random_feature_exponent": 2 * statistics.scale * float(both.sum()),
        "score_rank95": spectra.energy_rank(balanced**2, 0.95),
        "cluster_inertia": _share(
            float(a["cluster_within"][kv_head]), float(a["cluster_total"][kv_head])
        ),
        "value_spread": _share(float(np.trace(centred["v"])), float(np.trace(grams["v"]))),
    }


def _output(a: dict[str, Array], head: int, count: float) -> dict[str, float]:
    felt, over = a["fisher"], float(a["gradient_queries"][0])
    if over == 0:
        felt, over = a["projected_energy"], float(a["projected_queries"][0])
    return {
        "output_energy": float(a["output_energy"][head]) / count,
        "fisher_total": _share(float(felt[head]), over),
    }


def _heat(a: dict[str, Array], head: int) -> Array:
    """Mean mass of a query of the row on the keys of the column; only rows that have queries."""
    queries = a["heat_queries"]
    used = int((queries > 0).sum())
    heat: Array = a["heat"][head, :used, :used] / queries[:used, None]
    return heat


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
