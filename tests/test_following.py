"""Caches that follow a plan, where models and callers do what they may: never wrong in silence."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.test_patch import CONFIGS, build, logits, text
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DynamicCache,
    FalconH1Config,
    Gemma3nTextConfig,
    JetMoeConfig,
    PreTrainedModel,
)

from attnplan.kernels import catalog
from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.kernels.selectors.window import Window
from attnplan.models.attention_sites import attention_sites
from attnplan.models.load import identity
from attnplan.plan.plan import DecodeSection, Plan, PlanError, Target
from attnplan.runtime.attention import KEPT, LONG, SHORT
from attnplan.runtime.cache import PlanLayer, stored_bytes
from attnplan.runtime.patch import (
    applied,
    patch,
    patch_assignment,
    patched_stats,
    reset_stats,
    unpatch,
)
from attnplan.runtime.running import RUNNING

NARROW, WIDE, FULL = Recent(32, 2), Recent(400), Full()
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def keeping(model: PreTrainedModel, *keepers: Keeper) -> PreTrainedModel:
    """Dense on prompts; every kv head of layer i keeps what `keepers[i]` does, or the last."""
    sites = attention_sites(model)
    kept = [
        [keepers[min(layer, len(keepers) - 1)]] * site.kv_heads for layer, site in enumerate(sites)
    ]
    return patch_assignment(model, [[catalog.DENSE] * s.heads for s in sites], keepers=kept)


@pytest.fixture
def model() -> PreTrainedModel:
    return build(CONFIGS["llama"]())


@torch.no_grad()
def filled(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    output = model(input_ids=ids, use_cache=True, **options)
    return output["cache" if "cache" in output else "past_key_values"]


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-4 * expected.abs().max())


REFUSED = {
    "latents": (
        lambda: DeepseekV3Config(
            **SIZES,
            num_hidden_layers=2,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=4,
            first_k_dense_replace=2,
            moe_intermediate_size=32,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
        ),
        r"layer 0 gives its cache keys \[1, 1, 6, 16\] and attention keys \[1, 4, 6, 24\]",
    ),
    "repeated": (
        lambda: JetMoeConfig(
            **SIZES, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16, num_local_experts=2
        ),
        "layer 0 gives its cache keys",
    ),
    "mixers": (
        lambda: FalconH1Config(
            **SIZES,
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=16,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_d_ssm=128,
            mamba_d_state=8,
            mamba_n_groups=1,
        ),
        "layer 0 of FalconH1ForCausalLM shares its cache layer",
    ),
    "shared": (
        lambda: Gemma3nTextConfig(
            **SIZES,
            vocab_size_per_layer_input=96,
            num_hidden_layers=4,
            num_key_value_heads=2,
            head_dim=16,
            num_kv_shared_layers=2,
            sliding_window=512,
            layer_types=["sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            activation_sparsity_pattern=None,
            altup_num_inputs=2,
        ),
        "layer 3 of Gemma3nForCausalLM reads keys that another layer stores",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_caches_that_a_plan_cannot_fill_are_refused_with_the_reason(name: str) -> None:
    """At patch time, with nothing changed; plans for prompts run."""
    config, message = REFUSED[name]
    model = build(config())
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    with pytest.raises(PlanError, match=message):
        keeping(model, FULL)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    ids = text(40, 1)
    before = logits(model, ids, use_cache=False)
    sites = attention_sites(model)
    whole = Approximation(Window(4096))
    rows = [[catalog.DENSE if s.sliding_window else whole] * s.heads for s in sites]
    patch_assignment(model, rows)
    assert close(logits(model, ids, use_cache=False), before)
    assert any("plan" in counts for counts in patched_stats(model).values())


def test_the_proof_leaves_no_trace(model: PreTrainedModel) -> None:
    """Random numbers, training flags, counts and notes are as they were."""
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    keeping(model, NARROW)
    assert torch.equal(torch.rand(4), expected)
    assert all(module.training for module in model.modules())
    assert all(not counts for counts in patched_stats(model).values())
    assert RUNNING.get() is None


def test_a_model_that_adds_to_its_attention_is_refused(model: PreTrainedModel) -> None:
    """Something besides causal attention, which only the running model shows."""
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.scaling = 0.5
    patch_assignment(model, [[Approximation(Window(4096))] * 4] * 2)  # known to the interface
    unpatch(model)

    forward = attention.forward

    def strange(hidden_states: Tensor, **options: Any) -> Any:
        if model.config._attn_implementation == "attnplan":
            hidden_states = hidden_states * 2
        return forward(hidden_states, **options)

    attention.forward = strange
    with pytest.raises(PlanError, match=r"layer 1 \(model.layers.1.self_attn\) computes more than"):
        patch_assignment(model, [[Approximation(Window(4096))] * 4] * 2)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_that_outlives_its_plan_is_given_back(model: PreTrainedModel) -> None:
    """Where all was kept, as after `unpatch` and after `applied`; also rows of a padded batch."""
    ids, one = text(100), text(1)
    mask = torch.ones(2, 101, dtype=torch.long)
    mask[1, :30] = 0
    for given in ({}, {"attention_mask": mask}):
        begun = {name: m[:, :100] for name, m in given.items()}
        expected = logits(model, one, cache=filled(model, ids, **begun), **given)
        keeping(model, FULL)
        cache = filled(model, ids, **begun)
        unpatch(model)
        assert close(logits(model, one, cache=cache, **given), expected)
        assert cache.get_seq_length() == 101


def test_a_condensed_cache_does_not_outlive_its_plan(model: PreTrainedModel) -> None:
    """One sentence instead, after `unpatch`, under another plan, and on another model."""
    cache = filled(keeping(model, NARROW), text(150, 1))
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="layer 0: this cache was filled under a plan that does"):
        logits(unpatch(other), text(1, 1), cache=cache)
    with pytest.raises(ValueError, match="a cache that was filled under another plan cannot"):
        logits(keeping(other, WIDE), text(1, 1), cache=cache)
    unpatch(model)
    with pytest.raises(ValueError, match="layer 0: this cache was filled under a plan that does"):
        logits(model, text(1, 1), cache=cache)
    assert cache.get_seq_length() == 150
    logits(keeping(model, NARROW), text(1, 1), cache=cache)  # the same plan goes on
    assert cache.get_seq_length() == 151


def test_a_plain_cache_is_not_taken_for_a_planned_one(model: PreTrainedModel) -> None:
    """Given back once, it is refused by the plan; a cache that was only converted is plain."""
    keeping(model, WIDE)
    cache = filled(model, text(50, 1))
    with torch.no_grad():
        unpatch(model)
        logits(model, text(1, 1), cache=cache)
    keeping(model, WIDE)
    with pytest.raises(ValueError, match="a cache that was filled without it"):
        logits(model, text(1, 1), cache=cache)


HIDDEN = torch.ones(2, 101, dtype=torch.long)
HIDDEN[:, 10:60] = 0


@pytest.mark.parametrize("keeper", [FULL, WIDE])
def test_a_mask_over_the_past_is_followed_where_all_is_kept(
    model: PreTrainedModel, keeper: Keeper
) -> None:
    """A passage is hidden for a token, shown to the next, and the first row is padded besides."""
    ids, tokens = text(100), text(4)
    padded = torch.ones(2, 104, dtype=torch.long)
    padded[0, :7] = 0
    masks = [HIDDEN, padded[:, :102], padded[:, :103].clone(), None]
    masks[0] = HIDDEN * padded[:, :101]
    masks[2][1, 50:] = 0  # type: ignore[index]
    masks[2][1, -1] = 1  # type: ignore[index]
    if keeper is FULL:
        masks[3] = torch.ones(2, 104, dtype=torch.long)  # even padding is shown
    else:
        masks[3] = padded

    def run() -> Tensor:
        cache = filled(model, ids, attention_mask=padded[:, :100])
        steps = [
            logits(model, tokens[:, i : i + 1], cache=cache, attention_mask=mask)
            for i, mask in enumerate(masks)
        ]
        return torch.cat(steps, 1)

    expected = run()
    assert close(run_under(model, keeper, run), expected)


def run_under(model: PreTrainedModel, keeper: Keeper, run: Any) -> Tensor:
    keeping(model, keeper)
    found: Tensor = run()
    unpatch(model)
    return found


def test_a_mask_over_a_condensed_past_is_refused_before_the_cache_changes(
    model: PreTrainedModel,
) -> None:
    """Although the first layer keeps all; afterwards the cache goes on as if nothing had been."""
    ids, one = text(100), text(1)
    keeping(model, FULL, NARROW)
    cache, other = filled(model, ids), filled(model, ids)
    with pytest.raises(ValueError, match="layer 1: the attention mask hides tokens of a past that"):
        logits(model, one, cache=cache, attention_mask=HIDDEN)
    with pytest.raises(ValueError, match="needs a causal mask with padding at most"):
        logits(model, one, cache=cache, attention_mask=torch.ones(2, 1, 1, 101).bool())
    with pytest.raises(ValueError, match="output_attentions needs"):
        logits(model, one, cache=cache, output_attentions=True)
    with pytest.raises(ValueError, match="planned attention is for inference"):
        model(input_ids=one, cache=cache, use_cache=True)
    assert cache.get_seq_length() == 100
    assert torch.equal(logits(model, one, cache=cache), logits(model, one, cache=other))


def test_padding_that_was_left_out_cannot_be_shown(model: PreTrainedModel) -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    keeping(model, WIDE)
    cache = filled(model, text(40), attention_mask=mask)
    with pytest.raises(ValueError, match="shows tokens that were padding"):
        logits(model, text(1), cache=cache)
    unpatch(model)
    with pytest.raises(ValueError, match="padding was left out"):
        logits(model, text(1), cache=cache, attention_mask=torch.ones(2, 41))


def test_a_call_that_breaks_off_halfway_is_told_by_the_next(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer has taken a token that the second has not."""
    keeping(model, NARROW)
    cache = filled(model, text(60, 1))

    def fail(*args: Any) -> Any:
        raise MemoryError("no more")

    with monkeypatch.context() as context:
        context.setattr(type(model.get_submodule("model.layers.0.mlp")), "forward", fail)
        with pytest.raises(MemoryError):
            logits(model, text(1, 1), cache=cache)
    assert RUNNING.get() is None
    with pytest.raises(ValueError, match="hold 60 and 61 tokens, because an earlier call broke"):
        logits(model, text(1, 1), cache=cache)


