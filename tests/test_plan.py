"""Plans survive their files, and a broken file is told with its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnplan.kernels import catalog
from attnplan.kernels.compressors.centroid_t import CentroidT
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.inputs import Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.window import Window
from attnplan.plan.located_yaml import parse_ranges, ranges
from attnplan.plan.plan import ModelIdentity, Plan, PlanError, Section, Target, needed_data

LAYERS, HEADS, HEAD_DIM = 3, 6, 16
MODEL = ModelIdentity(
    name="tiny",
    architecture="LlamaForCausalLM",
    layers=LAYERS,
    heads=HEADS,
    kv_heads=2,
    head_dim=HEAD_DIM,
    rope={"rope_type": "default", "rope_theta": 10000.0},
    max_context=8192,
    weights="sha256:" + "0" * 64,
)
TARGET = Target("some CPU", "cpu", "float32", "cpu", {"torch": "2.13.0"}, (1, 2))
SHAPE = AttentionShape(1, HEADS, 2, 4096, 4096, HEAD_DIM)
CHOICES = list(catalog.choices(SHAPE))
DENSE, NARROW, WIDE = catalog.DENSE, Approximation(Window(64)), Approximation(Window(128))
FITTED = Approximation(Window(64), CentroidT())
ROWS = [[DENSE] * 6, [NARROW, NARROW, DENSE, WIDE, DENSE, DENSE], [DENSE] * 6]


def fit(layers: range = range(LAYERS)) -> dict[int, dict[str, Tensor]]:
    """What every method of the catalog fits, on white noise."""

    def gram(heads: int) -> Tensor:
        return torch.eye(HEAD_DIM).repeat(heads, 1, 1)

    moments = Moments(torch.zeros(HEADS, HEAD_DIM), gram(HEADS), torch.zeros(2, HEAD_DIM), gram(2))
    data: dict[str, Tensor] = {}
    for method in (*catalog.NEAR.values(), *catalog.FAR.values()):
        data |= method.fit(moments)
    return {layer: data for layer in layers}


def plan(rows: list[list[Approximation]] = ROWS, **options: Any) -> Plan:
    options = {"model": MODEL, "target": TARGET, "context": (512, 2048), **options}
    return Plan.from_assignment(rows, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    plan().save(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
)
evidence = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.lists(st.sampled_from(CHOICES), min_size=HEADS, max_size=HEADS),
        min_size=LAYERS,
        max_size=LAYERS,
    ),
    evidence=evidence,
)
@example(
    rows=ROWS, evidence={"\x85": None, "a\u2028b": "\u2029", "c": ["\ufeff", "d\x85", "\x7f\x00"]}
)
def test_every_plan_survives_its_file(
    tmp_path: Path, rows: list[list[Approximation]], evidence: dict[str, Any]
) -> None:
    original = plan(rows, evidence=evidence, fitted=fit())
    original.save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert loaded == original
    assert loaded.kernels((512, 2048)) == tuple(map(tuple, rows))
    for layer, data in original.fitted.items():
        assert data.keys() == loaded.fitted[layer].keys()
        assert all(torch.equal(data[name], loaded.fitted[layer][name]) for name in data)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_head_ranges_survive(numbers: set[int]) -> None:
    assert parse_ranges(ranges(sorted(numbers)), 41, "head") == sorted(numbers)


def test_a_plan_file_is_short_enough_to_review(saved: Path) -> None:
    text = saved.read_text()
    assert text.startswith("# attnplan: tiny on some CPU in float32; prefill of 512 to 2048 tokens")
    assert "  - context: [512, 2048]\n" in text
    assert "      0, 2: dense\n" in text
    assert "      1: {window-64: 0-1, dense: '2, 4-5', window-128: 3}\n" in text
    assert "  window-64: {near: {name: window, window: 64, sinks: 4}}\n" in text


def test_several_sections_survive_and_apply_at_their_lengths(tmp_path: Path) -> None:
    one = plan()
    rows = tuple((WIDE,) * HEADS for _ in range(LAYERS))
    two = replace(one, prefill=(*one.prefill, Section((2049, 4096), rows)))
    two.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == two
    assert two.kernels(2049) == rows
    assert two.kernels(511) == ((DENSE,) * HEADS,) * LAYERS
    assert two.section(4097) is None
    with pytest.raises(PlanError, match="changes between 500 and 600"):
        two.kernels((500, 600))
    with pytest.raises(PlanError, match="must ascend without overlap, got 512 after 2048"):
        replace(one, prefill=one.prefill * 2)


def test_a_plan_without_sections_is_dense(tmp_path: Path) -> None:
    empty = replace(plan(), prefill=())
    empty.save(tmp_path / "plan.yaml")
    assert "prefill: dense" in (tmp_path / "plan.yaml").read_text()
    assert Plan.load(tmp_path / "plan.yaml") == empty
    assert empty.kernels((1, 8192)) == ((DENSE,) * HEADS,) * LAYERS


def test_only_the_fitted_data_that_is_read_travels(tmp_path: Path) -> None:
    fitted = plan([[DENSE] * 6, [FITTED] * 6, [DENSE] * 6], fitted=fit())
    assert set(fitted.fitted) == {1}
    assert set(fitted.fitted[1]) == needed_data(FITTED, MODEL) != set()
    assert plan(fitted=fit()).digest is None
    plan().save(tmp_path / "plan.yaml")
    assert not list(tmp_path.glob("*.safetensors"))


def test_saving_without_fitted_data_is_refused(tmp_path: Path) -> None:
    rows = [[DENSE] * 6, [FITTED] * 6, [DENSE] * 6]
    with pytest.raises(PlanError, match=r"prefill\[0\]\.layers\.1: window.* needs fitted data 'ce"):
        plan(rows).save(tmp_path / "plan.yaml")
    assert not (tmp_path / "plan.yaml").exists()
    plan(rows).save(tmp_path / "plan.yaml", fitted=plan(rows, fitted=fit()).fitted)
    assert Plan.load(tmp_path / "plan.yaml").fitted


def test_missing_or_changed_fitted_data_is_refused(tmp_path: Path) -> None:
    plan([[FITTED] * 6] * 3, fitted=fit()).save(tmp_path / "plan.yaml")
    data, file = tmp_path / "plan.plan.safetensors", tmp_path / "plan.yaml"
    content = data.read_bytes()
    data.write_bytes(content[:-1] + b"\x7f")
    with pytest.raises(
        PlanError, match=r"plan\.yaml: data\.digest: plan\.plan\.safetensors has changed"
    ):
        Plan.load(file)
    data.unlink()
    with pytest.raises(
        PlanError, match=r"data\.file: plan\.plan\.safetensors is not beside the plan"
    ):
        Plan.load(file)
    text = file.read_text()
    file.write_text(re.sub(r"(?m)^data: .*$", "", text))
    with pytest.raises(PlanError, match="needs fitted data 'centroid_t"):
        Plan.load(file)
    file.write_text(text.replace("file: plan.plan.safetensors", "file: ../plan.plan.safetensors"))
    with pytest.raises(PlanError, match="must be a file beside the plan"):
        Plan.load(file)


Edit = tuple[str, str, str]
LINE = "      1: {window-64: 0-1, dense: '2, 4-5', window-128: 3}"
EDITS: dict[str, Edit] = {
    "head twice": (
        LINE,
        "      1: {window-64: 0-4, dense: '5', window-128: 3}",
        "phases.prefill[0].layers.1: head 3 is listed twice (line 29)",
    ),
    "head missing": (
        LINE,
        "      1: {window-64: 0-1, dense: '4-5', window-128: 3}",
        "phases.prefill[0].layers.1: head 2 is missing (line 29)",
    ),
    "no such head": (
        "window-128: 3}",
        "window-128: 6}",
        "phases.prefill[0].layers.1: head 6 does not exist; there are 6, from 0 (line 29)",
    ),
    "no head list": (
        "window-128: 3}",
        "window-128: three}",
        "layers.1: 'three' is no list of heads; write 5 or '0-4, 7' (line 29)",
    ),
    "backwards": ("'2, 4-5'", "'2, 5-4'", "layers.1: '5-4' counts backwards (line 29)"),
    "layer missing": (
        "0, 2: dense",
        "0: dense",
        "phases.prefill[0].layers: layer 2 is missing",
    ),
    "layer twice": (
        "0, 2: dense",
        "0-2: dense",
        "phases.prefill[0].layers.1: layer 1 is listed twice (line 29)",
    ),
    "key twice": (
        "0, 2: dense\n",
        "0, 2: dense\n      0, 2: dense\n",
        "phases.prefill[0].layers: 0, 2 is listed twice (line 29)",
    ),
    "unnamed method": (
        "0, 2: dense",
        "0, 2: dence",
        "layers.0, 2: unknown method 'dence'; known here: dense, window-64, window-128 (line 28)",
    ),
    "unknown method": (
        "{name: window, window: 64",
        "{name: widnow, window: 64",
        "methods.window-64: unknown approximation 'widnow'; known: dense, window",
    ),
    "unknown knob": (
        "window: 64",
        "widow: 64",
        "methods.window-64: window has no knob 'widow'; known: sinks, window",
    ),
    "bad knob": ("window: 64", "window: 0", "methods.window-64: window must be at least 1 key"),
    "unknown phase": ("decode: dense", "encode: dense", "phases.encode: unknown key; known here:"),
    "decode": ("decode: dense", "decode: []", "phases.decode: lists nothing; write dense"),
    "unknown key": ("target:", "aim:", "aim: unknown key; known here: attnplan, model"),
    "missing key": (
        "architecture: LlamaForCausalLM\n",
        "max_context: 3\n",
        "model.max_context: unknown key",
    ),
    "nothing measured": ("  kind: cpu\n", "", "target: kind is missing"),
    "version": ("attnplan: 1", "attnplan: 2", "attnplan: version 2 is unknown; this attnplan"),
    "no plan": ("attnplan: 1\n", "", "this is no plan: the key `attnplan: 1` is missing"),
    "context": ("[512, 2048]", "[2048, 512]", "context: the low end 2048 is above the high end"),
    "context of 3": ("[512, 2048]", "[1, 2, 3]", "context: must be [low, high], got 3 values"),
    "beyond the model": (
        "[512, 2048]",
        "[512, 8193]",
        "context: 8193 tokens is longer than the model's context of 8192 (line 26)",
    ),
    "type": ("layers: 3", "layers: three", "model.layers: must be an integer, got 'three'"),
    "boolean": ("layers: 3", "layers: true", "model.layers: must be an integer, got True"),
    "size": ("layers: 3", "layers: 0", "model.layers: must be at least 1, got 0"),
    "date": ("name: tiny", "name: 2024-01-01", "model.name: a YAML timestamp has no meaning here"),
    "python": (
        "name: tiny",
        "name: !!python/name:os.system",
        "model.name: a YAML os.system has no meaning here; quote it",
    ),
    "anchor": ("name: tiny", "name: &a tiny", "anchors and aliases are not used in plans (line 4)"),
    "no YAML": ("model:", "model: [", "not valid YAML"),
    "control": ("name: tiny", "name: \x07", "not valid YAML"),
    "evidence": ("evidence: {}", "evidence: good", "evidence: must be a mapping (line 31)"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_broken_file_is_told_with_its_place(saved: Path, edit: Edit) -> None:
    old, new, message = edit
    text = saved.read_text()
    assert old in text
    saved.write_text(text.replace(old, new, 1))
    with pytest.raises(PlanError) as raised:
        Plan.load(saved)
    assert str(raised.value).startswith(f"{saved}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"3", "this is no plan"), (b"\xff\xfe\x00", "cannot be read")],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match=r"none\.yaml: cannot be read: No such file"):
        Plan.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: plan(ROWS[:2]), "plan has 2 layers, tiny has 3"),
        (lambda: plan([[DENSE] * 5] * 3), "layer 0: plan has 5 heads, tiny has 6"),
        (lambda: plan(context=(9, 3)), r"got \[9, 3\]"),
        (lambda: plan(evidence={"kl": [float("nan")]}), r"evidence\.kl\[0\]: NaN"),
        (lambda: plan(evidence={"kl": torch.ones(1)}), r"evidence\.kl: .* got Tensor"),
        (lambda: plan(evidence={"a": {(1, 2): 3}}), r"evidence\.a: keys must be text"),
        (lambda: replace(plan(), methods={}), "has no name among the methods"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(build: Callable[[], Plan], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build()


def test_a_failed_save_leaves_the_old_plan(saved: Path) -> None:
    before = Plan.load(saved)
    with pytest.raises(PlanError):
        plan([[FITTED] * 6] * 3).save(saved)
    assert Plan.load(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["plan.yaml"]


def test_the_size_of_weights_survives_and_is_compared(tmp_path: Path) -> None:
    sized = replace(MODEL, magnitudes={"layers.*.q.weight": -3.25, "norm.weight": 0.0})
    plan(model=sized).save(tmp_path / "plan.yaml")
    found = Plan.load(tmp_path / "plan.yaml").model
    assert found == sized and found.magnitudes == sized.magnitudes
    other = replace(sized, magnitudes={"layers.*.q.weight": 2.394, "norm.weight": 0.0})
    assert other.difference(found) == "layers.*.q.weight is 50 times as large"
    assert MODEL.difference(found) is None and found.difference(MODEL) is None
    text = (tmp_path / "plan.yaml").read_text()
    for wrong in (".nan", "true", "'1'", "[1]", "1e300"):
        (tmp_path / "plan.yaml").write_text(text.replace("-3.25", wrong))
        with pytest.raises(PlanError, match=r"model\.magnitudes\.layers\.\*\.q\.weight: must be"):
            Plan.load(tmp_path / "plan.yaml")
