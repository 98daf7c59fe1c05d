"""The methods that attnplan knows, and how a plan spells an approximation.

A method is added by one file in `kernels/selectors` or `kernels/compressors` and its name here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnplan.kernels.compressors.attention_matching import AttentionMatching
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.compressors.csalr import CSALR
from attnplan.kernels.compressors.linear import Linear
from attnplan.kernels.compressors.linformer import Linformer
from attnplan.kernels.compressors.multipole import Multipole
from attnplan.kernels.compressors.nystrom import Nystrom
from attnplan.kernels.compressors.performer import Performer
from attnplan.kernels.compressors.polysketch import PolySketch
from attnplan.kernels.compressors.sampled_columns import SampledColumns
from attnplan.kernels.compressors.skyformer import Skyformer
from attnplan.kernels.compressors.taylor import Taylor
from attnplan.kernels.compressors.tensor_sketch import TensorSketch
from attnplan.kernels.compressors.wildcat import Wildcat
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.compressor import Compressor
from attnplan.kernels.contracts.selector import Selector
from attnplan.kernels.operands.inputs import Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.antidiagonal import Antidiagonal
from attnplan.kernels.selectors.block_topk import BlockTopK
from attnplan.kernels.selectors.dense import Dense
from attnplan.kernels.selectors.global_window import GlobalWindow
from attnplan.kernels.selectors.heavy_hitters import HeavyHitters
from attnplan.kernels.selectors.leverage import Leverage
from attnplan.kernels.selectors.loki import Loki
from attnplan.kernels.selectors.lsh import LSH
from attnplan.kernels.selectors.moba import MoBA
from attnplan.kernels.selectors.off import Off
from attnplan.kernels.selectors.quest import Quest
from attnplan.kernels.selectors.random_blocks import RandomBlocks
from attnplan.kernels.selectors.routing import Routing
from attnplan.kernels.selectors.smyrf import Smyrf
from attnplan.kernels.selectors.sorted_blocks import SortedBlocks
from attnplan.kernels.selectors.strided import Strided
from attnplan.kernels.selectors.two_stage import TwoStage
from attnplan.kernels.selectors.vertical_slash import VerticalSlash
from attnplan.kernels.selectors.window import Window
from attnplan.kernels.spelling import build

NEAR: dict[str, type[Selector]] = {
    cls.name: cls
    for cls in (
        Dense,
        Window,
        GlobalWindow,
        Strided,
        RandomBlocks,
        VerticalSlash,
        HeavyHitters,
        Leverage,
        BlockTopK,
        MoBA,
        Quest,
        Antidiagonal,
        LSH,
        Smyrf,
        SortedBlocks,
        Routing,
        Loki,
        TwoStage,
        Off,
    )
}
FAR: dict[str, type[Compressor]] = {
    cls.name: cls
    for cls in (
        CentroidT,
        Multipole,
        SampledColumns,
        Nystrom,
        Wildcat,
        Taylor,
        PolySketch,
        TensorSketch,
        Performer,
        CSALR,
        Linear,
        AttentionMatching,
        Skyformer,
        Linformer,
    )
}
DENSE = Approximation(Dense())

_Part = TypeVar("_Part", Selector, Compressor)


def choices(shape: AttentionShape) -> Iterator[Approximation]:
    """Every approximation worth trying at this shape; dense comes first."""
    for selector in NEAR.values():
        for near in selector.choices(shape):
            yield Approximation(near)
            if near.tried_with_far(shape):
                for compressor in FAR.values():
                    for far in compressor.choices_behind(near, shape):
                        yield Approximation(near, far)


def fit(moments: Moments) -> dict[str, Tensor]:
    """What all methods of the catalog fit to one layer, 'method.tensor' to tensor."""
    fitted: dict[str, Tensor] = {}
    for selector in NEAR.values():
        fitted |= selector.fit(moments)
    for compressor in FAR.values():
        fitted |= compressor.fit(moments)
    return fitted


@cache
def fitted_names(
    head_dim: int, method: type[Selector] | type[Compressor] | None = None
) -> frozenset[str]:
    """What one method, or all together, fit: found by fitting one head of white noise."""
    mean, gram = torch.zeros(1, head_dim), torch.eye(head_dim)[None]
    noise = Moments(mean, gram, mean, gram)
    return frozenset(fit(noise) if method is None else method.fit(noise))


def needed_names(head_dim: int, part: Selector | Compressor) -> frozenset[str]:
    """What a method reads of what it fits, at its setting."""
    return part.reads(fitted_names(head_dim, type(part)))


def to_dict(approximation: Approximation) -> dict[str, Any]:
    """The spelling of plan files: {'near': {'name': ..., knobs}, 'far': {...}}."""
    spelled: dict[str, Any] = {"near": _spell(approximation.near)}
    if approximation.far is not None:
        spelled["far"] = _spell(approximation.far)
    return spelled


def from_dict(spelled: Mapping[str, Any]) -> Approximation:
    """The inverse of `to_dict`.

    Raises:
        ValueError: an unknown method or knob, or a bad value; the message names what is known.
    """
    if not isinstance(spelled, Mapping) or "near" not in spelled:
        raise ValueError(f"an approximation needs the key 'near', got {spelled!r}")
    unknown = set(spelled) - {"near", "far"}
    if unknown:
        raise ValueError(f"unknown key {min(unknown, key=str)!r}; known: near, far")
    far = spelled.get("far")
    return Approximation(
        _build(NEAR, spelled["near"], "approximation"),
        None if far is None else _build(FAR, far, "far field"),
    )


def key(approximation: Approximation) -> str:
    """One canonical line: `window(window=128, sinks=4) + centroid_t(chunk=256, slots=16)`."""
    parts = [approximation.near] + ([approximation.far] if approximation.far else [])
    return " + ".join(
        f"{part.name}({', '.join(f'{k}={v}' for k, v in _knobs(part).items())})" for part in parts
    )


def methods_in(line: str) -> frozenset[type[Selector] | type[Compressor]] | None:
    """The methods that canonical lines name, such as `3 x window(...) + linear(...) | 6 x ...`.

    None where it names one that is not in the catalog.
    """
    known: Mapping[str, type[Selector] | type[Compressor]] = {**NEAR, **FAR}
    names = set(re.findall(r"(\w+)\(", line))
    return frozenset(known[name] for name in names) if names <= known.keys() else None


def _spell(part: Selector | Compressor) -> dict[str, Any]:
    return {"name": part.name, **_knobs(part)}


def _knobs(part: Selector | Compressor) -> dict[str, int]:
    """The settings that a method is spelled with."""
    knobs = ((f, getattr(part, f.name)) for f in fields(part))  # type: ignore[arg-type]
    return {f.name: x for f, x in knobs if not (f.metadata.get("later") and x == f.default)}


def _build(known: Mapping[str, type[_Part]], spelled: Any, what: str) -> _Part:
    if not isinstance(spelled, Mapping) or "name" not in spelled:
        raise ValueError(f"a method needs the key 'name', got {spelled!r}")
    return build(known, spelled, what)