def test_rows_are_not_counted_before_they_are_stored(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out while storing: the token is as if it had not been given."""
    from attnplan.kernels.kv_cache import layer_cache

    keeping(model, NARROW)
    ids, one = text(60, 1), text(2, 1)
    cache, other = filled(model, ids), filled(model, ids)

    def fail(*args: Any) -> Any:
        raise MemoryError("no more")

    with monkeypatch.context() as context:
        context.setattr(layer_cache._Group, "reserve", fail)
        with pytest.raises(MemoryError):
            logits(model, one, cache=cache)
    assert [layer.store.rows for layer in cache.layers] == [(60, 60)] * 2
    assert [layer.get_seq_length() for layer in cache.layers] == [60, 60]
    assert torch.equal(logits(model, one, cache=cache), logits(model, one, cache=other))


def test_a_token_is_not_counted_before_its_attention(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, where one token is stored and attended to at once."""
    from attnplan.kernels.kv_cache.layer_cache import LayerStore

    keeping(model, NARROW)
    ids, one = text(60, 1), text(1, 1)
    cache, other = filled(model, ids), filled(model, ids)

    def fail(*args: Any) -> Any:
        raise MemoryError("no more")

    with monkeypatch.context() as context:
        context.setattr(LayerStore, "step", fail)
        with pytest.raises(MemoryError):
            logits(model, one, cache=cache)
    assert [layer.store.rows for layer in cache.layers] == [(60, 60)] * 2
    assert [layer.get_seq_length() for layer in cache.layers] == [60, 60]
    assert torch.equal(logits(model, one, cache=cache), logits(model, one, cache=other))


@pytest.mark.parametrize("keeper", [FULL, NARROW])
def test_inference_mode_may_come_and_go(model: PreTrainedModel, keeper: Keeper) -> None:
    ids = text(120)
    keeping(model, keeper)
    expected = filled(model, ids)
    with torch.inference_mode():
        cache = filled(model, ids)
        cache.reorder_cache(torch.tensor([0, 1]))
    for step in range(70):
        one = ids[:, step : step + 1]
        with torch.inference_mode(step % 3 == 1):
            found = logits(model, one, cache=cache)
        assert torch.equal(found, logits(model, one, cache=expected))


def plan_within(model: PreTrainedModel, context: tuple[int, int]) -> Plan:
    kept = ((Recent(32, 2),) * 2,) * 2
    target = Target("here", "cpu", "float32", "cpu", {})
    return Plan(identity(model), target, {}, (), decode=(DecodeSection(context, kept),))


def test_a_decode_section_holds_within_its_context_alone(model: PreTrainedModel) -> None:
    """Shorter texts and longer prompts are kept whole, counted, and the long ones told once."""
    patch(model, plan_within(model, (100, 200)))
    unplanned = build(CONFIGS["llama"]())
    for length, reason, is_whole in ((60, SHORT, True), (150, KEPT, False), (250, LONG, True)):
        reset_stats(model)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            cache = filled(model, text(length, 1))
            found = logits(model, text(1, 1), cache=cache)
        assert patched_stats(model)[0][reason] == 1
        assert [("kept" in str(w.message)) for w in told] == [True] * (reason == LONG)
        expected = logits(unplanned, text(1, 1), cache=filled(unplanned, text(length, 1)))
        assert close(found, expected) == is_whole
    filled(model, text(260, 1))  # not told again


def test_condensing_begins_where_the_section_begins(model: PreTrainedModel) -> None:
    patch(model, plan_within(model, (100, 200)))
    cache = filled(model, text(95, 1))
    rows = []
    with pytest.warns(UserWarning, match="has grown to 201 tokens"):
        for _ in range(110):
            logits(model, text(1, 1), cache=cache)
            rows.append(cache.layers[0].store.rows[0])
    assert rows[:4] == [96, 97, 98, 99]
    assert rows[4] == 34
    assert max(rows[4:]) <= 34 + 32


def test_each_row_of_a_batch_has_its_own_context(model: PreTrainedModel) -> None:
    """A row that is too short beside one that is not."""
    patch(model, plan_within(model, (100, 200)))
    ids, mask = text(150), torch.ones(2, 150, dtype=torch.long)
    mask[1, :80] = 0
    reset_stats(model)
    cache = filled(model, ids, attention_mask=mask)
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    logits(model, text(1), cache=cache, attention_mask=more)
    assert patched_stats(model)[0] == {"dense layer": 1, KEPT: 1, SHORT: 1}
    assert sorted(r.length for r in cache.layers[0].store.stored) == [35, 71]


def test_a_copy_lives_alone(model: PreTrainedModel) -> None:
    """By pickle, torch.save and deepcopy: same answers, own counts, unpatched alone."""
    ids = text(120, 1)
    keeping(model, NARROW)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(model),
    ]
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, **options)
    counts = patched_stats(model)
    for each in copies:
        assert all(not c for c in patched_stats(each).values())
        assert torch.equal(each.generate(ids, **options), expected)
        assert patched_stats(each) == counts
        unpatch(each)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in each.modules())
        assert not any(isinstance(x, PlanLayer) for x in filled(each, ids).layers)
    assert patched_stats(model) == counts
    assert torch.equal(model.generate(ids, **options), expected)


