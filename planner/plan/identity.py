"""Which model a plan was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attnplan.kernels.operands.shape import AttentionShape
from attnplan.profiles.records import magnitudes
from attnplan.profiles.records.magnitudes import Magnitudes


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a plan was made for.

    Attributes:
        name: what the user called it; for people, never compared.
        architecture: class of the model, such as LlamaForCausalLM.
        layers: attention layers, numbered in the order in which a forward pass calls them.
        heads, kv_heads, head_dim: sizes of every attention layer.
        rope: rotary parameters of the configuration; empty when there are none.
        max_context: longest text the model was made for, or None when it does not say.
        weights: digest of the signs of the weights, independent of their floating-point type.
        magnitudes: how large they are, compared with a tolerance; None in older plans.
    """

    name: str
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]
    max_context: int | None
    weights: str
    magnitudes: Magnitudes | None = field(default=None, compare=False)

    def prefill_shape(self, length: int) -> AttentionShape:
        """Sizes of a layer's attention while one text of `length` tokens is read."""
        return AttentionShape(1, self.heads, self.kv_heads, length, length, self.head_dim)

    @property
    def fingerprint(self) -> str:
        """A digest of everything but the name and the magnitudes: a digest knows no tolerance."""
        left_out = ("name", "magnitudes")
        told = {key: value for key, value in asdict(self).items() if key not in left_out}
        return "sha256:" + hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()

    def difference(self, other: ModelIdentity) -> str | None:
        """How `other` is another model, in words, or None when it is the same.

        Names and context limits may differ, and so may rotary parameters that only one side spells
        out: library versions write different defaults.
        """
        for name in ("architecture", "layers", "heads", "kv_heads", "head_dim", "weights"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {_short(mine)}, not {_short(theirs)}"
        for key in self.rope.keys() & other.rope.keys():
            if self.rope[key] != other.rope[key]:
                return f"rope {key} is {self.rope[key]}, not {other.rope[key]}"
        return magnitudes.difference(self.magnitudes, other.magnitudes)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:20] + "..."
