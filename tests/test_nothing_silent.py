"""Nothing silent, over architectures: a plan that keeps everything changes nothing, or is refused.

Tiny models with random weights. A decode plan of `full` keepers, a decode plan whose keepers have
limits that are not reached, a plan for prompts that reads every key: each generates the tokens of
the plain model, in padded batches too, or is refused in one sentence when the model is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnplan.kernels import catalog
from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.kernels.selectors.window import Window
from attnplan.models.attention_sites import AttentionSite, attention_sites
from attnplan.runtime.attention import KEPT, PLANNED
from attnplan.runtime.patch import patch_assignment, patched_stats, unpatch

TOKENS = 64
PROMPT, PAD = 24, 9
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
}
RUN = ""
"""Nothing is refused."""
MODELS: dict[str, tuple[dict[str, Any], str, str]] = {
    # class of the configuration: its options, why decode plans are refused, why all plans are
    "LlamaConfig": (HEAD, RUN, RUN),
    "MistralConfig": ({**HEAD, "sliding_window": 40}, RUN, RUN),
    "Qwen2Config": ({}, RUN, RUN),
    "Qwen3Config": (HEAD, RUN, RUN),
    "Qwen3MoeConfig": ({**HEAD, **EXPERTS}, RUN, RUN),
    "MixtralConfig": ({**HEAD, "num_local_experts": 4, "sliding_window": None}, RUN, RUN),
    "GemmaConfig": (HEAD, RUN, RUN),
    "Gemma2Config": ({**HEAD, **MIXED}, RUN, "soft-capped"),
    "Gemma3TextConfig": ({**HEAD, **MIXED}, RUN, RUN),
    "Gemma3nTextConfig": (
        {
            **HEAD,
            "vocab_size_per_layer_input": 96,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
            "altup_num_inputs": 2,
        },
        "reads keys that another layer stores",
        RUN,
    ),
    "Phi3Config": ({}, RUN, RUN),
    "Olmo2Config": ({}, RUN, RUN),
    "GraniteConfig": ({}, RUN, RUN),
    "Cohere2Config": ({**HEAD, **MIXED}, RUN, RUN),
    "GPTNeoXConfig": ({"num_key_value_heads": 4}, RUN, RUN),
    "OPTConfig": ({"ffn_dim": 32, "word_embed_proj_dim": 32}, RUN, RUN),
    "GPT2Config": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "num_key_value_heads": 4},
        RUN,
        RUN,
    ),
    "StableLmConfig": ({}, RUN, RUN),
    "Starcoder2Config": ({}, RUN, RUN),
    "SmolLM3Config": ({}, RUN, RUN),
    "Glm4Config": (HEAD, RUN, RUN),
    "GptOssConfig": (
        {**HEAD, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
        RUN,
        "learned sink logits",
    ),
    "Llama4TextConfig": (
        {
            **HEAD,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        RUN,
        RUN,
    ),
    "Lfm2Config": (
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
        RUN,
        RUN,
    ),
    "Qwen3NextConfig": (
        {
            **HEAD,
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 32,
        },
        RUN,
        RUN,
    ),
    "FalconH1Config": (
        {
            **HEAD,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_ssm": 64,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        "shares its cache layer",
        RUN,
    ),
    "DeepseekV2Config": (LATENT, "gives its cache keys", RUN),
    "DeepseekV3Config": (LATENT, "gives its cache keys", RUN),
    "JetMoeConfig": ({"kv_channels": 8, "num_local_experts": 2}, "gives its cache keys", RUN),
    "BloomConfig": ({"n_layer": 2, "n_head": 4}, RUN, "does not use AttentionInterface"),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**BASE, **MODELS[name][0]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights, so that heads attend to something
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def tokens(model: PreTrainedModel, count: int, *, padded: bool) -> Tensor:
    """What the model generates: of one text, or of that beside a shorter one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :PAD], ids[1, :PAD] = 0, 0
    if not padded:
        ids, mask = ids[:1], mask[:1]
    made: Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return made


def is_local(model: PreTrainedModel, site: AttentionSite) -> bool:
    """Whether a layer has a window or chunks of its own."""
    kinds = getattr(model.config, "layer_types", None)
    index: Any = model.get_submodule(site.name).layer_idx
    chunked = kinds is not None and kinds[index] == "chunked_attention"
    return chunked or site.sliding_window is not None


def decoding(keeper: Keeper) -> Callable[[PreTrainedModel], None]:
    def patch(model: PreTrainedModel) -> None:
        sites = attention_sites(model)
        kept = [[Full() if is_local(model, s) else keeper] * s.kv_heads for s in sites]
        patch_assignment(model, [[catalog.DENSE] * s.heads for s in sites], keepers=kept)

    return patch


def reading(model: PreTrainedModel) -> None:
    every = Approximation(Window(4096))
    rows = [
        [catalog.DENSE if is_local(model, site) else every] * site.heads
        for site in attention_sites(model)
    ]
    patch_assignment(model, rows)


Case = tuple[Callable[[PreTrainedModel], None], str, list[tuple[int, bool]]]


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_that_leaves_nothing_out_changes_nothing_or_is_refused(name: str) -> None:
    model = build(name)
    decode_refused, refused = MODELS[name][1:]
    whole = {padded: tokens(model, TOKENS, padded=padded) for padded in (False, True)}
    windows = not refused and all(is_local(model, site) for site in attention_sites(model))
    cases: list[Case] = [
        (decoding(Full()), KEPT, [(TOKENS, False), (TOKENS, True)]),
        (decoding(Recent(window=256)), KEPT, [(TOKENS, True)]),
        (reading, PLANNED, [(TOKENS, True), (4, False)]),
    ]
    for patch, wanted, runs in cases:
        reason = refused or (decode_refused if wanted == KEPT else RUN)
        if reason:
            with pytest.raises(ValueError, match=reason) as told:
                patch(model)
            assert ". " not in str(told.value)
            runs = [(4, True)]
        else:
            patch(model)
        for count, padded in runs:
            found = tokens(model, count, padded=padded)
            assert torch.equal(found, whole[padded][:, : PROMPT + count]), (wanted, padded)
        if not reason:
            counts = [set(each) for each in patched_stats(model).values()]
            assert windows or any(wanted in each for each in counts)
        unpatch(model)
