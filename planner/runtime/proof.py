"""The proof, before a plan runs, that its attention can stand where the model's own stands.

The model runs a few tokens as it is: a prompt, several tokens more, one more, with padding and
without. It runs them again under stand-ins that must give the same: causal attention computed from
queries, keys and values alone, and caches that keep everything. Every attention module is given
what it was given before, so that what is compared is the rounding of one module, in any dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.cache_policy import Keeper, is_whole
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.models.attention_sites import AttentionSite
from attnplan.plan.plan import PlanError
from attnplan.runtime.cache import PlanLayer

STEPS = (6, 2, 1)
"""Tokens of the calls: a prompt, several more, one more."""
PADDING = 2
"""Tokens of padding before the second of two texts."""
EVERYTHING = Recent(window=4096)
"""A keeper that has a limit, which is never reached here."""


class StandIn(LayerKernel):
    """Causal attention of queries, keys and values; whatever else a model passes has no effect."""

    def __init__(self) -> None:
        super().__init__(())
        self.is_dense = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        start: tuple[int, ...] | None = None,
    ) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )


def stand_ins(planned: Sequence[bool]) -> tuple[LayerKernel, ...]:
    """For each layer a kernel that must give what dense attention gives."""
    return tuple(StandIn() if is_planned else LayerKernel(()) for is_planned in planned)


def keep_everything(kept: Sequence[Sequence[Keeper]]) -> tuple[tuple[Keeper, ...], ...]:
    """For each layer keepers that must give what a whole cache gives, stored as a plan's would."""
    return tuple((Full() if all(map(is_whole, row)) else EVERYTHING,) * len(row) for row in kept)


# unknown to older versions of transformers
_DUMMY: Any = getattr(cache_utils, "DummyLayer", ())
_MIXER: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", ())


@dataclass
class Record:
    """What the attention modules of some calls were given and gave.

    Attributes:
        given: for each call and module, the hidden states.
        made: what came out of them.
        cache: the cache of the last call, None where the model has none.
        before: a record whose hidden states the modules are given instead of their own.
    """

    given: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    made: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    cache: Cache | None = None
    before: Record | None = None
    call: int = 0


def reference(model: PreTrainedModel, sites: Sequence[AttentionSite]) -> list[Record]:
    """Run the model as it is.

    Raises:
        PlanError: it fails.
    """
    try:
        return [_run(model, sites, is_padded, None) for is_padded in (False, True)]
    except Exception as error:
        raise PlanError(
            f"{type(model).__name__} fails on a few tokens as it is, before any plan: {error}"
        ) from error


def check(
    model: PreTrainedModel,
    sites: Sequence[AttentionSite],
    records: Sequence[Record],
    *,
    keeps: bool,
) -> None:
    """Run the model under stand-ins, and compare.

    Args:
        model: under `stand_ins`, and `keep_everything` if `keeps`.
        sites: its attention modules.
        records: from `reference`.
        keeps: a plan stores less than the whole cache.

    Raises:
        PlanError: something else comes out.
    """
    for is_padded, record in zip((False, True), records, strict=True):
        try:
            found = _run(model, sites, is_padded, record)
        except ValueError as error:
            raise PlanError(str(error)) from error
        except Exception as error:
            raise PlanError(
                f"{type(model).__name__} fails under a plan that keeps everything: {error}"
            ) from error
        hidden = PADDING if is_padded else 0
        for layer, site in enumerate(sites):
            _compare(layer, site.name, record, found, hidden)
        if keeps:
            _check_stored(model, sites, found.cache)


def check_cache(
    model: PreTrainedModel,
    sites: Sequence[AttentionSite],
    keepers: Sequence[Sequence[Keeper]],
    cache: Cache | None,
) -> None:
    """Raises PlanError where a cache of the model is not one that can store less.

    Args:
        model, sites: the model and its attention modules.
        keepers: for each layer, what each kv head keeps.
        cache: what the model made for itself.
    """
    name = type(model).__name__
    if type(cache) is not DynamicCache:
        kind = "no cache" if cache is None else f"a {type(cache).__name__}"
        raise PlanError(f"{name} fills {kind}, which cannot store less; plan no decode")
    for layer, (site, row) in enumerate(zip(sites, keepers, strict=True)):
        own = _own(model, site, cache)
        if site.sliding_window is not None or type(own) is DynamicLayer:
            continue
        if type(own) is DynamicSlidingWindowLayer and all(map(is_whole, row)):
            continue
        if own is None:
            why = "reads keys that another layer stores"
        elif isinstance(own, _MIXER):
            why = f"shares its cache layer, a {type(own).__name__}, with another kind of state"
        else:
            why = f"has a {type(own).__name__} for a cache, which cannot store less"
        raise PlanError(f"layer {layer} of {name} {why}; plan no decode for this model")


