"""Whatever happens to a patched model or its like: the plan runs, or it is said why not."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from attnplan.kernels import catalog
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.selectors.window import Window
from attnplan.models.attention_sites import attention_sites
from attnplan.models.load import identity
from attnplan.plan.plan import DecodeSection, Plan, PlanError, Target
from attnplan.runtime.attention import ATTRIBUTE, CONTINUED, DENSE_LAYER, ELSEWHERE, MASK, PLANNED
from attnplan.runtime.encoder import patch_encoder
from attnplan.runtime.patch import (
    applied,
    patch,
    patch_assignment,
    patched_stats,
    reset_stats,
    unpatch,
)

NARROW = Approximation(Window(8, 2))
WIDER = Approximation(Window(16, 2))
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}
IDS = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(0))


def build(config: Any = None) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config or LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():  # larger weights, so that heads attend to something
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    return model


def plan_for(model: Any, approximation: Approximation = NARROW) -> Plan:
    return Plan.from_assignment(
        [[approximation] * 4] * 2,
        model=identity(model, "tiny"),
        target=Target("here", "cpu", "float32", "cpu", {}),
        context=(16, 256),
    )


@pytest.fixture
def model() -> Any:
    return build()


@pytest.fixture
def plan(model: Any) -> Plan:
    return plan_for(model)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **options).logits
    return found


def ran(model: nn.Module) -> dict[str, int]:
    counts = list(patched_stats(model).values())
    assert all(count == counts[0] for count in counts)
    return counts[0]


def told(model: Any) -> list[str]:
    """What a call says."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        logits(model)
    return [str(warning.message) for warning in found]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_with_the_same_configuration_goes_on(implementation: str) -> None:
    config = LlamaConfig(**CONFIG, attn_implementation=implementation)
    teacher, student = build(config), build(config)
    mask = torch.ones_like(IDS)
    mask[0, :20] = 0
    before = logits(student, attention_mask=mask)
    patch(teacher, plan_for(teacher))
    assert student.config is config and config._attn_implementation == implementation
    assert torch.equal(logits(student, attention_mask=mask), before)
    assert not torch.equal(logits(teacher, attention_mask=mask), before)
    late = build(teacher.config)  # its configuration says more than it should
    assert torch.allclose(logits(late, attention_mask=mask)[mask > 0], before[mask > 0], atol=1e-4)
    assert not any(ATTRIBUTE in vars(module) for module in late.modules())
    unpatch(teacher)
    assert all(module.config is config for module in teacher.modules() if hasattr(module, "config"))
    assert torch.equal(logits(teacher, attention_mask=mask), before)


def test_an_encoder_with_the_same_configuration_goes_on() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=50, num_attention_heads=2, **sizes)
    first, second = BertModel(config).eval(), BertModel(config).eval()
    with torch.no_grad():
        before = second(input_ids=IDS % 50).last_hidden_state
        patch_encoder(first, lambda query, key, value, **options: value)
        assert torch.equal(second(input_ids=IDS % 50).last_hidden_state, before)


def test_settings_that_change_meanwhile_are_kept(model: Any, plan: Plan) -> None:
    shared = model.config
    patch(model, plan)
    model.config.use_cache = False
    model.config.mine = "new"
    assert model(input_ids=IDS[:, :4]).get("past_key_values") is None
    unpatch(model)
    assert model.config is shared
    assert (shared.use_cache, shared.mine, shared._attn_implementation) == (False, "new", "sdpa")


def test_attention_to_images_is_none_of_the_plans() -> None:
    torch.manual_seed(0)
    text = transformers.MllamaTextConfig(
        **CONFIG | {"vocab_size": 300, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        bos_token_id=1,
        pad_token_id=0,
    )
    vision = transformers.MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )
    config = transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=299
    )
    model = transformers.MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
    image = {
        "pixel_values": torch.randn(1, 1, 1, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 60, 1, 1, dtype=torch.long),
    }
    ids = IDS[:1]
    before = logits(model, ids, **image)
    assert not torch.equal(before, logits(model, ids))
    rows = [[catalog.DENSE] * site.heads for site in attention_sites(model)]
    patch_assignment(model, rows)
    assert torch.equal(logits(model, ids, **image), before)
    assert ran(model) == {DENSE_LAYER: 1}
    patch_assignment(model, [[NARROW] * len(row) for row in rows])
    assert not torch.equal(logits(model, ids, **image), before)
    assert ran(model) == {PLANNED: 1}


