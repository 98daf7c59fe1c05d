"""Which cache the forward pass of this thread fills under which plan.

Attention modules do not hand their cache to the attention function. The first of them notes it when
it is called; the end of the forward pass takes the note away. Threads have their own notes.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Running:
    """One forward pass under a plan that stores less than the whole KV cache.

    Attributes:
        plan: the `ModelState` of the model.
        cache: what is filled, None for nothing; a note must not keep it alive.
        outer: the forward pass of another model that this one is a part of.
        is_checked: the masks of this forward pass suit what every layer has stored.
    """

    plan: object
    cache: weakref.ref[Any] | None
    outer: Running | None = None
    is_checked: bool = False

    @property
    def layers(self) -> list[Any]:
        """The layers of the cache; none where there is no cache."""
        cache = None if self.cache is None else self.cache()
        return [] if cache is None else cache.layers

    def layer(self, index: int) -> Any:
        """One layer of the cache; None where there is none."""
        layers = self.layers
        return layers[index] if index < len(layers) else None


RUNNING: ContextVar[Running | None] = ContextVar("running", default=None)