def test_threads_do_not_see_each_others_caches(model: PreTrainedModel) -> None:
    keeping(model, NARROW)
    texts = [text(100 + 10 * n, 1) for n in range(3)]
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    expected = [model.generate(ids, **options) for ids in texts]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        found[number] = model.generate(texts[number], **options)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(3))


def test_without_a_cache_nothing_is_kept(model: PreTrainedModel) -> None:
    """`use_cache=False`, also right after a call that filled one."""
    ids = text(120, 1)
    expected = logits(model, ids, use_cache=False)
    keeping(model, NARROW)
    cache = filled(model, ids)
    assert torch.equal(logits(model, ids, use_cache=False), expected)
    assert cache.get_seq_length() == 120
    made = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, unpatch(model).generate(ids, max_new_tokens=4, do_sample=False))


def test_a_cache_can_be_emptied_copied_and_cropped(model: PreTrainedModel) -> None:
    """`reset`, `deepcopy` as prefix caches do, `crop` below the limit, more rows of the batch."""
    ids, one = text(60, 1), text(1, 1)
    keeping(model, WIDE)
    cache = filled(model, ids)
    again = copy.deepcopy(cache)
    expected = logits(model, one, cache=cache)
    assert torch.equal(logits(model, one, cache=again), expected)
    assert cache.get_seq_length() == again.get_seq_length() == 61
    cache.crop(-1)
    assert close(logits(model, one, cache=cache), expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    logits(model, ids, cache=cache, use_cache=True)
    assert close(logits(model, one, cache=cache), expected)
    again.batch_repeat_interleave(3)
    assert logits(model, one.expand(3, -1), cache=again).shape[0] == 3
    assert stored_bytes(again) == 3 * stored_bytes(cache)


def test_half_a_model_can_be_copied(model: PreTrainedModel) -> None:
    """The body alone, with its hooks, follows the plan too."""
    keeping(model, NARROW)
    body = copy.deepcopy(model.base_model)
    with torch.no_grad():
        cache = body(input_ids=text(150, 1), use_cache=True)
        cache = cache["cache" if "cache" in cache else "past_key_values"]
    assert cache.layers[0].store.rows == (34, 34)
    assert all(not c for c in patched_stats(model).values())
    assert RUNNING.get() is None


def test_another_dtype_between_calls(model: PreTrainedModel) -> None:
    """A cache of one dtype is not continued in another; a new one is."""
    keeping(model, NARROW)
    cache = filled(model, text(60, 1))
    model.to(torch.bfloat16)
    with pytest.raises(Exception):  # noqa: B017
        logits(model, text(1, 1), cache=cache)
    assert filled(model, text(60, 1)).layers[0].store.stored[0].key.dtype == torch.bfloat16


def test_plans_of_other_files_go_on(model: PreTrainedModel) -> None:
    """`applied` inside a patch: its caches are its own."""
    keeping(model, NARROW)
    plan = plan_within(model, (1, 400))
    with applied(model, replace(plan)):
        inner = filled(model, text(100, 1))
    cache = DynamicCache(config=model.config)
    logits(model, text(100, 1), cache=cache, use_cache=True)
    assert inner.layers[0].context == (1, 400)
    assert cache.layers[0].context == (1, None)
