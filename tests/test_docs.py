"""What the documents say of the code is true of it."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.attention import all_blocks
from tests.test_approximations import CALLS, call

from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.engines.reference import prefill as reference
from attnplan.kernels.layer.layer_attention import LayerKernel
from attnplan.kernels.selectors._static_pattern import causal

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The method of the guide, from the guide."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding-a-method.md").read_text(), re.S)
    file = tmp_path_factory.mktemp("guide") / "large_keys.py"
    file.write_text(code[0])
    spec = importlib.util.spec_from_file_location("large_keys", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["large_keys"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["large_keys"]


@pytest.mark.parametrize("sizes", CALLS.values(), ids=CALLS)
def test_the_method_of_the_guide_keeps_the_contracts(
    example: ModuleType, sizes: dict[str, object]
) -> None:
    approximation = Approximation(example.LargeKeys(top=2))
    inputs = call(approximation, **sizes)  # type: ignore[arg-type]
    tiles = approximation.near.near(inputs, all_blocks(inputs))
    keep = approximation.near.keep(inputs)
    counts = tiles.counts(inputs.query.shape[2], inputs.key.shape[2])
    assert torch.equal(counts > 0, keep) and not bool((keep & ~causal(inputs)).any())
    heads = inputs.query.shape[1]
    kernel = LayerKernel((approximation,) * heads, {})
    some = [t.float() for t in (inputs.query, inputs.key, inputs.value)]
    found = kernel(*some, scale=inputs.scale, start=inputs.start)
    kv = list(inputs.kv_head)
    wide = inputs.query, inputs.key[:, kv], inputs.value[:, kv]
    exact, _ = reference.masked(*wide, keep, inputs.scale)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_the_method_of_the_guide_chooses_the_longest_keys(example: ModuleType) -> None:
    approximation = Approximation(example.LargeKeys(top=1, local=1))
    inputs = call(approximation, 640, 640)
    inputs.key[:, :, 130] *= 100
    keep = approximation.near.keep(inputs)
    assert bool(keep[:, :, 320:, 128:192].all())
    shape = inputs.shape
    assert example.LargeKeys.choices(shape) and approximation.cost(shape).selection > 0


def test_the_tables_of_methods_are_the_catalog() -> None:
    text = (ROOT / "docs/methods.md").read_text()
    tables = re.findall(r"((?:^\|.*\n)+)", text, re.M)
    names = [re.findall(r"^\| `(?:\+ )?(\w+)` \|", table, re.M) for table in tables]
    assert names[0] == [*catalog.NEAR, *catalog.FAR]
    assert set(names[1]) == set(cache_catalog.KEEPERS)
    rows = re.findall(
        r"^\| [\w -]+ \| ((?:`\w+`(?:, )?)+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    short = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    known = {*catalog.NEAR, *catalog.FAR, *cache_catalog.KEEPERS} - {"dense"}
    assert set(short) == known and len(short) == len(known)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
