"""A plan to YAML text and back: the format of `plan.py`, with errors that name the place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.plan.identity import ModelIdentity
from attnplan.plan.located_yaml import (
    Entry,
    Flow,
    FlowList,
    PlanError,
    parse_ranges,
    plain,
    ranges,
    read,
    readable,
    write,
)
from attnplan.plan.sections import DecodeSection, Section, Target

if TYPE_CHECKING:
    from attnplan.plan.plan import Plan

VERSION = 1
MOST = {"layers": 1 << 12, "heads": 1 << 12, "kv_heads": 1 << 12, "head_dim": 1 << 10}
"""Of the sizes of a model."""
MOST_HEADS = 1 << 17
"""Of a model, all layers together."""

_Named = TypeVar("_Named", Approximation, Keeper)
_Plan = TypeVar("_Plan", bound="Plan")


def spell(plan: Plan, data_file: str) -> str:
    """The YAML text of a plan whose fitted data is called `data_file`."""
    model = {("context" if k == "max_context" else k): v for k, v in asdict(plan.model).items()}
    if plan.model.magnitudes is None:
        del model["magnitudes"]
    data: dict[str, Any] = {"attnplan": VERSION}
    data["model"] = readable(plain(model, "model"))
    data["target"] = readable(plain(asdict(plan.target), "target"))
    data["methods"] = {n: readable(catalog.to_dict(a)) for n, a in plan.methods.items()}
    data["methods"] = {n: Flow(d) for n, d in data["methods"].items()}
    kept = _keeper_names(plan)
    data["methods"] |= {n: Flow(readable(cache_catalog.to_dict(k))) for n, k in kept.items()}
    names: dict[Approximation | Keeper, str] = {k: n for n, k in kept.items()}
    for name, approximation in plan.methods.items():
        names.setdefault(approximation, name)
    sections = [
        {"context": FlowList(s.context), "layers": _spell_layers(s.layers, names)}
        for s in plan.prefill
    ]
    decode = [
        {"context": FlowList(s.context), "layers": _spell_layers(s.layers, names)}
        for s in plan.decode
    ]
    data["phases"] = {"prefill": sections or "dense", "decode": decode or "dense"}
    if plan.digest is not None:
        data["data"] = Flow(file=data_file, digest=plan.digest)
    data["evidence"] = readable(plan.evidence)
    return f"# attnplan: {plan.summary()}\n" + write(data)


def _spell_layers(
    layers: Sequence[tuple[_Named, ...]], names: Mapping[Any, str]
) -> dict[int | str, Any]:
    """Identical layers share a line."""
    same: dict[tuple[_Named, ...], list[int]] = {}
    for layer, row in enumerate(layers):
        same.setdefault(row, []).append(layer)
    spelled: dict[int | str, Any] = {}
    for row, numbers in same.items():
        heads: dict[str, list[int]] = {}
        for head, approximation in enumerate(row):
            heads.setdefault(names[approximation], []).append(head)
        only = len(heads) == 1
        line = next(iter(heads)) if only else Flow({n: ranges(h) for n, h in heads.items()})
        spelled[ranges(numbers)] = line
    return spelled


def _keeper_names(plan: Plan) -> dict[str, Keeper]:
    """Short names that no method of the plan has."""
    names: dict[str, Keeper] = {}
    for keeper in dict.fromkeys(keeper for row in plan.keepers for keeper in row):
        knobs = [str(value) for value in asdict(keeper).values()]  # type: ignore[call-overload]
        name = "-".join([keeper.name, *knobs])
        names[f"keep-{name}" if name in plan.methods else name] = keeper
    return names


def parse(path: Path, kind: type[_Plan]) -> _Plan:
    """The plan of a YAML file, its structure checked entry by entry.

    Args:
        path: the YAML file.
        kind: the class of plans, which reads its files with this module and is not known to it.

    Raises:
        PlanError: the message names the file, the place and the line.
    """
    top = read(path)
    if not isinstance(top.value, dict) or "attnplan" not in top.value:
        raise top.error("this is no plan: the key `attnplan: 1` is missing")
    version = top.value["attnplan"]
    if isinstance(version.value, bool) or version.value != VERSION:
        raise version.error(
            f"version {version.plain()!r} is unknown; this attnplan reads {VERSION}"
        )
    fields = top.fields(("attnplan", "model", "target", "methods", "phases"), ("data", "evidence"))
    model = _parse_model(fields["model"])
    named = {n: _parse_method(e, n, model) for n, e in fields["methods"].items()}
    methods = {n: m for n, m in named.items() if isinstance(m, Approximation)}
    kept = {n: m for n, m in named.items() if isinstance(m, Keeper)}
    phases = fields["phases"].fields(("prefill",), ("decode",))
    sections: list[Section] = []
    if phases["prefill"].value != "dense":
        for entry in phases["prefill"].entries():
            sections.append(_parse_section(entry, methods, model, sections))
    decode: list[DecodeSection] = []
    if "decode" in phases and phases["decode"].value != "dense":
        entries = phases["decode"].entries()
        if not entries:
            raise phases["decode"].error("lists nothing; write dense to keep everything")
        for entry in entries:
            if decode:
                raise entry.error("decode takes one section")
            context, rows = _parse_layers(entry, kept, model, model.kv_heads, "kv head")
            decode.append(DecodeSection(context, rows))
    evidence = fields.get("evidence")
    if evidence is not None and not isinstance(evidence.value, dict):
        raise evidence.error("must be a mapping")
    digest, fitted = _parse_data(fields.get("data"), path, model)
    target = _parse_target(fields["target"])
    told = {} if evidence is None else evidence.plain()
    try:
        plan = kind(model, target, methods, tuple(sections), told, fitted, digest, tuple(decode))
        plan.check_fitted()
    except PlanError as error:
        raise fields.get("data", top).error(str(error)) from None
    return plan


def _parse_model(entry: Entry) -> ModelIdentity:
    sizes = ("layers", "heads", "kv_heads", "head_dim")
    fields = entry.fields(
        ("name", "architecture", *sizes, "rope", "weights"), ("context", "magnitudes")
    )
    rope = dict(fields["rope"].items())
    limit, large = fields.get("context"), fields.get("magnitudes")
    counts = {size: fields[size].integer(1, MOST[size]) for size in sizes}
    if counts["heads"] % counts["kv_heads"]:
        raise fields["kv_heads"].error(
            f"must divide the {counts['heads']} heads, got {counts['kv_heads']}"
        )
    if counts["layers"] * counts["heads"] > MOST_HEADS:
        raise fields["layers"].error(
            f"no model has {counts['layers']} layers of {counts['heads']} heads"
        )
    return ModelIdentity(
        name=fields["name"].text(),
        architecture=fields["architecture"].text(),
        **counts,
        rope={key: value.plain() for key, value in rope.items()},
        max_context=None if limit is None or limit.value is None else limit.integer(1),
        weights=fields["weights"].text(),
        magnitudes=None if large is None else {str(k): v.number() for k, v in large.items()},
    )


def _parse_target(entry: Entry) -> Target:
    words = ("device", "kind", "dtype", "engine")
    fields = entry.fields((*words, "versions", "batch"))
    return Target(
        **{word: fields[word].text() for word in words},
        versions={str(key): value.text() for key, value in fields["versions"].items()},
        batch=fields["batch"].pair(1),
    )


def _parse_method(entry: Entry, name: Any, model: ModelIdentity) -> Approximation | Keeper:
    if not isinstance(name, str):
        raise entry.error(f"the name of a method must be text, got {name!r}; quote it")
    try:
        spelled = entry.plain()
        if isinstance(spelled, dict) and "keep" in spelled:
            return cache_catalog.from_dict(spelled)
        approximation = catalog.from_dict(spelled)
    except ValueError as error:
        raise entry.error(str(error)) from None
    told = approximation.near.misfit(model.head_dim)
    if told is not None:
        raise entry.error(f"{approximation.near.name}: {told}")
    return approximation


def _parse_section(
    entry: Entry,
    methods: Mapping[str, Approximation],
    model: ModelIdentity,
    before: Sequence[Section],
) -> Section:
    context, rows = _parse_layers(entry, methods, model, model.heads, "head")
    if before and context[0] <= before[-1].context[1]:
        raise entry.fields(("context", "layers"))["context"].error(
            f"starts at {context[0]}, but the section before it ends at {before[-1].context[1]}"
        )
    return Section(context, rows)


def _parse_layers(
    entry: Entry,
    methods: Mapping[str, _Named],
    model: ModelIdentity,
    heads: int,
    word: str,
) -> tuple[tuple[int, int], tuple[tuple[_Named, ...], ...]]:
    """The context of a section, and what each head of each layer has."""
    fields = entry.fields(("context", "layers"))
    context = fields["context"].pair(1)
    if model.max_context is not None and context[1] > model.max_context:
        raise fields["context"].error(
            f"{context[1]} tokens is longer than the model's context of {model.max_context}"
        )
    rows: dict[int, tuple[_Named, ...]] = {}
    for key, value in fields["layers"].items():
        row = _parse_row(value, methods, heads, word)
        for layer in _parse_ranges(value, key, model.layers, "layer"):
            if layer in rows:
                raise value.error(f"layer {layer} is listed twice")
            rows[layer] = row
    for layer in range(model.layers):
        if layer not in rows:
            raise fields["layers"].error(f"layer {layer} is missing")
    return context, tuple(rows[layer] for layer in range(model.layers))


def _parse_row(
    entry: Entry, methods: Mapping[str, _Named], heads: int, word: str
) -> tuple[_Named, ...]:
    if isinstance(entry.value, str):
        return (_named(entry, entry.value, methods),) * heads
    row: dict[int, _Named] = {}
    for name, value in entry.items():
        method = _named(entry, name, methods)
        for head in _parse_ranges(entry, value.plain(), heads, word):
            if head in row:
                raise entry.error(f"{word} {head} is listed twice")
            row[head] = method
    for head in range(heads):
        if head not in row:
            raise entry.error(f"{word} {head} is missing")
    return tuple(row[head] for head in range(heads))


def _named(entry: Entry, name: Any, methods: Mapping[str, _Named]) -> _Named:
    if name not in methods:
        raise entry.error(f"unknown method {name!r}; known here: {', '.join(methods)}")
    return methods[name]


def _parse_ranges(entry: Entry, value: Any, count: int, word: str) -> list[int]:
    try:
        return parse_ranges(value, count, word)
    except ValueError as error:
        raise entry.error(str(error)) from None


def _parse_data(
    entry: Entry | None, path: Path, model: ModelIdentity
) -> tuple[str | None, dict[int, dict[str, Tensor]]]:
    """The digest and content of the file of fitted data."""
    if entry is None:
        return None, {}
    fields = entry.fields(("file", "digest"))
    name, digest = fields["file"].text(), fields["digest"].text()
    if Path(name).name != name or not name.isprintable():
        raise fields["file"].error(f"must be a file beside the plan, got {name!r}")
    try:
        with (path.parent / name).open("rb") as file:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if found != digest:  # it may be any file, of any size
            raise fields["digest"].error(f"{name} has changed: its digest is {found}")
        content = (path.parent / name).read_bytes()
    except OSError:
        raise fields["file"].error(
            f"{name} is not beside the plan; its methods were fitted and need it"
        ) from None
    fitted: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in safetensors.torch.load(content).items():
            layer, _, tensor_name = key.partition(".")
            if not layer.isdecimal() or int(layer) >= model.layers:
                raise fields["file"].error(f"{name}: tensor {key!r} belongs to no layer")
            fitted.setdefault(int(layer), {})[tensor_name] = tensor
    except (SafetensorError, LookupError, TypeError, RuntimeError) as error:
        raise fields["file"].error(f"{name} is no safetensors file: {error}") from None
    return digest, fitted
