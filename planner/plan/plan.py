"""Plan: what every head runs, for which prefill lengths, and the evidence that it is good enough.

A plan is one YAML file, short enough to review, and, if a method was fitted on calibration data,
one .safetensors file beside it:

    attnplan: 1
    model: {name: ..., architecture: LlamaForCausalLM, layers: 30, heads: 9, kv_heads: 3, ...}
    target: {device: ..., kind: cpu, dtype: float32, engine: cpu, versions: {...}, batch: [1, 1]}
    methods:
      dense: {near: {name: dense}}
      window: {near: {name: window, window: 128, sinks: 4}}
      recent: {keep: {name: recent, window: 256, sinks: 4}}
    phases:
      prefill:
        - context: [1024, 2048]
          layers:
            0: {window: 0-4, dense: 5-8}
            1-29: dense
      decode:
        - context: [1, 2048]
          layers:
            0-28: {full: 0, recent: 1-2}
            29: full
    data: {file: plan.safetensors, digest: "sha256:..."}
    evidence: {...}

Outside the listed contexts every head is dense in prefill. The low end of a context is the measured
length from which the plan is faster than dense. Decoding lists what each kv head keeps of its past,
whatever the length; `decode: dense` keeps everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.plan import file as plan_file
from attnplan.plan import output as plan_output
from attnplan.plan.fitted import check_fitted
from attnplan.plan.identity import ModelIdentity
from attnplan.plan.located_yaml import PlanError, plain
from attnplan.plan.sections import (
    Assignment,
    DecodeSection,
    Section,
    Target,
    check_assignment,
    check_keepers,
)
from attnplan.profiles.store.output_files import replace_files

__all__ = [
    "Assignment",
    "DecodeSection",
    "Fitted",
    "ModelIdentity",
    "Plan",
    "PlanError",
    "Section",
    "Target",
]

Fitted = Mapping[int, Mapping[str, Tensor]]
"""Layer to what its methods were fitted with: 'method.tensor' to a tensor."""


@dataclass(frozen=True)
class Plan:
    """An approximation for every head, per phase and context range, with its evidence.

    Attributes:
        model: the model it was made for.
        target: the device it was made for.
        methods: short names of the approximations.
        prefill: sections with disjoint contexts, ascending; empty when all is dense.
        evidence: calibration, predictions, measurements, baselines: plain nested values.
        fitted: what methods were fitted with, per layer.
        digest: of the fitted data; None when there is none.
        decode: what is kept while decoding: one section, or empty to keep everything.
    """

    model: ModelIdentity
    target: Target
    methods: Mapping[str, Approximation]
    prefill: tuple[Section, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fitted: Fitted = field(default_factory=dict, compare=False, repr=False)
    digest: str | None = None
    decode: tuple[DecodeSection, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "evidence", plain(dict(self.evidence), "evidence"))
        if self.fitted and self.digest is None:
            object.__setattr__(self, "digest", plan_output.digest_of(_packed(self.fitted)))
        known = set(self.methods.values())
        for approximation in known:
            told = approximation.near.misfit(self.model.head_dim)
            if told is not None:
                raise PlanError(f"{catalog.key(approximation)}: {told}")
        previous = 0
        for section in self.prefill:
            if section.context[0] <= previous:
                raise PlanError(
                    f"prefill contexts must ascend without overlap, got {section.context[0]} after "
                    f"{previous}"
                )
            previous = section.context[1]
            check_assignment(section.layers, self.model)
            for approximation in {a for row in section.layers for a in row} - known:
                raise PlanError(f"{catalog.key(approximation)} has no name among the methods")
        if len(self.decode) > 1:
            raise PlanError(f"decode takes one section, got {len(self.decode)}")
        for kept in self.decode:
            check_keepers(kept.layers, self.model)

    @property
    def keepers(self) -> tuple[tuple[Keeper, ...], ...]:
        """For each layer, what each kv head keeps while decoding; empty to keep everything."""
        return self.decode[0].layers if self.decode else ()

    @classmethod
    def from_assignment(
        cls,
        assignment: Sequence[Sequence[Approximation]],
        *,
        model: ModelIdentity,
        target: Target,
        context: tuple[int, int],
        evidence: Mapping[str, Any] | None = None,
        fitted: Fitted | None = None,
    ) -> Self:
        """A plan with one prefill section; its methods get names such as `window-128`."""
        layers = tuple(tuple(row) for row in assignment)
        names = method_names(a for row in layers for a in row)
        used = _used(layers, fitted or {}, model)
        return cls(model, target, names, (Section(context, layers),), evidence or {}, used)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The plan of a YAML file.

        Raises:
            PlanError: the file, or its fitted data, is missing, broken or changed; the message
                names the place.
        """
        return plan_file.parse(Path(path), cls)

    def save(self, path: str | Path, *, fitted: Fitted | None = None) -> None:
        """Write the plan, replacing the file in one step, and its fitted data beside it.

        Args:
            path: the YAML file; fitted data goes beside it, see `plan_output.data_file`.
            fitted: replaces the plan's own fitted data.

        Raises:
            PlanError: a method needs fitted data that is not there, or another file is in the way.
        """
        path = Path(path)
        plan = self
        if fitted is not None:
            plan = replace(self, fitted=fitted, digest=None)
        plan.check_fitted()
        if path.suffix == ".safetensors":
            raise PlanError(f"{path}: a plan is YAML; .safetensors is the name of its fitted data")
        plan_output.check_plan(path, fitted=bool(plan.fitted))
        data = plan_output.data_file(path)
        contents: dict[Path, bytes] = {}
        if not plan.fitted:
            plan = replace(plan, digest=None)
        else:
            contents[data] = _packed(plan.fitted)
            plan = replace(plan, digest=plan_output.digest_of(contents[data]))
        contents[path] = plan_file.spell(plan, data.name).encode()
        outdated = not plan.fitted and plan_output.owns_data(path)
        replace_files(contents)
        if outdated:
            data.unlink()

    def section(self, length: int) -> Section | None:
        """The section for a prefill of `length` tokens, None where all is dense."""
        for section in self.prefill:
            if section.context[0] <= length <= section.context[1]:
                return section
        return None

    def kernels(self, context: int | tuple[int, int]) -> Assignment:
        """What every head of every layer runs at a length, or at all lengths of a range.

        Raises:
            PlanError: the plan changes inside the range.
        """
        low, high = (context, context) if isinstance(context, int) else context
        section = self.section(low)
        if section is None and not any(low < s.context[0] <= high for s in self.prefill):
            return ((catalog.DENSE,) * self.model.heads,) * self.model.layers
        if section is None or high > section.context[1]:
            raise PlanError(
                f"the plan changes between {low} and {high} tokens; ask for one section"
            )
        return section.layers

    def check_fitted(self) -> None:
        """Raises PlanError where a method needs fitted data that the plan does not have."""
        check_fitted(self)

    def summary(self) -> str:
        """One line for people: model, device, contexts and how many heads run what."""
        model, target = self.model, self.target
        parts = [f"{model.name} on {target.device} in {target.dtype}"]
        for section in self.prefill:
            names = {approximation: name for name, approximation in self.methods.items()}
            counts: dict[str, int] = {}
            for row in section.layers:
                for approximation in row:
                    counts[names[approximation]] = counts.get(names[approximation], 0) + 1
            told = sorted(counts.items(), key=lambda item: -item[1])
            shown = ", ".join(f"{name} in {count}" for name, count in told[:4])
            more = f", {len(told) - 4} more methods" if len(told) > 4 else ""
            low, high = section.context
            parts.append(f"prefill of {low} to {high} tokens: {shown}{more} (heads)")
        if not self.prefill:
            parts.append("prefill all dense")
        if self.decode:
            kept = [keeper for row in self.keepers for keeper in row]
            full = sum(keeper.limit is None for keeper in kept)
            parts.append(f"decoding keeps everything in {full} of {len(kept)} kv heads")
        return "; ".join(parts)


