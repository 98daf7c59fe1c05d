"""Captures on tiny random models: what is kept is what the model computed."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from attnplan.profiles.capture.capture import NAME, SequenceCapture, capture, sample

TOKENS = torch.arange(3, 40)
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def tiny(
    kind: str = "Llama", dtype: torch.dtype = torch.float32, **more: object
) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():  # random projections at their usual size leave attention uniform
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name or "embed" in name:
                parameter.mul_(20)
    return model.eval()


def direct(model: torch.nn.Module, captured: SequenceCapture) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient) of every layer, from eager attention and plain autograd."""
    assert captured.labels is not None
    model.set_attn_implementation("eager")
    outputs: list[Tensor] = []

    def keep(module: object, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        outputs.append(args[0])

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in model.model.layers
    ]
    logits = model(captured.tokens[None]).logits[0]
    torch.nn.functional.cross_entropy(logits, captured.labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model.set_attn_implementation("sdpa")

    def heads(tensor: Tensor) -> Tensor:
        return tensor.detach().view(1, len(TOKENS), 4, -1).transpose(1, 2)

    return [(heads(o), heads(o.grad)) for o in outputs]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_is_that_of_autograd_through_eager_attention(recompute: bool) -> None:
    model = tiny()
    captured = capture(model, TOKENS, seed=5, recompute=recompute)
    for layer, (output, gradient) in zip(captured.layers, direct(model, captured), strict=True):
        assert layer.gradient is not None
        torch.testing.assert_close(layer.output, output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.gradient, gradient, rtol=1e-3, atol=1e-5)
        assert float(layer.gradient.abs().max()) > 1e-4


def test_recomputed_layers_give_the_same_gradients_and_are_recorded_once() -> None:
    model = tiny()
    plain = capture(model, TOKENS, recompute=False)
    twice = capture(model, TOKENS, recompute=True)
    assert len(plain.layers) == len(twice.layers) == 3
    for a, b in zip(plain.layers, twice.layers, strict=True):
        assert a.gradient is not None and b.gradient is not None
        torch.testing.assert_close(a.gradient, b.gradient)


def test_attention_over_the_captured_tensors_is_the_captured_output() -> None:
    for layer in capture(tiny(), TOKENS, gradients=False).layers:
        assert layer.query.shape == (1, 4, 37, 8) and layer.key.shape == (1, 2, 37, 8)
        again = torch.nn.functional.scaled_dot_product_attention(
            layer.query, layer.key, layer.value, is_causal=True, scale=layer.scale, enable_gqa=True
        )
        torch.testing.assert_close(layer.output, again)


def test_a_capture_leaves_the_model_as_it_was() -> None:
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    before = model(TOKENS[None]).logits
    capture(model, TOKENS, recompute=True)
    assert model.config._attn_implementation == "sdpa"
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
    assert torch.equal(before, model(TOKENS[None]).logits)


def test_the_model_is_restored_after_an_error() -> None:
    model = tiny("Mistral", sliding_window=16)
    with pytest.raises(ValueError, match=r"last 16 tokens only.*got 37"):
        capture(model, TOKENS)
    assert model.config._attn_implementation == "sdpa"
    assert len(capture(model, TOKENS[:15]).layers) == 3


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Olmo2"])
def test_queries_and_keys_before_rope_are_found(kind: str) -> None:
    for layer in capture(tiny(kind, head_dim=8, **SPECIAL), TOKENS).layers:
        for gram, after in (
            (layer.query_pre_gram, layer.query),
            (layer.key_pre_gram, layer.key),
        ):
            assert gram is not None
            energy = after[0].double().square().sum((1, 2))
            torch.testing.assert_close(
                gram.diagonal(dim1=1, dim2=2).sum(1), energy, rtol=1e-5, atol=0
            )
            first = after[0, :, 0].double()  # position 0 is not rotated
            rest = gram - first[:, :, None] * first[:, None]
            assert float(torch.linalg.eigvalsh(rest).min()) > -1e-4 * float(energy.max())


def test_fused_projections_leave_the_statistics_before_rope_out() -> None:
    for layer in capture(tiny("Phi3", **SPECIAL), TOKENS).layers:
        assert layer.query_pre_gram is None and layer.key_pre_gram is None
        assert layer.gradient is not None and layer.projection is not None


def test_a_model_that_scales_its_logits_is_sampled_from_its_scaled_logits() -> None:
    norms = []
    for scale in (1e-3, 1e-5):
        layer = capture(tiny("Cohere", logit_scale=scale, **SPECIAL), TOKENS).layers[0]
        assert layer.gradient is not None
        norms.append(float(layer.gradient.norm()))
    assert norms[1] < 0.02 * norms[0]


def test_labels_depend_on_the_seed_alone() -> None:
    model = tiny()
    first, again, other = (capture(model, TOKENS, seed=s).labels for s in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sampled_labels_follow_the_distribution() -> None:
    probability = torch.tensor([0.5, 0.0, 0.2, 0.3])
    draws = sample(
        probability.log().expand(20_000, 4),
        torch.rand(20_000, generator=torch.Generator().manual_seed(0)),
    )
    share = torch.bincount(draws, minlength=4) / 20_000
    assert share[1] == 0
    torch.testing.assert_close(share, probability, rtol=0, atol=0.015)  # 4 standard deviations


def test_bfloat16_models_and_storage_work() -> None:
    captured = capture(tiny(dtype=torch.bfloat16), TOKENS, store_dtype=torch.bfloat16)
    for layer in captured.layers:
        assert layer.gradient is not None
        assert layer.query.dtype == layer.gradient.dtype == torch.bfloat16
        assert layer.gradient.isfinite().all()


def test_one_token_can_be_captured() -> None:
    layer = capture(tiny(), TOKENS[:1]).layers[0]
    assert layer.output.shape == (1, 4, 1, 8) and layer.gradient is not None


def test_the_projection_norm_predicts_how_far_an_output_change_moves_the_residual() -> None:
    model = tiny()
    layer = capture(model, TOKENS, gradients=False).layers[0]
    assert layer.gradient is None and layer.projection is not None
    weight = model.model.layers[0].self_attn.o_proj.weight.detach()
    change = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    for head in range(4):
        moved = (change @ weight[:, 8 * head : 8 * head + 8].T).square().sum(1).mean().sqrt()
        predicted = layer.projection[head] * change.square().sum(1).mean().sqrt()
        torch.testing.assert_close(moved, predicted, rtol=0.05, atol=0)  # 4,000 samples


def test_what_cannot_be_captured_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="at least one token"):
        capture(model, TOKENS[:0])
    with pytest.raises(ValueError, match="causal language model, got LlamaModel"):
        capture(model.model, TOKENS)
    with pytest.raises(ValueError, match="uses softcap"):
        capture(tiny("Gemma2", head_dim=8, **SPECIAL), TOKENS)


def test_other_models_on_our_implementation_are_not_recorded() -> None:
    model = tiny()
    before = model(TOKENS[None]).logits
    model.set_attn_implementation(NAME)
    assert torch.equal(before, model(TOKENS[None]).logits)
