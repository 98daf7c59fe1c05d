"""Models load by any of their names, say who they are, or are refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from attnplan.models.attention_sites import attention_sites
from attnplan.models.load import (
    check_context,
    identity,
    load_model,
    load_weights,
    parse_dtype,
    weights_digest,
    weights_magnitudes,
)
from attnplan.profiles.records import magnitudes


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def test_identity_tells_sizes_and_rotary_parameters() -> None:
    found = identity(llama(), "tiny")
    assert (found.name, found.architecture) == ("tiny", "LlamaForCausalLM")
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 4, 2, 16)
    assert found.rope["rope_theta"] == 10000.0
    assert found.max_context == 512


def test_attention_modules_are_found_without_leaving_a_trace() -> None:
    model = llama()
    sites = attention_sites(model)
    assert [s.name for s in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_rotary_embedding_has_an_identity() -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    found = identity(GPT2LMHeadModel(config).eval())
    assert (found.layers, found.heads, found.kv_heads, dict(found.rope)) == (2, 2, 2, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_copy_in_another_dtype_is_the_same_model(dtype: torch.dtype) -> None:
    assert identity(llama().to(dtype), "a").difference(identity(llama(), "b")) is None
    assert identity(llama().to(dtype), "a").fingerprint == identity(llama(), "b").fingerprint


@pytest.mark.parametrize("factor", [50.0, 2.0, 0.9])
@pytest.mark.parametrize("part", ["q_proj", "layers.1.self_attn.q_proj", "embed_tokens", "norm"])
def test_weights_of_another_size_are_another_model(factor: float, part: str) -> None:
    mine, scaled = identity(llama()), llama()
    with torch.no_grad():
        for name, weight in scaled.named_parameters():
            if part in name:
                weight.mul_(factor)
    other = identity(scaled)
    assert mine.weights == other.weights
    assert " times as large" in str(mine.difference(other))
    older = replace(mine, magnitudes=None)  # as plans of today say it
    assert older.difference(other) is None and other.difference(older) is None
    assert older.fingerprint == mine.fingerprint


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(-24, 17).map(lambda exponent: 2.0**exponent),
    count=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 99),
)
def test_rounding_moves_no_magnitude_beyond_the_tolerance(
    scale: float, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, generator=generator) * scale
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(weights)})
    found = [weights_magnitudes(module)]
    for dtype in (torch.bfloat16, torch.float16):
        copy = torch.nn.ParameterDict({"w": torch.nn.Parameter(weights.to(dtype))})
        found.append(weights_magnitudes(copy))
    for one in found:
        for other in found:
            assert magnitudes.difference(one, other) is None


def test_other_weights_are_another_model() -> None:
    mine, other = identity(llama()), identity(llama(1))
    assert "weights is sha256:" in str(mine.difference(other))
    assert mine.fingerprint != other.fingerprint


def test_a_short_fine_tuning_changes_the_digest() -> None:
    model = llama()
    before = weights_digest(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.arange(50)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert weights_digest(model) != before


def test_rotary_parameters_tell_models_apart_where_both_spell_them() -> None:
    mine = identity(llama())
    other = replace(mine, rope={**mine.rope, "rope_theta": 1e6})
    assert mine.difference(other) == "rope rope_theta is 10000.0, not 1000000.0"
    assert mine.difference(replace(mine, rope={**mine.rope, "new": 1})) is None


def test_context_beyond_the_model_is_refused() -> None:
    found = identity(llama(), "tiny")
    check_context(found, 512)
    with pytest.raises(ValueError, match="context 513 is longer than the 512 tokens that tiny"):
        check_context(found, 513)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        check_context(found, 0)


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2))


def bert() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertLMHeadModel(BertConfig(vocab_size=96, is_decoder=False, **sizes))


def t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, **sizes))


def headless() -> PreTrainedModel:
    return LlamaModel(llama().config)


def gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return GptOssForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bloom, "BloomForCausalLM does not use AttentionInterface"),
        (bert, "not causal"),
        (t5, "T5ForConditionalGeneration is no decoder-only causal language model"),
        (headless, "LlamaModel is no decoder-only causal language model"),
        (gpt_oss, "uses learned sink logits in model.layers.0.self_attn"),
    ],
)
def test_unplannable_models_are_refused(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        identity(build().eval())


def test_a_saved_model_loads_in_any_dtype(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "tiny")
    loaded = load_weights(str(tmp_path / "tiny"), dtype="bf16")
    assert loaded.dtype == torch.bfloat16
    assert identity(loaded, str(tmp_path / "tiny")).name == "tiny"
    assert identity(loaded).difference(identity(model)) is None


def test_names_that_are_no_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    llama().config.save_pretrained(tmp_path / "empty")
    for name, message in {
        str(tmp_path): "has no config.json, so it is no model directory",
        str(tmp_path / "notes.txt"): "is a file, but no .gguf file",
        str(tmp_path / "nothing"): "there is no file or directory",
        "./nothing": "there is no file or directory ./nothing",
        "model.gguf": "there is no file or directory model.gguf",
        "a/b/c": "neither a path that exists nor a Hugging Face id",
        "nobody/has-this": "the Hugging Face hub does not have it or cannot be reached",
        str(tmp_path / "broken"): "cannot load",
        str(tmp_path / "empty"): "cannot load",
    }.items():
        with pytest.raises(ValueError, match=message) as raised:
            load_model(name)
        assert "\n" not in str(raised.value)


def test_dtypes_go_by_name() -> None:
    assert parse_dtype("bf16") == parse_dtype(torch.bfloat16) == torch.bfloat16
    assert parse_dtype("auto") == "auto"
    with pytest.raises(ValueError, match="unknown dtype 'int3'; known: auto, float32"):
        parse_dtype("int3")


@pytest.mark.model
def test_the_demo_model_loads_without_network() -> None:
    loaded = load_model("smollm2-135m", dtype="float32")
    found = loaded.identity
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (30, 9, 3, 64)
    assert not hasattr(loaded.model.config, "quantization_config")
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        next_token = loaded.model(ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(next_token) == " Paris"
