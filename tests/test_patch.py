"""A patched model is the same model, faster: what is dense stays dense to the last bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import attnplan
from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.inputs import Moments
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.window import Window
from attnplan.models.load import identity
from attnplan.plan.plan import Plan, PlanError, Target
from attnplan.runtime.attention import (
    CONTINUED,
    DENSE_LAYER,
    ELSEWHERE,
    LONG,
    MASK,
    PADDING,
    PLANNED,
    SHORT,
)
from attnplan.runtime.patch import (
    applied,
    load,
    patch,
    patch_assignment,
    patched_stats,
    reset_stats,
    unpatch,
)

DENSE = catalog.DENSE
FULL = Approximation(Window(4096))
NARROW = Approximation(Window(8, 2))
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-head-dim-32": lambda: LlamaConfig(**{**SIZES, "head_dim": 32}),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**SIZES, sliding_window=300),
    "gemma": lambda: GemmaConfig(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=32, layer_types=["sliding_attention", "full_attention"]
    ),
}


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights, so that heads attend to something
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    return model


@pytest.fixture
def model() -> PreTrainedModel:
    return build(CONFIGS["llama"]())


def text(length: int = 150, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 96, (batch, length), generator=generator)


def padded(length: int = 150, pad: int = 70) -> tuple[Tensor, Tensor]:
    ids, mask = text(length), torch.ones(2, length, dtype=torch.long)
    ids[1, :pad] = 0
    mask[1, :pad] = 0
    return ids, mask


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    if "cache" in options and "cache" not in inspect.signature(model.forward).parameters:
        options["past_key_values"] = options.pop("cache")  # its name before transformers 5.24
    output: Tensor = model(input_ids=ids, **options).logits
    return output


def everywhere(model: PreTrainedModel, approximation: Approximation) -> list[list[Approximation]]:
    config = model.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    short = getattr(config, "sliding_window", None) or 512
    return [
        [DENSE if kind == "sliding_attention" and short < 256 else approximation] * 4
        for kind in types
    ]


def plan_for(model: PreTrainedModel, approximation: Approximation = FULL, **changes: Any) -> Plan:
    target = Target("test", "cpu", "float32", "cpu", {}, (1, 2))
    plan = Plan.from_assignment(
        everywhere(model, approximation),
        model=identity(model, "tiny"),
        target=target,
        context=(16, 256),
    )
    return replace(plan, **changes)


def ran(model: PreTrainedModel, reason: str) -> list[int]:
    return [counts.get(reason, 0) for counts in patched_stats(model).values()]


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal to rounding of the dtype, relative to the largest logit."""
    tolerance = 64 * torch.finfo(actual.dtype).eps * expected.abs().max()
    return bool((actual - expected).abs().max() <= tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_dense_plan_gives_the_original_logits_to_the_bit(name: str) -> None:
    model = build(CONFIGS[name]())
    ids, mask = padded()
    before = logits(model, ids), logits(model, ids, attention_mask=mask)
    with applied(model, plan_for(model, DENSE)):
        assert torch.equal(logits(model, ids), before[0])
        assert torch.equal(logits(model, ids, attention_mask=mask), before[1])
        assert ran(model, DENSE_LAYER) == [2, 2]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_window_as_long_as_the_text_gives_the_original_logits(name: str) -> None:
    model = build(CONFIGS[name]())
    ids, mask = padded()
    before = logits(model, ids), logits(model, ids, attention_mask=mask)
    patch(model, plan_for(model))
    assert close(logits(model, ids), before[0])
    real = mask.bool()
    assert close(logits(model, ids, attention_mask=mask)[real], before[1][real])
    assert ran(model, PLANNED) == ([0, 2] if name == "gemma3" else [2, 2])
    unpatch(model)
    assert torch.equal(logits(model, ids), before[0])
    assert torch.equal(logits(model, ids, attention_mask=mask), before[1])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_generate_gives_the_same_tokens(name: str) -> None:
    model = build(CONFIGS[name]())
    ids, mask = padded(60, 20)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)
    patch(model, plan_for(model))
    assert torch.equal(model.generate(ids, **options), expected)
    assert ran(model, PLANNED)[1] == 1
    assert ran(model, CONTINUED)[1] == 7
    reset_stats(model)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)
    assert ran(model, PLANNED)[1] == 8


