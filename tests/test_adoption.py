"""A plan by name is checked as `attnplan.patch` checks it, when the model is loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Lfm2Config,
    LlamaConfig,
    PreTrainedModel,
)

from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.selectors.window import Window
from attnplan.models.attention_sites import attention_sites
from attnplan.models.load import identity
from attnplan.plan.plan import DecodeSection, Plan, PlanError, Target
from attnplan.runtime.attention import ATTRIBUTE, ELSEWHERE, PLANNED
from attnplan.runtime.patch import load, patch, patch_assignment, patched_stats, unpatch

NARROW = Approximation(Window(8, 2))
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NAME = {"attn_implementation": "attnplan"}
IDS = torch.randint(3, 96, (1, 100), generator=torch.Generator().manual_seed(0))


def build(config: Any = None) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES)).eval()


def plan_for(model: PreTrainedModel) -> Plan:
    rows = [[NARROW] * site.heads for site in attention_sites(model)]
    target = Target("here", "cpu", "float32", "cpu", {})
    return Plan.from_assignment(
        rows, model=identity(model, "tiny"), target=target, context=(16, 256)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its plan."""
    model = build()
    model.save_pretrained(tmp_path)
    plan_for(model).save(tmp_path / "attnplan.yaml")
    return tmp_path


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def ran(model: nn.Module) -> dict[str, int]:
    counts = list(patched_stats(model).values())
    assert all(count == counts[0] for count in counts)
    return counts[0]


def test_the_plan_beside_the_weights_runs(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, **NAME)
    expected = logits(patch(build(), plan_for(build())))
    assert torch.equal(logits(model), expected)
    assert ran(model) == {PLANNED: 1}
    assert model.generation_config.eos_token_id == 2
    assert torch.equal(logits(unpatch(model)), logits(build()))


def test_a_subfolder_has_its_own_plan(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "inner")
    plan_for(model).save(tmp_path / "inner" / "attnplan.yaml")
    (tmp_path / "attnplan.yaml").write_text("the plan of another model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", **NAME)
    logits(found)
    assert ran(found) == {PLANNED: 1}


@pytest.mark.parametrize("layers", [["conv", "full_attention"], ["full_attention", "conv"] * 2])
def test_layers_are_numbered_by_their_attention(layers: list[str], tmp_path: Path) -> None:
    sizes = SIZES | {"num_hidden_layers": len(layers)}
    model = build(Lfm2Config(**sizes, layer_types=layers))
    plan = plan_for(model)
    model.save_pretrained(tmp_path)
    plan.save(tmp_path / "attnplan.yaml")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, **NAME)
    assert torch.equal(logits(found), logits(patch(model, plan)))
    assert len(patched_stats(found)) == layers.count("full_attention")
    assert ran(found) == {PLANNED: 1}


VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(
        **SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 64}, do_layer_norm_before=True
    ),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **SIZES | {"num_hidden_layers": 4, "head_dim": 16, "mlp_only_layers": [0, 1, 2, 3]},
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4, "first_k_dense_replace": 2},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config=LlamaConfig(**SIZES),
        vision_config=transformers.CLIPVisionConfig(**VISION, intermediate_size=32, patch_size=14),
        image_token_index=95,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_by_name_and_by_patch_are_one(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    is_seeing = name == "llava"
    auto = AutoModelForImageTextToText if is_seeing else AutoModelForCausalLM
    model = auto.from_config(FAMILIES[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    dense = logits(model)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    names = [part.config._attn_implementation for part in parts]
    planned = logits(patch(model, plan_for(model)))
    assert not torch.allclose(planned, dense, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(unpatch(model)), dense)
    assert [part.config._attn_implementation for part in parts] == names
    ways: list[Any] = [NAME]
    if is_seeing:
        ways.append({"attn_implementation": {"text_config": "attnplan", "vision_config": "eager"}})
    for way in ways:
        found = auto.from_pretrained(tmp_path, **way)
        assert torch.equal(logits(found), planned)
        assert ran(found) == {PLANNED: 1}
    if is_seeing:
        assert found.config.vision_config._attn_implementation == "eager"


def test_a_repository_brings_its_plan(folder: Path, tmp_path: Path) -> None:
    """As transformers lays out what it has fetched from the hub."""
    cache = tmp_path / "cache"
    place = cache / "models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40), ignore=lambda *_: ["cache"])
    options: dict[str, Any] = {"cache_dir": cache, "local_files_only": True}
    found = AutoModelForCausalLM.from_pretrained("someone/tiny", **options, **NAME)
    logits(found)
    assert ran(found) == {PLANNED: 1}
    (place / "snapshots" / ("0" * 40) / "attnplan.yaml").unlink()
    with pytest.raises(PlanError, match=r"there is no plan at someone/tiny/attnplan\.yaml"):
        AutoModelForCausalLM.from_pretrained("someone/tiny", **options, **NAME)


def test_other_weights_are_refused_when_they_are_loaded(folder: Path) -> None:
    other = build()
    with torch.no_grad():
        other.lm_head.weight.neg_()
    other.save_pretrained(folder)
    with pytest.raises(PlanError, match=r"attnplan\.yaml: the plan is for tiny, .* weights is"):
        AutoModelForCausalLM.from_pretrained(folder, **NAME)


def test_another_dtype_is_told_when_it_is_loaded(folder: Path) -> None:
    with pytest.warns(UserWarning, match="made for cpu in float32, this model is on cpu in bf"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **NAME)
    logits(model)
    assert ran(model) == {ELSEWHERE: 1}


def test_a_decode_section_runs(folder: Path) -> None:
    plan = plan_for(build())
    kept = DecodeSection((1, 256), ((Recent(32, 2),) * 2,) * 2)
    replace(plan, decode=(kept,)).save(folder / "attnplan.yaml")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    model = AutoModelForCausalLM.from_pretrained(folder, **NAME)
    expected = load(str(folder), folder / "attnplan.yaml").generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options), expected)
    live = AutoModelForCausalLM.from_pretrained(folder)
    live.set_attn_implementation("attnplan")
    with pytest.raises(PlanError, match=r"use attnplan\.patch\(model, plan\) instead"):
        logits(live)


@pytest.mark.parametrize(
    ("text", "reason"), [("", "is empty"), ("a: [", "not valid YAML"), ("[1]", "this is no plan")]
)
def test_a_broken_plan_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / "attnplan.yaml").write_text(text)
    with pytest.raises(PlanError, match=reason):
        AutoModelForCausalLM.from_pretrained(folder, **NAME)


