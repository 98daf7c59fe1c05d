"""Tiny random causal language models of many architectures."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 96
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED: dict[str, Any] = SIZES | dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GPT2: dict[str, Any] = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256)
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "OPT": ("OPTForCausalLM", SIZES | dict(ffn_dim=32, word_embed_proj_dim=32)),
    "OPT, projected": ("OPTForCausalLM", SIZES | dict(ffn_dim=32, word_embed_proj_dim=16)),
    "GPT-2": ("GPT2LMHeadModel", GPT2),
    "GPT-2, untied": ("GPT2LMHeadModel", GPT2 | dict(tie_word_embeddings=False)),
    "GPT-NeoX": ("GPTNeoXForCausalLM", SIZES),
    "Phi": ("PhiForCausalLM", SIZES),
    "Phi-3": ("Phi3ForCausalLM", GROUPED),
    "Gemma": ("GemmaForCausalLM", GROUPED),
    "Gemma 2": ("Gemma2ForCausalLM", GROUPED | dict(attn_logit_softcapping=None)),
    "Gemma 3": ("Gemma3ForCausalLM", GROUPED | dict(final_logit_softcapping=2.0)),
    "Cohere": ("CohereForCausalLM", GROUPED | dict(logit_scale=0.5)),
    "Cohere 2": ("Cohere2ForCausalLM", GROUPED | dict(logit_scale=4.0)),
    "Granite": ("GraniteForCausalLM", GROUPED | dict(logits_scaling=0.25)),
    "OLMo 2": ("Olmo2ForCausalLM", GROUPED),
    "StableLM": ("StableLmForCausalLM", GROUPED),
    "Qwen 2": ("Qwen2ForCausalLM", GROUPED),
    "Qwen 3": ("Qwen3ForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", GROUPED),
    "SmolLM 3": ("SmolLM3ForCausalLM", GROUPED),
    "Starcoder 2": ("Starcoder2ForCausalLM", GROUPED),
    "Mixtral": ("MixtralForCausalLM", GROUPED | EXPERTS),
    "Qwen 2 MoE": ("Qwen2MoeForCausalLM", GROUPED | EXPERTS),
    "BioGPT": ("BioGptForCausalLM", SIZES),
    "Persimmon": ("PersimmonForCausalLM", SIZES),
    "Nemotron": ("NemotronForCausalLM", GROUPED),
    "ModernBERT decoder": ("ModernBertDecoderForCausalLM", SIZES | dict(local_attention=512)),
    "BERT decoder": ("BertLMHeadModel", SIZES | dict(is_decoder=True)),
    "BART decoder": ("BartForCausalLM", dict(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=32, max_position_embeddings=256)),
    "Falcon H1": ("FalconH1ForCausalLM", GROUPED | dict(
        mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)),
    "NanoChat": ("NanoChatForCausalLM", GROUPED),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of `TEXTS`, with larger weights, so that heads attend to something."""
    architecture, sizes = TEXTS[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).to(dtype).eval()
    return enlarged(model)


def enlarged(model: Any) -> Any:
    """The model with larger weights, and with biases."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(10 if any(part in name for part in ("embed", "wte", "wpe")) else 3)
            else:
                weight.add_(torch.randn_like(weight) / 5)
    return model


def seeing() -> Any:
    """A model of images and text."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=GROUPED,
        vision_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        image_token_index=95,
        mm_tokens_per_image=4,
    )
    return enlarged(transformers.Gemma3ForConditionalGeneration(config).eval())


def text(tokens: int, seed: int = 1) -> Tensor:
    """Random ids without the special ones, int64 [tokens]."""
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))