def test_prefill_into_a_static_cache_runs_the_plan(model: PreTrainedModel) -> None:
    ids, options = text(60), {"max_new_tokens": 4, "do_sample": False}
    patch(model, plan_for(model, NARROW))
    expected = model.generate(ids, **options)
    reset_stats(model)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert (ran(model, PLANNED), ran(model, CONTINUED)) == ([1, 1], [3, 3])


def test_a_compiled_model_runs_the_plan(model: PreTrainedModel) -> None:
    ids, mask = padded()
    patch(model, plan_for(model, NARROW))
    expected = logits(model, ids, attention_mask=mask)
    reset_stats(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert close(logits(compiled, ids, attention_mask=mask), expected)
    assert close(logits(compiled, ids), logits(model, ids))
    assert ran(model, PLANNED) == [3, 3]


def test_a_narrow_window_changes_the_logits(model: PreTrainedModel) -> None:
    ids = text()
    before = logits(model, ids)
    patch(model, plan_for(model, NARROW))
    assert not close(logits(model, ids), before)


def test_left_padding_does_not_change_what_a_text_says(model: PreTrainedModel) -> None:
    ids, mask = padded()
    patch(model, plan_for(model, NARROW))
    together = logits(model, ids, attention_mask=mask)[1, 70:]
    assert close(together, logits(model, ids[1:, 70:])[0])


def test_every_head_runs_its_own_approximation(model: PreTrainedModel) -> None:
    ids = text()
    rows = [[DENSE] * 4, [NARROW, DENSE, DENSE, FULL]]
    original = logits(model, ids)
    patch_assignment(model, rows)
    mixed = logits(model, ids)
    assert not close(mixed, original)
    assert (ran(model, DENSE_LAYER), ran(model, PLANNED)) == ([1, 0], [0, 1])
    with torch.no_grad():  # without the narrow head, nothing of the difference is left
        model.get_submodule("model.layers.1.self_attn").o_proj.weight[:, :16] = 0
    mixed = logits(model, ids)
    unpatch(model)
    assert close(mixed, logits(model, ids))


ONE_EACH = {a.name: a for a in catalog.choices(AttentionShape(1, 4, 2, 1024, 1024, 16))}


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_method_runs_in_a_model(name: str) -> None:
    model = build(LlamaConfig(**{**SIZES, "max_position_embeddings": 1024}))
    ids, mask = padded(700, 64)
    ids, mask = ids[1:], mask[1:]
    original = logits(model, ids, attention_mask=mask)
    gram = torch.eye(16).expand(4, 16, 16)
    noise = Moments(torch.zeros(4, 16), gram, torch.zeros(2, 16), gram[:2])
    fitted = dict.fromkeys(range(2), catalog.fit(noise))
    patch_assignment(model, [[ONE_EACH[name]] * 4] * 2, fitted)
    planned = logits(model, ids, attention_mask=mask)
    assert planned.isfinite().all()
    if ONE_EACH[name].is_dense:
        assert torch.equal(planned, original)
        return
    assert ran(model, PLANNED) == [1, 1]
    assert not torch.equal(planned[:, 64:], original[:, 64:])
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] == 702


def test_continuing_a_cache_is_dense(model: PreTrainedModel) -> None:
    ids = text()
    patch(model, plan_for(model))
    cache = DynamicCache(config=model.config)
    chunks = [
        logits(model, chunk, cache=cache, use_cache=True) for chunk in ids.split([64, 80, 6], 1)
    ]
    assert ran(model, CONTINUED) == [2, 2]
    assert ran(model, PLANNED) == [1, 1]
    unpatch(model)
    cache = DynamicCache(config=model.config)
    for chunk, ours in zip(ids.split([64, 80, 6], 1), chunks, strict=True):
        assert close(ours, logits(model, chunk, cache=cache, use_cache=True))


