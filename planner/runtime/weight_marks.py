"""Whether the weights of a layer are still those that a plan was checked against."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnplan.models.adapters import is_adapted

_SAMPLES = 1024

Place = tuple[str, str]
"""Kind of device and dtype, such as ('cuda', 'bfloat16')."""


def place_of(module: nn.Module) -> Place | None:
    """Where a module computes, autocast included; None where it has no floating-point weights."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            kind, dtype = parameter.device.type, parameter.dtype
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
            return kind, str(dtype).removeprefix("torch.")
    return None


@dataclass(frozen=True)
class WeightMark:
    """What is remembered of a module's weights.

    Attributes:
        owner: id of the module; a copy has another, and starts anew.
        place: device and dtype of every parameter; a change of these is another matter.
        stamps: address and version of every parameter, which writing changes. Writing through
            `.data` does not, which is how adapters are merged.
        sample: digest of up to 1,024 elements of every parameter.
        is_adapted: adapters are on top of them.
    """

    owner: int
    place: tuple[tuple[torch.device, torch.dtype], ...]
    stamps: tuple[tuple[int, int], ...]
    sample: bytes
    is_adapted: bool

    @classmethod
    def of(cls, module: nn.Module) -> WeightMark:
        """What there is to remember now."""
        parameters = _parameters(module)
        place = tuple((p.device, p.dtype) for p in parameters)
        stamps, sample = _stamps(parameters), _sample(parameters)
        return cls(id(module), place, stamps, sample, is_adapted(module))

    def is_current(self, module: nn.Module, *, thorough: bool) -> bool:
        """Whether nothing was written since, by the stamps, or by the sample too if `thorough`."""
        parameters = _parameters(module)
        if self.stamps != _stamps(parameters):
            return False
        return not thorough or self.sample == _sample(parameters)

    def is_same(self, other: WeightMark) -> bool:
        """Whether a later mark is of the same weights, as far as the two can be compared."""
        if self.owner != other.owner:
            return True
        if other.is_adapted and not self.is_adapted:
            return False
        return self.place != other.place or self.sample == other.sample


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """All there are; `module.parameters()` takes five times as long to leave out repeats."""
    found = [p for p in module._parameters.values() if p is not None]
    for child in module._modules.values():
        if child is not None:
            found += _parameters(child)
    return found


def _stamps(parameters: list[nn.Parameter]) -> tuple[tuple[int, int], ...]:
    # Tensors made in inference mode have no version.
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)


@torch.no_grad()
def _sample(parameters: list[nn.Parameter]) -> bytes:
    parts = [_evenly(p).float() for p in parameters if p.numel() and not p.is_meta]
    if not parts:
        return b""
    return hashlib.blake2b(torch.cat(parts).cpu().numpy().tobytes(), digest_size=16).digest()


def _evenly(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _SAMPLES)]