def test_token_types_without_images_are_text() -> None:
    torch.manual_seed(0)
    text = transformers.Gemma3TextConfig(
        **CONFIG | {"vocab_size": 300, "head_dim": 16},
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    kinds = torch.zeros_like(IDS)
    before = logits(model, attention_mask=mask, token_type_ids=kinds)
    patch_assignment(model, [[catalog.DENSE] * 4] * 2)
    assert torch.equal(logits(model, attention_mask=mask, token_type_ids=kinds), before)
    patch_assignment(model, [[NARROW] * 4] * 2, context=(1, 64))
    planned = logits(model, attention_mask=mask)
    assert torch.equal(logits(model, attention_mask=mask, token_type_ids=kinds), planned)
    assert ran(model) == {PLANNED: 2}
    ids = IDS.clone()
    ids[:, 20:24] = 299
    with pytest.warns(UserWarning, match="mask is more than causal"):
        logits(
            model, ids, token_type_ids=(ids == 299).long(), pixel_values=torch.ones(2, 3, 28, 28)
        )
    assert ran(model) == {PLANNED: 2, MASK: 1}


def test_switching_away_and_patching_again(model: Any, plan: Plan) -> None:
    planned = logits(patch(model, plan))
    model.set_attn_implementation("eager")
    reset_stats(model)
    dense = logits(model)
    assert not torch.allclose(dense, planned, atol=1e-3) and ran(model) == {}
    assert torch.equal(logits(patch(model, plan)), planned)
    assert ran(model) == {PLANNED: 1}
    model.set_attn_implementation("eager")
    with applied(model, plan_for(unpatched(model), WIDER)):
        assert ran(model) == {} and not torch.equal(logits(model), planned)
        assert ran(model) == {PLANNED: 1}
    assert torch.equal(logits(model), dense)
    model.set_attn_implementation("attnplan")
    assert torch.equal(logits(model), planned)
    assert unpatch(model).config._attn_implementation == "sdpa"


def unpatched(model: Any) -> Any:
    return unpatch(copy.deepcopy(model))


def test_a_plan_that_is_refused_leaves_the_one_before(model: Any, plan: Plan) -> None:
    planned = logits(patch(model, plan))
    other = build()
    with torch.no_grad():
        other.lm_head.weight.neg_()
    with pytest.raises(PlanError), applied(model, plan_for(other)):
        pass
    assert torch.equal(logits(model), planned)
    with applied(model, plan_for(unpatched(model), WIDER)):
        wider = logits(model)
        with pytest.raises(RuntimeError), applied(model, plan):
            assert torch.equal(logits(model), planned)
            raise RuntimeError
        assert torch.equal(logits(model), wider)
    assert torch.equal(logits(model), planned)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_a_patched_model_of_its_own(model: Any, plan: Plan, way: str) -> None:
    dense = logits(model)
    planned = logits(patch(model, plan))
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert told(other) == []
    assert (ran(model), ran(other)) == ({PLANNED: 1}, {PLANNED: 2})
    assert other.config is not model.config
    assert torch.equal(logits(unpatch(other)), dense)
    assert not any("attnplan" in name for m in other.modules() for name in vars(m))
    assert torch.equal(logits(model), planned)
    whole = build()
    whole.model = copy.deepcopy(model.model)
    assert torch.equal(logits(whole), planned)
    assert torch.equal(logits(unpatch(whole)), dense)


def test_another_dtype_runs_dense_until_it_is_back(model: Any, plan: Plan) -> None:
    patch(model, plan)
    model.to(torch.bfloat16)
    dense = logits(build().to(torch.bfloat16))
    (message,) = told(model)
    assert "made for cpu in float32, this model is on cpu in bfloat16; dense" in message
    assert torch.equal(logits(model), dense) and ran(model) == {ELSEWHERE: 2}
    assert told(model.float()) == [] or ran(model)[PLANNED] == 1
    forced = patch(build(), plan, force=True).to(torch.bfloat16)
    assert told(forced) == [] and ran(forced) == {PLANNED: 1}
    assert torch.equal(logits(unpatch(forced)), dense)


KEPT = DecodeSection((1, 256), ((Recent(32, 2),) * 2,) * 2)


def through(model: Any, cache: Any, ids: Tensor) -> Tensor:
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return logits(model, ids, **{name: cache, "use_cache": True})


def test_switching_away_from_a_plan_that_stores_less(model: Any, plan: Plan) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    model.set_attn_implementation("eager")
    dense, cache = model.generate(IDS, **options), DynamicCache()
    steps = [through(model, cache, IDS[:, :12]), through(model, cache, IDS[:, :1])]
    patch(model, replace(plan, decode=(KEPT,)))
    planned, few, many = model.generate(IDS, **options), DynamicCache(), DynamicCache()
    assert not torch.equal(planned, dense)
    through(model, few, IDS[:, :12])
    through(model, many, IDS.repeat(1, 3))
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(IDS, **options), dense)
    cache = DynamicCache()
    assert torch.equal(through(model, cache, IDS[:, :12]), steps[0])
    assert torch.equal(through(model, cache, IDS[:, :1]), steps[1])
    assert torch.allclose(through(model, few, IDS[:, :1]), steps[1], atol=1e-3)
    with pytest.raises(ValueError, match="filled under a plan that does not run here"):
        through(model, many, IDS[:, :1])
    model.set_attn_implementation("attnplan")
    assert torch.equal(model.generate(IDS, **options), planned)