def test_outside_its_contexts_a_plan_is_dense_to_the_bit(model: PreTrainedModel) -> None:
    short, long = text(15), text(257)
    before = logits(model, short), logits(model, long)
    patch(model, plan_for(model, NARROW))
    assert torch.equal(logits(model, short), before[0])
    with pytest.warns(UserWarning, match="257 tokens, but the plan was verified up to 256"):
        assert torch.equal(logits(model, long), before[1])
    assert torch.equal(logits(model, long), before[1])  # told once
    assert ran(model, SHORT) == [1, 1]
    assert ran(model, LONG) == [2, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_runs_by_its_own_length(model: PreTrainedModel, side: str) -> None:
    """A row that is too short for the plan runs dense beside one that is not."""
    ids, mask = text(60), torch.ones(2, 60, dtype=torch.long)
    mask[0, slice(12, 60) if side == "right" else slice(0, 48)] = 0
    short, long = ids[:1][mask[:1].bool()][None], ids[1:]
    patch(model, plan_for(model, NARROW))
    expected = logits(model, short), logits(model, long)
    reset_stats(model)
    found = logits(model, ids, attention_mask=mask)
    assert close(found[:1][mask[:1].bool()], expected[0][0])
    assert close(found[1:], expected[1])
    assert ran(model, PLANNED) == ran(model, SHORT) == [1, 1]


def test_padding_inside_a_text_is_dense_and_told_once(model: PreTrainedModel) -> None:
    ids, mask = text(40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 20:30] = 0
    before = logits(model, ids, attention_mask=mask)
    patch(model, plan_for(model, NARROW))
    with pytest.warns(UserWarning, match="padding inside a text"):
        assert torch.equal(logits(model, ids, attention_mask=mask), before)
    assert ran(model, PADDING) == [1, 1]


def test_a_mask_of_the_users_is_dense_and_told_once(model: PreTrainedModel) -> None:
    ids = text(40)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[:, :, 20:, 3:9] = False
    before = logits(model, ids, attention_mask=mask)
    patch(model, plan_for(model, NARROW))
    with pytest.warns(UserWarning, match="mask is more than causal"):
        assert torch.equal(logits(model, ids, attention_mask=mask), before)
    assert ran(model, MASK) == [1, 1]


def test_packed_texts_do_not_see_each_other(model: PreTrainedModel) -> None:
    ids = text(40, 1)
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    before = logits(model, ids, position_ids=positions, use_cache=False)
    patch(model, plan_for(model, NARROW))
    with pytest.warns(UserWarning, match="mask is more than causal"):
        after = logits(model, ids, position_ids=positions, use_cache=False)
    assert torch.equal(after, before)


def test_bfloat16_plan_runs_in_bfloat16() -> None:
    model = build(CONFIGS["llama"]()).to(torch.bfloat16)
    ids = text()
    before = logits(model, ids)
    target = Target("test", "cpu", "bfloat16", "cpu", {}, (1, 2))
    patch(model, plan_for(model, target=target))
    assert close(logits(model, ids), before)
    assert ran(model, PLANNED) == [1, 1]


def test_another_dtype_is_dense_unless_forced(model: PreTrainedModel) -> None:
    plan = plan_for(model, NARROW)
    model.to(torch.bfloat16)
    ids = text()
    before = logits(model, ids)
    with pytest.warns(UserWarning, match="made for cpu in float32, this model is on cpu in bf"):
        patch(model, plan)
    assert torch.equal(logits(model, ids), before)
    assert ran(model, ELSEWHERE) == [1, 1]
    patch(model, plan, force=True)
    logits(model, ids)
    assert ran(model, PLANNED) == [1, 1]


def test_plan_of_another_model_is_refused_and_nothing_changes(model: PreTrainedModel) -> None:
    other = build(CONFIGS["llama"]())
    with torch.no_grad():
        other.get_input_embeddings().weight.neg_()
    plan = plan_for(other)
    with pytest.raises(PlanError, match="is for tiny, not for LlamaForCausalLM: weights is"):
        patch(model, plan)
    qwen = build(CONFIGS["qwen3"]())
    with pytest.raises(PlanError, match="architecture is Qwen3ForCausalLM, not LlamaForCausalLM"):
        patch(qwen, plan_for(model))
    assert model.config._attn_implementation == "sdpa"
    assert not any("_attnplan" in module.__dict__ for module in model.modules())


def test_assignment_of_another_size_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(PlanError, match="plan has 1 layers, the model has 2"):
        patch_assignment(model, [[DENSE] * 4])
    with pytest.raises(PlanError, match="layer 1: plan has 3 heads, the model has 4"):
        patch_assignment(model, [[DENSE] * 4, [DENSE] * 3])


def test_sliding_layers_are_not_planned_beyond_their_window() -> None:
    model = build(CONFIGS["gemma3"]())
    with pytest.raises(PlanError, match="layer 0 has a sliding window of 32 keys"):
        patch_assignment(model, [[FULL] * 4, [DENSE] * 4])
    patch_assignment(model, [[FULL] * 4, [DENSE] * 4], context=(1, 32))


def test_unpatch_restores_every_attribute(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    patch_assignment(model, everywhere(model, FULL))
    patch_assignment(model, everywhere(model, NARROW))
    unpatch(model)
    unpatch(model)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"


def test_applied_gives_back_the_plan_before_it(model: PreTrainedModel) -> None:
    ids = text()
    patch(model, plan_for(model, NARROW))
    before = logits(model, ids)
    with applied(model, plan_for(model, DENSE)):
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(RuntimeError), applied(unpatch(model), plan_for(model)):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


def test_training_and_weights_of_planned_attention_are_refused(model: PreTrainedModel) -> None:
    patch(model, plan_for(model))
    with pytest.raises(ValueError, match=r"use model\.eval\(\) and torch\.no_grad\(\)"):
        model(input_ids=text())
    with pytest.raises(ValueError, match="output_attentions needs attention weights"):
        logits(model, text(), output_attentions=True)


def test_an_all_dense_plan_can_be_trained(model: PreTrainedModel) -> None:
    patch(model, plan_for(model, DENSE))
    model(input_ids=text(), labels=text()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_stats_of_an_unpatched_model_are_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="not patched"):
        patched_stats(model)


def test_a_model_directory_and_a_plan_file_make_a_planned_model(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    ids = text()
    patch(model, plan_for(model, NARROW))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "model")
    plan_for(model, NARROW).save(tmp_path / "plan.yaml")
    loaded = load(str(tmp_path / "model"), tmp_path / "plan.yaml")
    assert torch.equal(logits(loaded, ids), expected)
    assert ran(loaded, PLANNED) == [1, 1]


def test_attn_implementation_finds_the_plan_in_the_model_directory(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    ids = text()
    plan = plan_for(model, NARROW)
    model.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"there is no plan at .*attnplan\.yaml"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attnplan")
    plan.save(tmp_path / "attnplan.yaml")
    planned = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attnplan")
    found = logits(planned, ids)
    assert ran(planned, PLANNED) == [1, 1]
    assert torch.equal(found, logits(patch(model, plan), ids))
    unpatch(planned)
    assert torch.equal(logits(planned, ids), logits(unpatch(model), ids))
    replace(plan, model=replace(plan.model, architecture="Other")).save(tmp_path / "attnplan.yaml")
    with pytest.raises(PlanError, match=r"yaml: .* architecture is LlamaForCausalLM, not Other"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attnplan")


def test_the_package_offers_the_calls(model: PreTrainedModel) -> None:
    attnplan.patch(model, plan_for(model))
    assert ran(model, PLANNED) == [0, 0]
    attnplan.unpatch(model)
    assert attnplan.Plan is Plan
    assert attnplan.load is load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(attnplan, "nothing")  # noqa: B009


def test_models_whose_attention_does_more_are_refused() -> None:
    gemma2 = build(Gemma2Config(**SIZES, attn_logit_softcapping=50.0))
    with pytest.raises(ValueError, match="uses soft-capped attention scores"):
        patch_assignment(gemma2, [[DENSE] * 4] * 2)
    assert gemma2.config._attn_implementation != "attnplan"
