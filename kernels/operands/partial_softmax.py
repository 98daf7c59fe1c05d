"""Shares of softmax sums that are computed apart, and how they come together.

The keys of a row may be split into disjoint parts. Each part knows its sum of weighted values n,
its sum of weights z, and a shift m that says how large both really are: n e^m and z e^m. Parts add
up after rescaling to a common shift, and n / z of the total is the output.

Source: the merge of partial softmaxes, Milakov and Gimelshein,
https://arxiv.org/abs/1805.02867, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnplan.kernels.native import features as native_features


@dataclass(frozen=True)
class Part:
    """What some keys contribute to every query row of some heads.

    Attributes:
        numerator: [batch, heads, rows, value_dim], e^-shift of the sum of weighted values.
        mass: [batch, heads, rows], e^-shift of the sum of weights. Estimates may be negative.
        shift: [batch, heads, rows].
        head: for each head, its index in the call.
    """

    numerator: Tensor
    mass: Tensor
    shift: Tensor
    head: tuple[int, ...]

    def __add__(self, other: Part) -> Part:
        """Both parts, as seen from the larger shift."""
        if self.head != other.head:
            raise ValueError(f"parts of different heads: {self.head} and {other.head}")
        shift = torch.maximum(self.shift, other.shift)
        finite = torch.where(shift.isfinite(), shift, 0.0)
        mine, yours = (self.shift - finite).exp(), (other.shift - finite).exp()
        return Part(
            self.numerator * mine[..., None] + other.numerator * yours[..., None],
            self.mass * mine + other.mass * yours,
            shift,
            self.head,
        )

    @property
    def usable(self) -> Tensor:
        """Rows [batch, heads, rows] whose mass is positive, and all of whose numbers are finite."""
        finite = self.mass.isfinite() & self.shift.isfinite()
        return finite & (self.mass > 0) & self.numerator.isfinite().all(-1)

    def merge(self, output: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
        """An engine's result for the other keys, with this part: the same two tensors, changed.

        A row that is not usable here keeps the engine's result; rows past `output` are ignored.

        Args:
            output: [batch, heads, rows, value_dim], of all heads of the call.
            log_mass: [batch, heads, rows].
        """
        if native_features.merges(self.numerator, output, log_mass):
            native_features.merge(*self._tensors, self.head, output, log_mass)
            return output, log_mass
        heads, rows = list(self.head), output.shape[2]
        numerator, mass, shift = (t[:, :, :rows] for t in self._tensors)
        part = Part(numerator, mass, shift, self.head)
        usable = part.usable
        near = output[:, heads].to(part.numerator.dtype)
        near_mass = log_mass[:, heads].to(part.mass.dtype)
        far_mass = torch.where(usable, part.mass, 1.0).log() + part.shift
        far_mass = torch.where(usable, far_mass, float("-inf"))
        total = torch.logaddexp(near_mass, far_mass)
        far = part.numerator * (part.shift - total).exp()[..., None]
        merged = near * (near_mass - total).exp()[..., None] + far
        output[:, heads] = torch.where(usable[..., None], merged, near).to(output.dtype)
        log_mass[:, heads] = torch.where(usable, total, near_mass).to(log_mass.dtype)
        return output, log_mass

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.numerator, self.mass, self.shift


def stack_heads(parts: Sequence[Part]) -> Part:
    """One part of all the heads that `parts` name."""
    tensors = zip(*(p._tensors for p in parts), strict=True)
    numerator, mass, shift = (torch.cat(same, 1) for same in tensors)
    return Part(numerator, mass, shift, tuple(head for p in parts for head in p.head))