def test_another_dtype_keeps_everything_while_decoding(model: Any, plan: Plan) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    dense = build().to(torch.bfloat16).generate(IDS, **options)
    patch(model, replace(plan, decode=(KEPT,))).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="this model is on cpu in bfloat16"):
        assert torch.equal(model.generate(IDS, **options), dense)
    assert ran(model) == {ELSEWHERE: 1, CONTINUED: 11}


def test_autocast_is_another_dtype(model: Any, plan: Plan) -> None:
    planned = logits(patch(model, plan))
    with torch.autocast("cpu", torch.bfloat16):
        (message,) = told(model)
    assert "this model is on cpu in bfloat16" in message
    assert ran(model) == {PLANNED: 1, ELSEWHERE: 1}
    assert torch.equal(logits(model), planned)


@torch.no_grad()
def test_changed_weights_are_told_once(plan: Plan) -> None:
    def in_place(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)

    def loaded(model: Any) -> None:
        state = {name: weight * 0.5 for name, weight in model.state_dict().items()}
        model.load_state_dict(state)

    def assigned(model: Any) -> None:
        state = {name: weight * 0.5 for name, weight in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    def merged(model: Any) -> None:  # as adapters are merged: no version is counted
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data += 0.01

    for change in (in_place, loaded, assigned, merged):
        model = patch(build(), plan)
        assert told(model) == []
        change(model)
        (message,) = told(model)
        assert "the weights have changed" in message and "attnplan evaluate" in message
        assert told(model) == [] and ran(model) == {PLANNED: 3}


@torch.no_grad()
def test_the_same_weights_elsewhere_are_no_change(model: Any, plan: Plan) -> None:
    patch(model, plan)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert told(model) == []


class Adapted(nn.Module):
    """A linear layer as peft adapts it."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return found


def adapt(model: Any, place: str = "self_attn.q_proj") -> Any:
    for layer in model.model.layers:
        layer.set_submodule(place, Adapted(layer.get_submodule(place)))
    return model


class Wrapper(nn.Module):
    """A model in another, as in PeftModel."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, **inputs: Any) -> Any:
        return self.base_model["model"](**inputs)


@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp.down_proj"])
def test_adapters_are_told_once(model: Any, plan: Plan, place: str) -> None:
    adapt(patch(model, plan), place)
    (message,) = told(model)
    assert "adapters are on top of the weights" in message and "attnplan evaluate" in message
    assert told(model) == [] and ran(model) == {PLANNED: 2}


def test_a_wrapped_model_is_planned_inside(plan: Plan) -> None:
    wrapped = Wrapper(adapt(build()))
    with pytest.warns(UserWarning, match="adapters are on top"):
        assert patch(wrapped, plan) is wrapped
    assert told(wrapped) == [] and ran(wrapped) == {PLANNED: 1}
    assert not any("attnplan" in name for m in unpatch(wrapped).modules() for name in vars(m))
    other = adapt(build())
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.base_layer.weight.neg_()
    with pytest.raises(PlanError, match="weights is"):
        patch(Wrapper(other), plan)
    with pytest.raises(ValueError, match="Linear holds 0 transformers models"):
        patch(nn.Linear(2, 2), plan)


def test_exporting_is_refused(model: Any, plan: Plan) -> None:
    patch(model, plan)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"cannot be exported or traced.*unpatch\(model\)"):
            torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=strict)
    with (
        pytest.raises(ValueError, match="cannot be exported or traced"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (IDS,), strict=False)
    reset_stats(model)
    logits(model)
    assert ran(model) == {PLANNED: 1}


def test_two_threads_generate(model: Any, plan: Plan) -> None:
    patch(model, plan)
    texts = [IDS[:1, :40], IDS[1:, :57]]
    expected = [model.generate(ids, max_new_tokens=6, do_sample=False) for ids in texts]
    reset_stats(model)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda ids: model.generate(ids, max_new_tokens=6, do_sample=False), texts * 4
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))
    assert ran(model)[PLANNED] == 8 and sum(ran(model).values()) == 48


def test_replicas_count_together(model: Any, plan: Plan) -> None:
    planned = logits(patch(model, plan))
    replica = model._replicate_for_data_parallel()
    replica.model = model.model
    for name, part in model.named_modules():
        if name.endswith("self_attn"):
            assert (
                part._replicate_for_data_parallel().__dict__[ATTRIBUTE] is part.__dict__[ATTRIBUTE]
            )
    assert torch.equal(logits(replica), planned)
    assert ran(model) == {PLANNED: 2}


def test_checkpointed_training_is_refused(model: Any, plan: Plan) -> None:
    patch(model, plan).train()
    enable = "activation_checkpointing_enable"  # its name since transformers 5.24
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    with pytest.raises(ValueError, match=r"use model\.eval\(\) and torch\.no_grad\(\)"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(logits(model.eval()), logits(patch(build(), plan)))


def test_layers_that_are_taken_away_are_noticed(model: Any, plan: Plan) -> None:
    attention_sites(model)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(PlanError, match="layers is 1, not 2"):
        patch(model, plan)
    assert len(attention_sites(AutoModelForCausalLM.from_config(model.config))) == 2
