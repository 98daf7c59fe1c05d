"""The parts of a plan: the device it was made for, and what runs at some lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.plan.identity import ModelIdentity
from attnplan.plan.located_yaml import PlanError

Assignment = tuple[tuple[Approximation, ...], ...]
"""What each head of each layer runs: `assignment[layer][head]`."""


@dataclass(frozen=True)
class Target:
    """What a plan was made for: where its times were taken, or predicted.

    Attributes:
        device: name of the device.
        kind: torch device type, such as cpu or cuda.
        dtype: floating-point type of the model, such as bfloat16.
        engine: executor of the kernels.
        versions: library to version.
        batch: smallest and largest batch it was measured with.
    """

    device: str
    kind: str
    dtype: str
    engine: str
    versions: Mapping[str, str]
    batch: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Section:
    """What prefill runs at some lengths.

    Attributes:
        context: first and last length, both included.
        layers: for each layer, for each head, its approximation.
    """

    context: tuple[int, int]
    layers: Assignment

    def __post_init__(self) -> None:
        low, high = self.context
        if not 1 <= low <= high:
            raise PlanError(
                f"context must be [low, high] with 1 <= low <= high, got [{low}, {high}]"
            )


@dataclass(frozen=True)
class DecodeSection:
    """What is kept of the past while decoding.

    Attributes:
        context: first and last length that it was made for.
        layers: for each layer, for each kv head, its keeper.
    """

    context: tuple[int, int]
    layers: tuple[tuple[Keeper, ...], ...]

    def __post_init__(self) -> None:
        low, high = self.context
        if not 1 <= low <= high:
            raise PlanError(
                f"context must be [low, high] with 1 <= low <= high, got [{low}, {high}]"
            )


def check_assignment(layers: Assignment, model: ModelIdentity) -> None:
    """Raises PlanError unless there is an approximation for every head of every layer."""
    if len(layers) != model.layers:
        raise PlanError(f"plan has {len(layers)} layers, {model.name} has {model.layers}")
    for layer, row in enumerate(layers):
        if len(row) != model.heads:
            raise PlanError(
                f"layer {layer}: plan has {len(row)} heads, {model.name} has {model.heads}"
            )


def check_keepers(layers: tuple[tuple[Keeper, ...], ...], model: ModelIdentity) -> None:
    """Raises PlanError unless there is a keeper for every kv head of every layer."""
    if len(layers) != model.layers:
        raise PlanError(f"decode has {len(layers)} layers, {model.name} has {model.layers}")
    for layer, row in enumerate(layers):
        if len(row) != model.kv_heads:
            raise PlanError(
                f"decode, layer {layer}: {len(row)} kv heads, {model.name} has {model.kv_heads}"
            )