def _own(model: PreTrainedModel, site: AttentionSite, cache: Cache) -> Any:
    """The layer of the cache that a module fills, None where it fills none."""
    index: Any = model.get_submodule(site.name).layer_idx
    own = cache.layers[index] if index < len(cache.layers) else None
    if own is None or isinstance(own, _DUMMY) or not own.is_initialized:
        return None
    return own


def _check_stored(
    model: PreTrainedModel, sites: Sequence[AttentionSite], cache: Cache | None
) -> None:
    """Raises PlanError unless every layer without a window of its own has stored all tokens."""
    for layer, site in enumerate(sites):
        own = None if cache is None else _own(model, site, cache)
        if site.sliding_window is None and (own is None or own.get_seq_length() != sum(STEPS)):
            raise PlanError(
                f"layer {layer} of {type(model).__name__} did not fill the cache of the plan; plan "
                "no decode for this model"
            )
        if site.sliding_window is None and type(own) not in (PlanLayer, DynamicSlidingWindowLayer):
            raise PlanError(
                f"layer {layer} of {type(model).__name__} is not given its cache in a way that "
                "attnplan can see; plan no decode for this model"
            )


def _compare(layer: int, name: str, record: Record, found: Record, hidden: int) -> None:
    """Raises PlanError where a module gave something else."""
    for (call, module), expected in record.made.items():
        if module != name:
            continue
        actual = found.made.get((call, module))
        if actual is None or actual.shape != expected.shape:
            raise PlanError(f"layer {layer} ({name}) runs otherwise under a plan")
        expected, actual = expected.double(), actual.double()
        if hidden and call == 0:
            expected[-1, :hidden] = actual[-1, :hidden] = 0
        error, size = (expected - actual).abs().max(), expected.abs().max()
        tolerance = max(1e-3, 8 * torch.finfo(record.made[call, module].dtype).eps)
        if not error <= tolerance * size:
            raise PlanError(
                f"layer {layer} ({name}) computes more than causal attention of its queries, keys "
                f"and values: planned attention differs by {float(error):.2g} of {float(size):.2g} "
                f"{'on a prompt' if call == 0 else 'while decoding'}, where nothing is left out"
            )


def _run(
    model: PreTrainedModel,
    sites: Sequence[AttentionSite],
    is_padded: bool,
    before: Record | None,
) -> Record:
    """Some tokens in `STEPS`, one text or two."""
    table = model.get_input_embeddings().weight
    batch, total = 1 + is_padded, sum(STEPS)
    size = table.shape[0]
    ids = size // 4 + 7 * torch.arange(batch * total, device=table.device) % max(size // 2, 1)
    ids = ids.view(batch, total)
    mask = torch.ones_like(ids)
    mask[1:, :PADDING] = 0
    record = Record(before=before)
    accepted = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in accepted else "past_key_values"  # renamed in 5.24
    caches = bool(getattr(model.config.get_text_config(), "use_cache", True))
    with _recording(model, sites, record):
        first = 0
        for tokens in STEPS if caches else STEPS[:1]:
            given: dict[str, Any] = {"input_ids": ids[:, first : first + tokens]}
            if is_padded:
                given["attention_mask"] = mask[:, : first + tokens]
            if record.cache is not None:
                given[name] = record.cache
            output = model(**given, use_cache=caches)
            caching = [each for each in output.values() if isinstance(each, Cache)]
            record.call += 1
            first += tokens
            if not caching:
                break
            record.cache = caching[0]
    return record


@contextmanager
def _recording(
    model: PreTrainedModel, sites: Sequence[AttentionSite], record: Record
) -> Iterator[None]:
    """Take notes of every attention module inside the `with` block."""
    handles = []
    for site in sites:
        module = model.get_submodule(site.name)
        notes = _Notes(site.name, record)
        handles.append(module.register_forward_pre_hook(notes.before, with_kwargs=True))
        handles.append(module.register_forward_hook(notes.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Notes:
    """Hooks of one module."""

    name: str
    record: Record

    def before(
        self, module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note the hidden states, or put those of the earlier record in their place."""
        place = (self.record.call, self.name)
        named = "hidden_states" in options
        if not named and not args:
            return None
        own = options["hidden_states"] if named else args[0]
        self.record.given[place] = own.detach().clone()
        earlier = None if self.record.before is None else self.record.before.given.get(place)
        if earlier is None or earlier.shape != own.shape:
            return None
        if named:
            return args, {**options, "hidden_states": earlier}
        return (earlier, *args[1:]), dict(options)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note what came out."""
        made = output[0] if isinstance(output, tuple) else output
        self.record.made[self.record.call, self.name] = made.detach().clone()


@contextmanager
def quietly(model: PreTrainedModel) -> Iterator[None]:
    """Run a model without a trace: no gradients, no dropout, random numbers as they were."""
    training = [module for module in model.modules() if module.training]
    places = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng(devices=sorted(places)), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
