"""Our attention functions take every call that the installed modeling files make."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AfmoeConfig, AutoModelForCausalLM

from attnplan.kernels import catalog
from attnplan.models import attention_sites
from attnplan.profiles.capture import capture
from attnplan.runtime import attention as runtime
from attnplan.runtime import encoder
from attnplan.runtime.attention import DENSE_LAYER
from attnplan.runtime.patch import patch_assignment, patched_stats, unpatch

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "plan": inspect.unwrap(runtime.attention),
    "encoder": encoder.attention,
    "capture": capture._attention,
    "probe": attention_sites._take_notes,
}


def calls() -> Iterator[tuple[int, tuple[str, ...]]]:
    """How many arguments by position, and which by name; each way of calling once."""
    found: set[tuple[int, tuple[str, ...]]] = set()
    models = Path(transformers.__file__).parent / "models"
    for file in models.glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r"\battention_interface\(", text):
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            call: Any = ast.parse(text[match.start() : end], mode="eval").body
            names = sorted(k.arg for k in call.keywords if k.arg is not None)
            found.add((len(call.args), tuple(names)))
    return iter(sorted(found))


@pytest.mark.parametrize("who", FUNCTIONS)
def test_every_call_of_the_modeling_files_binds(who: str) -> None:
    parameters = inspect.signature(FUNCTIONS[who])
    made = list(calls())
    assert any("attention_mask" in names for _, names in made)
    for places, names in made:
        bound = parameters.bind(*range(places), **dict.fromkeys(names, "named")).arguments
        given = 4 if places > 4 else "named" if "attention_mask" in names else None
        assert bound.get("attention_mask") == given
        for name in set(names) & {"scaling", "dropout"}:
            assert (bound | bound.get("options", {}))[name] == "named"


def test_a_model_that_names_its_mask_is_planned() -> None:
    torch.manual_seed(0)
    config = AfmoeConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        num_dense_layers=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 96, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        patch_assignment(model, [[catalog.DENSE] * 4] * 4)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert all(counts == {DENSE_LAYER: 1} for counts in patched_stats(model).values())
    unpatch(model)


@pytest.mark.parametrize("option", capture.UNPLANNABLE)
def test_whatever_else_changes_attention_is_refused(option: str) -> None:
    query = torch.ones(1, 1, 2, 4)
    module: Any = torch.nn.Module()
    with pytest.raises(ValueError, match=option):
        capture._refuse_unless_causal(module, query, query, None, {option: query})
