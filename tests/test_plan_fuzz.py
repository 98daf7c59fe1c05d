"""Plan files damaged by chance: whatever is wrong is told with file, place and line."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from tests.test_plan import DENSE, MODEL, NARROW, TARGET, fit
from torch import Tensor

from attnplan.kernels import cache_catalog
from attnplan.kernels.cache_policies.clusters import Clusters
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.inputs import Moments
from attnplan.kernels.selectors.loki import Loki
from attnplan.kernels.selectors.window import Window
from attnplan.plan.output import data_file, digest_of
from attnplan.plan.plan import DecodeSection, Plan, PlanError, Section

RANDOM, FAR = Approximation(Loki(8, 64)), Approximation(Window(64), CentroidT())
MUTATIONS = 300


def whole() -> Plan:
    """A plan with everything that there is: two sections, fitted data, decoding, evidence."""
    rows = ((DENSE,) * 6, (RANDOM, NARROW, DENSE, FAR, FAR, DENSE), (NARROW,) * 6)
    methods = {"dense": DENSE, "loki": RANDOM, "window": NARROW, "far": FAR}
    mean, gram = torch.zeros(6, 16), torch.eye(16).repeat(6, 1, 1)
    kept = cache_catalog.fit(Moments(mean, gram, mean[:2], gram[:2]))
    data = {layer: of | kept for layer, of in fit().items()}
    return Plan(
        MODEL,
        TARGET,
        methods,
        (Section((128, 512), rows), Section((1024, 4096), rows[::-1])),
        {"kl": [0.1, 0.2], "searched": {"trials": 3, "by": "tpe"}},
        data,
        None,
        (DecodeSection((1, 4096), ((Clusters(64), Recent(128)),) * 3),),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    whole().save(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def assert_told(path: Path) -> bool:
    """Whether a plan loads; where it does not, the error is one sentence that says where."""
    began = time.perf_counter()
    try:
        Plan.load(path)
        return True
    except PlanError as error:
        told = str(error)
        assert told.startswith(f"{path}: "), told
        assert re.search(r" \(line \d+\)$", told), told
        assert "\n" not in told and len(told) < 1500, told
        return False
    finally:
        assert time.perf_counter() - began < 20, "it takes too long"


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 10**9, 10**30, -(10**30), 0.5, float("nan"), float("inf")),
    *("", "dense", "full", "window", "0-999999999", "0-2", "5-0", "²", "0, 0", "-", "a\nb", "\x85"),
    *([], [1], [[1, 2], [3]], [1, 2], [10**12, 10**15], {}, {"name": ["window"]}, {None: 1}),
    *({"near": {"name": {"a": 1}}}, {"keep": {"name": [1]}}, {"keep": 3}, {1: {2: {3: 4}}}),
)
TEXTS = (
    *('!!int ""', '!!float ""', "!!bool maybe", "!!null x", "!!set {a}", "!!binary =", "? a", "{"),
    *("[" * 400, "{a: " * 400, "- " * 400, "&a", "*a", "!x", "9" * 5000, "0x", "1:99", "1e999"),
    *("\t", "\x00", "\u2028", "---\n", "...\n", "%YAML 3\n", "|\n", ">\n", "'", '"', ": ", "#"),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a nested value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list) and value[key]:
            yield from places(value[key])


def of_structure(text: str, chance: random.Random) -> str:
    """A value is replaced, removed, or renamed."""
    top = yaml.safe_load(text)
    where, key = chance.choice(list(places(top)))
    what = chance.random()
    if what < 0.6:
        where[key] = chance.choice(VALUES)
    elif what < 0.75:
        del where[key]
    elif isinstance(where, dict):
        names = [v for v in VALUES if not isinstance(v, dict | list)]
        where[chance.choice(names)] = where.pop(key)
    else:
        where.append(where[key])
    return yaml.safe_dump(top, sort_keys=False, allow_unicode=True)


def of_text(text: str, chance: random.Random) -> str:
    """Characters or lines are removed, doubled, swapped, or replaced."""
    at, length = chance.randrange(len(text)), chance.choice((1, 1, 2, 5, 40))
    what = chance.randrange(4)
    if what == 0:
        return text[:at] + text[at + length :]
    if what == 1:
        return text[:at] + chance.choice(TEXTS) + text[at:]
    if what == 2:
        words = list(re.finditer(r"[^\s,:{}\[\]]+", text))
        word = chance.choice(words)
        return text[: word.start()] + chance.choice(TEXTS) + text[word.end() :]
    lines = text.splitlines(keepends=True)
    one, other = (chance.randrange(len(lines)) for _ in range(2))
    lines[one], lines[other] = lines[other], chance.choice((lines[one], lines[other], ""))
    return "".join(lines)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_plans_are_told_with_their_place(saved: Path, seed: int) -> None:
    chance, text = random.Random(seed), saved.read_text()
    loaded = 0
    for _ in range(MUTATIONS // 3):
        mutate = chance.choice((of_structure, of_text))
        damaged = mutate(text, chance)
        if chance.random() < 0.2:
            damaged = of_text(damaged, chance)
        saved.write_text(damaged, newline="")
        loaded += assert_told(saved)
    assert loaded < MUTATIONS / 6  # the mutations do damage


KNOWN: dict[str, tuple[str, str, str]] = {
    "a list as a name": ("{name: loki", "{name: [loki]", "methods.loki: unknown approximation"),
    "an integer of nothing": ("layers: 3", 'layers: !!int ""', "model.layers: ''"),
    "huge heads": ("head_dim: 16", "head_dim: 1000000", "model.head_dim: must be at most 1024"),
    "many layers": ("layers: 3", "layers: 1000000000", "model.layers: must be at most 4096"),
    "many heads": ("heads: 6", "heads: 4002", "layer"),
    "many of both": ("layers: 3\n  heads: 6", "layers: 4096\n  heads: 4096", "no model has 4096"),
    "a long range": ("loki: 0,", "loki: 0-999999999,", "head 999999999 does not exist"),
    "a range again and again": ("loki: 0,", "loki: '0-5, 0-5',", "lists a head twice"),
    "evidence of nothing": ("kl: [0.1, 0.2]", "kl: [.nan]", "evidence.kl[0]: NaN"),
    "heads of no group": ("kv_heads: 2", "kv_heads: 4", "model.kv_heads: must divide the 6 heads"),
    "a wide window": ("window: 64, sinks: 4}}", f"window: {10**30}, sinks: 4}}}}", "at most 16777"),
    "a rank above the heads": ("rank: 8", "rank: 17", "rank must be at most 16, the dimensions"),
    "true as a version": ("attnplan: 1", "attnplan: true", "attnplan: version True is unknown"),
    "a long context": ("[1024, 4096]", f"[1024, {10**30}]", "context[1]: must be at most"),
    "a name that is no text": ("  far: {near", "  7: {near", "must be text, got 7; quote it"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_out_of_range_is_refused(saved: Path, name: str) -> None:
    old, new, message = KNOWN[name]
    text = saved.read_text()
    assert old in text
    saved.write_text(text.replace(old, new, 1))
    with pytest.raises(PlanError) as raised:
        Plan.load(saved)
    assert message in str(raised.value)
    assert not assert_told(saved)


def test_a_file_of_many_megabytes_is_no_plan(saved: Path) -> None:
    with saved.open("ab") as file:
        file.truncate(1 << 25)
    with pytest.raises(PlanError, match="no plan has 33554432 bytes"):
        Plan.load(saved)


Edit = Callable[[dict[str, Tensor]], None]


def first(tensors: dict[str, Tensor], end: str = "loki.query_map") -> str:
    return next(name for name in sorted(tensors) if name.endswith(end) and name.startswith("1."))


def with_value(value: float) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors)].view(-1)[3] = value

    return edit


def with_tensor(make: Callable[[Tensor], Tensor], end: str = "loki.query_map") -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, end)] = make(tensors[first(tensors, end)]).contiguous()

    return edit


DATA: dict[str, tuple[Edit, str]] = {
    "not a number": (with_value(float("nan")), "must be finite numbers"),
    "infinite": (with_value(float("inf")), "must be finite numbers"),
    "whole numbers": (with_tensor(lambda t: t.long()), "must be floating-point numbers, got int64"),
    "empty": (with_tensor(lambda t: t[:0]), "must be finite numbers, got none"),
    "heads missing": (with_tensor(lambda t: t[:1]), r"of shape \[2, 16, 16\], got \[1, 16, 16\]"),
    "turned": (with_tensor(lambda t: t.flatten()), r"of shape \[2, 16, 16\], got \[512\]"),
    "small heads": (with_tensor(lambda t: t[..., :8]), r"got \[2, 16, 8\]"),
    "kept, of another shape": (with_tensor(lambda t: t[:1], "clusters.metric"), "clusters.metric"),
    "missing": (lambda tensors: tensors.__delitem__(first(tensors)), "does not have"),
    "of no layer": (lambda tensors: tensors.update({"x.y": torch.ones(1)}), "belongs to no layer"),
    "of a layer too far": (
        lambda tensors: tensors.update({f"{9**99}.y": torch.ones(1)}),
        "belongs to no layer",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_no_method_can_read_is_refused(saved: Path, name: str) -> None:
    edit, message = DATA[name]
    tensors = safetensors.torch.load_file(data_file(saved))
    edit(tensors)
    rewrite(saved, safetensors.torch.save(tensors))
    with pytest.raises(PlanError, match=message):
        Plan.load(saved)
    assert not assert_told(saved)


def test_data_that_is_no_safetensors_is_told(saved: Path) -> None:
    content, chance = data_file(saved).read_bytes(), random.Random(0)
    for _ in range(40):
        at = chance.randrange(len(content) // 3)
        damaged = content[:at] + chance.randbytes(chance.choice((0, 1, 8))) + content[at + 2 :]
        rewrite(saved, damaged)
        assert_told(saved)


def rewrite(plan: Path, content: bytes) -> None:
    """Other data beside a plan, which names its digest."""
    data_file(plan).write_bytes(content)
    plan.write_text(re.sub(r"sha256:[0-9a-f]+(?=['\"]?})", digest_of(content), plan.read_text()))