def test_a_configuration_names_its_plan(folder: Path) -> None:
    (folder / "plans").mkdir()
    (folder / "attnplan.yaml").rename(folder / "plans" / "other.yaml")
    config = AutoConfig.from_pretrained(folder)
    for name in ("plans/other.yaml", str(folder / "plans" / "other.yaml")):
        config.attnplan_plan = name
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, **NAME)
        logits(model)
        assert ran(model) == {PLANNED: 1}
    config.attnplan_plan = "third.yaml"
    with pytest.raises(PlanError, match=r"there is no plan at .*third\.yaml"):
        AutoModelForCausalLM.from_pretrained(folder, config=config, **NAME)


def test_a_model_from_a_configuration_gets_its_plan_before_it_computes(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **NAME).eval()
    logits(model)
    assert ran(model) == {PLANNED: 1}
    assert not model._forward_pre_hooks
    other = AutoModelForCausalLM.from_config(config, **NAME).eval()
    for _ in range(2):  # it goes on waiting
        with pytest.raises(PlanError, match="weights is"):
            logits(other)
    assert not any(ATTRIBUTE in vars(module) for module in other.modules())


def test_threads_wait_for_the_plan(folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **NAME).eval()
    expected = logits(patch(build(), plan_for(build())))
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(logits, [model] * 8))
    assert ran(model) == {PLANNED: 8}


def test_a_model_that_is_there_is_found(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_attn_implementation("attnplan")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, **NAME))
    assert torch.equal(logits(model), expected)
    assert ran(model) == {PLANNED: 1}
    body = model.model
    unpatch(model)
    del model
    body.set_attn_implementation("attnplan")
    with pytest.raises(ValueError, match="LlamaModel is no decoder-only causal language model"):
        body(input_ids=IDS)


def test_a_saved_model_brings_its_plan(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, **NAME)
    expected = logits(model)
    config = json.dumps(model.config.to_dict())
    again, third = tmp_path / "again", tmp_path / "third"
    model.save_pretrained(again)
    saved = json.loads((again / "config.json").read_text())
    assert saved["attnplan_plan"] == "attnplan.yaml"
    assert "attnplan" not in json.dumps({k: v for k, v in saved.items() if k != "attnplan_plan"})
    assert json.dumps(model.config.to_dict() | {"dtype": 0}) == json.dumps(
        json.loads(config) | {"dtype": 0}
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again, **NAME)), expected)
    with pytest.warns(UserWarning, match="has a plan and is loaded without it"):
        dense = AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(logits(dense), logits(build()))
    assert not [name for name in vars(dense) if "attnplan" in name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(str(again), again / "attnplan.yaml").save_pretrained(third)
    assert (third / "attnplan.yaml").read_text() == (again / "attnplan.yaml").read_text()


def test_a_plan_that_does_not_fit_what_is_saved_stays_behind(tmp_path: Path) -> None:
    model = build()
    patch_assignment(model, [[NARROW] * 4] * 2)
    with pytest.warns(UserWarning, match="saved without a plan .* a mere assignment"):
        model.save_pretrained(tmp_path / "a")
    plan = plan_for(unpatch(model))
    patch(model, plan)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    with pytest.warns(UserWarning, match="its weights are no longer those"):
        model.save_pretrained(tmp_path / "b")
    for name in ("a", "b"):
        assert not (tmp_path / name / "attnplan.yaml").exists()
        assert "attnplan" not in (tmp_path / name / "config.json").read_text()


def test_models_without_the_name_are_left_alone() -> None:
    """The call-back from torch changes nothing else."""
    model = build()
    assert not [
        name for name in vars(model) if "attnplan" in name or name == "adjust_generation_fn"
    ]
    assert not model._forward_pre_hooks