def method_names(approximations: Iterable[Approximation]) -> dict[str, Approximation]:
    """Short names: the method's, with the knobs in which the plan's uses of it differ."""
    by_name: dict[str, list[Approximation]] = {}
    for approximation in sorted(set(approximations), key=_order):
        by_name.setdefault(approximation.name, []).append(approximation)
    names: dict[str, Approximation] = {}
    for name, group in by_name.items():
        knobs = [_knobs(a) for a in group]
        differing = [k for k in knobs[0] if len({row[k] for row in knobs}) > 1]
        for approximation, row in zip(group, knobs, strict=True):
            names["-".join([name, *(str(row[k]) for k in differing)])] = approximation
    return names


def needed_data(approximation: Approximation, model: ModelIdentity) -> set[str]:
    """Names of the fitted tensors that an approximation reads."""
    parts = [approximation.near] + ([approximation.far] if approximation.far else [])
    return set().union(*(catalog.needed_names(model.head_dim, part) for part in parts))


def _knobs(approximation: Approximation) -> dict[str, Any]:
    """All of them, also those that a plan spells where they are not the default alone."""
    parts = {"near": approximation.near, "far": approximation.far}
    return {
        f"{side}.{knob}": value
        for side, part in parts.items()
        if part is not None
        for knob, value in asdict(part).items()  # type: ignore[call-overload]
    }


def _order(approximation: Approximation) -> tuple[Any, ...]:
    return not approximation.is_dense, approximation.name, *_knobs(approximation).values()


def _used(layers: Assignment, fitted: Fitted, model: ModelIdentity) -> dict[int, dict[str, Tensor]]:
    """The fitted tensors that some head reads."""
    needs = {a: needed_data(a, model) for row in layers for a in row} if fitted else {}
    used: dict[int, dict[str, Tensor]] = {}
    for layer, row in enumerate(layers):
        names = set().union(*(needs[a] for a in row)) if fitted else set()
        kept = {k: v for k, v in fitted.get(layer, {}).items() if k in names}
        if kept:
            used[layer] = kept
    return used


def _packed(fitted: Fitted) -> bytes:
    tensors = {
        f"{layer}.{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for layer, row in sorted(fitted.items())
        for name, tensor in sorted(row.items())
    }
    return safetensors.torch.save(tensors)
