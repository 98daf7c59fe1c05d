"""Apply plans to models: patch, unpatch and load.

    with attnplan.applied(model, "plan.yaml"):
        model.generate(**inputs)

Importing this module also registers `attnplan` with transformers, so that
`from_pretrained(..., attn_implementation="attnplan")` works for a model directory that holds its
plan as `attnplan.yaml` (see attnplan.runtime.adoption).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper, is_whole
from attnplan.models.adapters import is_adapted, model_inside
from attnplan.models.attention_sites import attention_sites
from attnplan.models.load import identity, load_weights
from attnplan.plan.plan import Fitted, Plan, PlanError
from attnplan.runtime import proof
from attnplan.runtime.adoption import planned_afterwards
from attnplan.runtime.attention import (
    ADAPTED,
    ATTRIBUTE,
    CHANGED,
    ELSEWHERE,
    NAME,
    VERIFY,
    LayerState,
    ModelState,
    check_sliding,
)
from attnplan.runtime.following import Following, follow, unfollow
from attnplan.runtime.own_configurations import (
    GivenName,
    choose,
    chosen,
    join,
    separate,
    shared_choice,
)
from attnplan.runtime.saving import save_pretrained
from attnplan.runtime.weight_marks import place_of

Model = TypeVar("Model", bound=nn.Module)
"""A transformers model, or one in wrappers such as PeftModel, which is then planned inside."""


def load(
    model_id: str,
    plan: Plan | str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> PreTrainedModel:
    """A model that runs a plan.

    Args:
        model_id: a Hugging Face id, a local directory, a .gguf file, or `smollm2-135m`.
        plan: the plan or its file.
        dtype: of the model; by default the one that the plan was measured in.
        device: by default the kind of device that the plan was made for, if there is one here.
        force: see `patch`.
        trust_remote_code: run code that comes with the model.
        device_map: as in transformers, for models that need several devices.

    Raises:
        PlanError: the plan is broken or belongs to another model.
        ValueError: the model cannot be loaded.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    if device is None:
        there = plan.target.kind == "cuda" and torch.cuda.is_available()
        device = "cuda" if there else "cpu"
    with planned_afterwards():
        model = load_weights(
            model_id,
            dtype=plan.target.dtype if dtype is None else dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
        )
    return patch(model, plan, force=force)


