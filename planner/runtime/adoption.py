"""Plans by name: `from_pretrained(..., attn_implementation="attnplan")` is `attnplan.patch`.

An attention module does not know its model, and transformers has no call-back for a loaded model.
So torch tells us when a model gets its parts: one whose configuration says `attnplan` is made to
wait. The wait ends inside `from_pretrained`, when the weights are there and transformers reads the
generation settings of the model, from the same place as the plan; or, where it does not get that
far with the whole model in memory (several devices, quantization, .gguf files, `from_config`), at
the first forward pass, before anything is computed. A model that is there already and is given the
name by `set_attn_implementation` is found, with its plan, by its first attention call.

The plan is the file that `config.attnplan_plan` names, or `attnplan.yaml`, in the folder or
repository of the model; a name that is not there may be a path of its own.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel
from transformers.utils import cached_file

from attnplan.models.attention_sites import implementations
from attnplan.plan.located_yaml import read
from attnplan.plan.plan import Plan, PlanError
from attnplan.runtime.attention import NAME, refuse_tracing
from attnplan.runtime.saving import NAMED_PLAN, PLAN_FILE

_WAITING = "_attnplan_waiting"
_LOADED = "adjust_generation_fn"
_QUIET: ContextVar[bool] = ContextVar("a plan is applied afterwards", default=False)
_ONE_AT_A_TIME = threading.RLock()


@dataclass
class _Waiting:
    """A model without its plan.

    Attributes:
        is_asked: the user named the implementation; otherwise the folder merely has a plan.
        hook: calls us before the first forward pass.
        plan: where the plan was found, if it was looked for.
    """

    is_asked: bool
    hook: Any = None
    plan: Path | None = None


@contextmanager
def planned_afterwards() -> Iterator[None]:
    """No word about plans that lie beside a model which is loaded inside the `with` block."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def adopt_around(module: nn.Module) -> None:
    """Patch the model of an attention module with the plan that lies beside it.

    Raises:
        PlanError: no plan, one that is not for this model, or one that stores less than the whole
            cache, which this forward pass has already made.
    """
    with _ONE_AT_A_TIME:
        model = _model_of(module)
        plan = _find(model, model.config.name_or_path, {})
        if Plan.load(plan).decode:
            raise PlanError(
                f"{plan} stores less than the whole KV cache, and the cache of this call is made: "
                "use attnplan.patch(model, plan) instead of set_attn_implementation"
            )
        _patch(model, plan)


def _model_of(module: nn.Module) -> PreTrainedModel:
    """The outermost transformers model that a module is in."""
    found = [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), PreTrainedModel)
        and any(part is module for part in candidate.modules())
    ]
    if not found:
        raise PlanError(
            f"a {type(module).__name__} on its own has no plan: use attnplan.patch on a model"
        )
    return max(found, key=lambda candidate: sum(1 for _ in candidate.modules()))


def _notice(module: nn.Module, name: str, part: nn.Module | None) -> None:
    """torch calls this whenever a module becomes a part of another."""
    if not isinstance(module, PreTrainedModel):
        return
    inner = part.__dict__.get(_WAITING) if isinstance(part, PreTrainedModel) else None
    if inner is not None:
        _stop_waiting(part)
    is_asked = _names_us(module) or (inner is not None and inner.is_asked)
    has_plan = not _QUIET.get() and getattr(module.config, NAMED_PLAN, None) is not None
    known = module.__dict__.get(_WAITING)
    if (is_asked or has_plan) and (known is None or is_asked > known.is_asked):
        if known is not None:
            _stop_waiting(module)
        _wait(module, is_asked)


def _names_us(model: PreTrainedModel) -> bool:
    implementation = getattr(model.config, "_attn_implementation_internal", None)
    return type(implementation) is str and implementation == NAME


