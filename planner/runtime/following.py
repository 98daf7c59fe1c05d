"""How the caches of a model come to follow its plan: what is hung on the model for that.

Forward passes make their cache on the way to the first attention module; generation makes it
before, and tells it whether tokens will be taken back. All hooks are objects that can be copied and
pickled with their model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from attnplan.runtime.attention import NAME, ModelState
from attnplan.runtime.cache import Kept, convert
from attnplan.runtime.running import RUNNING, Running

_PREPARE = "_prepare_cache_for_generation"


@dataclass(eq=False)
class Following:
    """What the caches of a model are to follow.

    Attributes:
        plan: as the model runs it.
        layers: index in the cache to keepers and calibrated data.
    """

    plan: ModelState
    layers: Mapping[int, Kept]

    def is_followed(self, module: Any) -> bool:
        """Whether an attention module runs the plan: nobody chose another implementation since.

        What runs otherwise reads its cache as it is.
        """
        config = getattr(module, "config", None)
        is_ours = getattr(config, "_attn_implementation", NAME) == NAME
        return is_ours and not self.plan.is_away(module)

    def convert(self, cache: Any) -> None:
        """See `cache.convert`."""
        convert(cache, self.layers, self.plan.kept_context)


@dataclass(eq=False)
class NoteCache:
    """Before the first attention module: convert the cache that it is given, and note it."""

    following: Following

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found = next((each for each in (*options.values(), *args) if isinstance(each, Cache)), None)
        if not self.following.is_followed(module):
            found = None
        self.following.convert(found)
        now = RUNNING.get()
        outer = now if now is not None and now.plan is not self.following.plan else None
        cache = None if found is None else weakref.ref(found)
        RUNNING.set(Running(self.following.plan, cache, outer))


@dataclass(eq=False)
class EndForward:
    """After a forward pass, also one that failed: there is no cache to be filled any more."""

    following: Following

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: Any, args: Any, output: Any) -> None:
        now = RUNNING.get()
        if now is not None and now.plan is self.following.plan:
            RUNNING.set(now.outer)


@dataclass(eq=False)
class PrepareCache:
    """In place of the model's method that makes the cache of `generate`.

    Attributes:
        model: the model.
        following: what its caches are to follow.
        first: name of the attention module that is called first.
        before: what was in this place; None for the method of its class.
    """

    model: PreTrainedModel
    following: Following
    first: str
    before: Any

    def __call__(self, config: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.before is not None:
            found = self.before(config, options, *args, **kwargs)
        else:
            method = getattr(type(self.model), _PREPARE)
            found = method(self.model, config, options, *args, **kwargs)
        for cache in [each for each in options.values() if isinstance(each, Cache)]:
            if self.following.is_followed(self.model.get_submodule(self.first)):
                self.following.convert(cache)
            if getattr(config, "is_assistant", False):
                cache.activate_past_recording()
        return found


def follow(model: PreTrainedModel, following: Following, sites: Iterable[str]) -> None:
    """Let every cache that the model is about to fill follow a plan.

    Args:
        model: changed in place.
        following: what to follow.
        sites: names of the attention modules, the one called first at the beginning.
    """
    names = list(sites)
    first = model.get_submodule(names[0])
    first.register_forward_pre_hook(NoteCache(following), with_kwargs=True)
    end = EndForward(following)
    for name in _around(names):
        model.get_submodule(name).register_forward_hook(end, always_call=True)
    own = model.__dict__
    own[_PREPARE] = PrepareCache(model, following, names[0], own.get(_PREPARE))


def unfollow(model: PreTrainedModel) -> None:
    """Take everything away that `follow` hung on the model; no effect where nothing was."""
    for module in model.modules():
        _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        _remove(module._forward_hooks, module._forward_hooks_always_called)
    prepare = model.__dict__.get(_PREPARE)
    if isinstance(prepare, PrepareCache):
        del model.__dict__[_PREPARE]
        if prepare.before is not None:
            model.__dict__[_PREPARE] = prepare.before


def _remove(hooks: dict[int, Any], flags: dict[int, bool]) -> None:
    for number in [n for n, hook in hooks.items() if isinstance(hook, NoteCache | EndForward)]:
        del hooks[number]
        flags.pop(number, None)


def _around(names: list[str]) -> list[str]:
    """The modules that all the attention modules are in, the model among them."""
    split = [name.split(".") for name in names]
    depth = 0
    while all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    return [".".join(split[0][:n]) for n in range(depth + 1)]