def patch(model: Model, plan: Plan | str | Path, *, force: bool = False) -> Model:
    """Run `model` under `plan` from now on.

    All checks come before the first change. A model on another kind of device, or in another dtype,
    than the plan was measured with gets a warning and runs dense, and so do calls after such a
    change. Adapters, and weights that change later, are told of once: the plan was verified
    without them.

    Args:
        model: changed in place; of a wrapper such as PeftModel, the model inside.
        plan: the plan or its file.
        force: run the plan on another device or in another dtype too.

    Returns:
        The same model.

    Raises:
        PlanError: the plan is broken or belongs to another model.
        ValueError: attnplan cannot plan this model.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    inner = model_inside(model)
    found = identity(inner)
    difference = found.difference(plan.model)
    if difference is not None:
        raise PlanError(f"the plan is for {plan.model.name}, not for {found.name}: {difference}")
    plan.check_fitted()
    sections = [(section.context, section.layers) for section in plan.prefill]
    kept_context = plan.decode[0].context if plan.decode else (1, None)
    state = ModelState.of(sections, plan.fitted, found.layers, plan.keepers, kept_context)
    state.plan = plan
    here = (inner.device.type, str(inner.dtype).removeprefix("torch."))
    target = (plan.target.kind, plan.target.dtype)
    if not force:
        first = inner.get_submodule(attention_sites(inner)[0].name)
        # Attention may compute in another dtype than the model says, and does so where it is right.
        state.home = place_of(first) if here == target else target
    _apply(inner, state)
    if here != target and not force:
        state.warned.add(ELSEWHERE)
        warnings.warn(
            f"attnplan: the plan was made for {plan.target.kind} in {plan.target.dtype}, this "
            f"model is on {here[0]} in {here[1]}; dense attention runs instead, unless force=True",
            stacklevel=2,
        )
    if is_adapted(inner):
        state.warned.add(CHANGED)
        warnings.warn(f"attnplan: {ADAPTED}; {VERIFY}", stacklevel=2)
    return model


def patch_assignment(
    model: Model,
    layers: Sequence[Sequence[Approximation]],
    fitted: Fitted | None = None,
    *,
    context: tuple[int, int | None] = (1, None),
    keepers: Sequence[Sequence[Keeper]] = (),
) -> Model:
    """Run an assignment without a plan, as search and evaluation do.

    Args:
        model: changed in place; an earlier patch is replaced.
        layers: for each layer, for each head, its approximation.
        fitted: layer to what its methods were fitted with.
        context: first and last length of a prefill that runs it; None for no upper limit.
        keepers: for each layer, what each kv head keeps while decoding; empty to keep everything.

    Raises:
        PlanError: the assignment does not fit the model.
    """
    assignment = tuple(tuple(row) for row in layers)
    kept = tuple(tuple(row) for row in keepers)
    _apply(
        model_inside(model),
        ModelState.of([(context, assignment)], fitted or {}, len(assignment), kept),
    )
    return model


def unpatch(model: Model) -> Model:
    """Leave the model exactly as it was before it was patched; no effect on an unpatched one."""
    state = _state(model)
    if state is not None:
        _detach(model, state)
    return model


def _detach(model: nn.Module, state: ModelState) -> None:
    """Take everything away that a state changed in a model."""
    join(model, state.configurations)
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("save_pretrained", None)
    unfollow(model)


@contextmanager
def applied(model: Model, plan: Plan | str | Path, *, force: bool = False) -> Iterator[Model]:
    """Run `model` under `plan` inside the `with` block, and leave it as it was afterwards."""
    before = _state(model)
    names = [] if before is None else chosen(before.configurations)
    patch(model, plan, force=force)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            _attach(model_inside(model), before, names)


def patched_stats(model: nn.Module) -> dict[int, dict[str, int]]:
    """Layer to reason to calls: 'plan', or why dense attention ran (`REASONS` of `attention.py`).

    Raises:
        ValueError: the model is not patched.
    """
    return {layer: dict(counts) for layer, counts in enumerate(_patched(model).counts)}


def reset_stats(model: nn.Module) -> None:
    """Start counting again."""
    for counts in _patched(model).counts:
        counts.clear()


def _patched(model: nn.Module) -> ModelState:
    state = _state(model)
    if state is None:
        raise ValueError(f"this {type(model).__name__} is not patched")
    return state


def _state(model: nn.Module) -> ModelState | None:
    for module in model.modules():
        layer: LayerState | None = module.__dict__.get(ATTRIBUTE)
        if layer is not None:
            return layer.model
    return None


def _apply(model: PreTrainedModel, state: ModelState) -> None:
    """Check, prove by a few tokens that the model can run the plan, and only then change it."""
    _check_sizes(model, state)
    _check_keepers(model, state.keepers)
    sites = attention_sites(model)
    windows = {layer: site.sliding_window for layer, site in enumerate(sites)}
    check_sliding(state.contexts, state.kernels, windows)
    before = _state(model)
    names = [] if before is None else chosen(before.configurations)
    to_prove = _to_prove(state)
    if before is not None:
        state.configurations = before.configurations
        if to_prove <= before.proved and all(isinstance(name, GivenName) for name in names):
            state.proved = before.proved
            _attach(model, state, names)
            return
    with proof.quietly(model):
        try:
            records = _records(model, state, before)
            if before is None:
                state.configurations = separate(model, [site.name for site in sites], NAME)
            _prove(model, state, records)
            _attach(model, state, [GivenName(NAME)] * len(state.configurations))
        except BaseException:
            if before is not None:
                _attach(model, before, names)
            elif state.configurations:
                _detach(model, state)
            raise
    state.proved = to_prove | (frozenset() if before is None else before.proved)


def _to_prove(state: ModelState) -> frozenset[object]:
    """What has to be shown of a model before it runs a plan: its planned layers, its caches."""
    return frozenset({"reached", *_planned(state), *(["decode"] if state.keepers else [])})


def _planned(state: ModelState) -> set[int]:
    """The layers with heads that do not run dense at some length."""
    layers = range(len(state.counts))
    return {n for n in layers if not all(kernels[n].is_dense for kernels in state.kernels)}


def _records(
    model: PreTrainedModel, state: ModelState, before: ModelState | None
) -> list[proof.Record]:
    """What the model does as it was before it was patched.

    Raises:
        PlanError: its caches cannot store less, and the plan does.
    """
    sites = attention_sites(model)
    if before is not None:
        unfollow(model)
        choose(before.configurations, shared_choice(before.configurations))
    records = proof.reference(model, sites)
    if state.keepers:
        proof.check_cache(model, sites, state.keepers, records[0].cache)
    return records


def _prove(model: PreTrainedModel, state: ModelState, records: Sequence[proof.Record]) -> None:
    """Run the model under stand-ins for its plan, which must reach and change nothing.

    Raises:
        PlanError: a layer is not reached, or gives something else.
    """
    sites = attention_sites(model)
    planned = _planned(state)
    near = [n in planned and (site.sliding_window or 99) > 9 for n, site in enumerate(sites)]
    keepers = proof.keep_everything(state.keepers)
    trial = ModelState(((1, None),), (proof.stand_ins(near),), keepers)
    trial.configurations = state.configurations
    trial.counts = [Counter[str]() for _ in sites]
    _attach(model, trial, [GivenName(NAME)] * len(state.configurations))
    proof.check(model, sites, records, keeps=bool(keepers))
    for layer, called in enumerate(trial.counts):
        if not called:
            raise PlanError(
                f"layer {layer} of {type(model).__name__} did not call its planned attention"
            )


def _check_sizes(model: PreTrainedModel, state: ModelState) -> None:
    """Raises PlanError unless there is an approximation for every head of every layer."""
    sites = attention_sites(model)
    for kernels in state.kernels:
        if len(kernels) != len(sites):
            raise PlanError(f"plan has {len(kernels)} layers, the model has {len(sites)}")
        for layer, (kernel, site) in enumerate(zip(kernels, sites, strict=True)):
            heads = len(kernel.assignment)
            if heads != site.heads:
                raise PlanError(
                    f"layer {layer}: plan has {heads} heads, the model has {site.heads}"
                )


def _attach(model: PreTrainedModel, state: ModelState, names: Sequence[str | None]) -> None:
    """Let a model run under a state, with these names as its attention implementations."""
    sites = attention_sites(model)
    choose(state.configurations, names)
    for layer, site in enumerate(sites):
        block = None if state.plan is None else model.get_submodule(site.name.rpartition(".")[0])
        setattr(model.get_submodule(site.name), ATTRIBUTE, LayerState(state, layer, block))
    unfollow(model)
    model.__dict__["save_pretrained"] = partial(save_pretrained, model, state.plan)
    if state.keepers:
        modules: list[Any] = [model.get_submodule(site.name) for site in sites]
        layers = {
            int(module.layer_idx): (row, state.fitted.get(layer, {}))
            for layer, (module, row) in enumerate(zip(modules, state.keepers, strict=True))
            if sites[layer].sliding_window is None
        }
        follow(model, Following(state, layers), [site.name for site in sites])


def _check_keepers(model: PreTrainedModel, keepers: tuple[tuple[Keeper, ...], ...]) -> None:
    """Raises PlanError unless there is a keeper for every kv head of every layer."""
    sites = attention_sites(model)
    if not keepers:
        return
    if not getattr(model.config.get_text_config(), "use_cache", True):
        raise PlanError(f"{type(model).__name__} keeps no cache (use_cache is off); plan no decode")
    if len(keepers) != len(sites):
        raise PlanError(f"decode has {len(keepers)} layers, the model has {len(sites)}")
    for layer, (row, site) in enumerate(zip(keepers, sites, strict=True)):
        if len(row) != site.kv_heads:
            raise PlanError(
                f"layer {layer}: decode has {len(row)} kv heads, the model has {site.kv_heads}"
            )
        if site.sliding_window is not None and not all(map(is_whole, row)):
            raise PlanError(
                f"layer {layer} has a sliding window of {site.sliding_window} keys in the model "
                "itself; a plan must keep it full"
            )
        if not isinstance(getattr(model.get_submodule(site.name), "layer_idx", None), int):
            raise PlanError(f"{site.name} does not say which layer of a cache is its own")