def _wait(model: Any, is_asked: bool) -> None:
    hook = model.register_forward_pre_hook(_before_first_call) if is_asked else None
    model.__dict__[_WAITING] = _Waiting(is_asked, hook)
    model.__dict__[_LOADED] = partial(_loaded, model)


def _stop_waiting(model: Any) -> None:
    waiting: _Waiting = model.__dict__.pop(_WAITING)
    model.__dict__.pop(_LOADED, None)
    if waiting.hook is not None:
        waiting.hook.remove()


def _loaded(model: Any, *args: Any, subfolder: str = "", **options: Any) -> None:
    """What `from_pretrained` calls in place of `adjust_generation_fn`, with the same arguments."""
    model.__dict__.pop(_LOADED)
    model.adjust_generation_fn(*args, subfolder=subfolder, **options)
    name = args[3]
    kept = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
    place = {key: options[key] for key in kept if key in options} | {"subfolder": subfolder}
    waiting: _Waiting = model.__dict__[_WAITING]
    if not waiting.is_asked:
        _stop_waiting(model)
        warnings.warn(
            f"attnplan: {name} has a plan and is loaded without it, so dense attention runs; load "
            f'it with attn_implementation="{NAME}" or attnplan.load',
            stacklevel=4,
        )
        return
    waiting.plan = _find(model, name, place)
    parameters = list(model.parameters())
    is_whole = len({p.device for p in parameters}) == 1 and not parameters[0].is_meta
    if is_whole and getattr(model.config, "quantization_config", None) is None:
        _adopt(model)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_first_call(model: Any, args: Any) -> None:
    refuse_tracing()
    with _ONE_AT_A_TIME:
        if _WAITING in model.__dict__:
            _adopt(model)


def _adopt(model: Any) -> None:
    """Patch a waiting model; it goes on waiting where that is refused.

    The hook stays until the end, so that calls from other threads wait too.
    """
    waiting: _Waiting = model.__dict__[_WAITING]
    plan = waiting.plan or _find(model, model.config.name_or_path, {})
    del model.__dict__[_WAITING]
    model.__dict__.pop(_LOADED, None)
    try:
        _patch(model, plan)
    except BaseException:
        model.__dict__[_WAITING] = waiting
        raise
    waiting.hook.remove()


def _patch(model: PreTrainedModel, plan: Path) -> None:
    """`attnplan.patch`, on a model that is dense without it."""
    from attnplan.runtime.patch import patch

    before = implementations(model)
    dense = model.get_correct_attn_implementation(None)
    try:
        for config, implementation in before:
            if implementation == NAME:
                config._attn_implementation_internal = dense
        patch(model, plan)
    except BaseException as error:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        if isinstance(error, PlanError):
            raise PlanError(f"{plan}: {error}") from None
        raise


def _find(model: PreTrainedModel, name: str | Path, place: dict[str, Any]) -> Path:
    """The plan of a model, and its data beside it, from a folder or from the hub.

    Args:
        name: folder or repository that the model was loaded from.
        place: where in there, as transformers' `cached_file` takes it.

    Raises:
        PlanError: there is none.
    """
    named = getattr(model.config, NAMED_PLAN, None) or PLAN_FILE
    found = _fetch(name, str(named), place)
    if found is None and Path(named).is_file() and named != PLAN_FILE:
        return Path(named)
    if found is None:
        folder = Path(str(name)) / (place.get("subfolder") or "")
        raise PlanError(
            f"there is no plan at {folder / named}: put {PLAN_FILE} into the model directory, set "
            f"config.{NAMED_PLAN}, or use attnplan.load"
        )
    top = read(found).value
    data = top.get("data") if isinstance(top, dict) else None
    if data is not None and isinstance(data.value, dict) and "file" in data.value:
        _fetch(name, str(data.value["file"].value), place)
    return found


def _fetch(name: str | Path, file: str, place: dict[str, Any]) -> Path | None:
    if not str(name):
        return None
    try:
        found = cached_file(str(name), file, **place)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


register_module_module_registration_hook(_notice)
