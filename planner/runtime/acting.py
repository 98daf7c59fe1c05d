"""Whether a plan acts where it is measured: a measurement of a plan that did not run is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.models.attention_sites import attention_sites
from attnplan.runtime.attention import ATTRIBUTE, PLANNED, LayerState

WHOLE = 0.95
"""A head of at least this density may give what dense attention gives, to the last bit."""


@dataclass
class Act:
    """What ran in one fresh forward pass.

    Attributes:
        tokens: of the pass.
        rows: layer to what its heads ran, of the layers that ran the plan; None where the model is
            not patched.
    """

    tokens: int
    rows: dict[int, tuple[Approximation, ...]] | None = None

    @property
    def layers(self) -> int | None:
        """How many layers ran the plan."""
        return None if self.rows is None else len(self.rows)


@contextmanager
def acting(model: Any, tokens: int) -> Iterator[Act]:
    """Watch one forward pass over `tokens` fresh tokens inside the `with` block.

    Yields:
        What ran, filled in at the end.

    Raises:
        ValueError: a layer has a plan for this length, but did not run it.
    """
    found = Act(tokens)
    states = _states(model)
    before = [Counter(state.model.counts[state.layer]) for state in states]
    yield found
    if not states:
        return
    found.rows = {}
    for state, counted in zip(states, before, strict=True):
        kernel, _ = state.model.kernel(state.layer, tokens)
        if kernel is None:
            continue
        ran = state.model.counts[state.layer] - counted
        if not ran[PLANNED] or len(ran) > 1:
            reasons = ", ".join(reason for reason in ran if reason != PLANNED)
            raise ValueError(
                f"the plan did not act in layer {state.layer} where it was to be measured: "
                f"{reasons or 'its attention was not called'}"
            )
        found.rows[state.layer] = kernel.assignment


def refuse_without_effect(model: Any, act: Act) -> None:
    """Raises ValueError where a plan ran that leaves things out: not one prediction changed."""
    rows = {} if act.rows is None else act.rows
    if any(_omits(model, layer, row, act.tokens) for layer, row in rows.items()):
        raise ValueError(
            f"the plan did not act: {act.layers} layers of {type(model).__name__} ran it, but all "
            "predictions are those of the original model to the last bit, so nothing was measured"
        )


def _states(model: Any) -> list[LayerState]:
    found = (module.__dict__.get(ATTRIBUTE) for module in model.modules())
    return sorted((s for s in found if s is not None), key=lambda state: state.layer)


def _omits(model: Any, layer: int, row: tuple[Approximation, ...], tokens: int) -> bool:
    """Whether any head leaves out a part that must show in the output."""
    site = attention_sites(model)[layer]
    shape = AttentionShape(1, site.heads, site.kv_heads, tokens, tokens, site.head_dim)
    return any(a.density(shape) < WHOLE for a in set(row))
