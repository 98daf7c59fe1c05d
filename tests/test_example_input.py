"""Attention is found in models of every kind, or one sentence says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnplan.models.attention_sites import attention_calls, attention_sites, implementations
from attnplan.runtime.encoder import patch_encoder

SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
)
BOTH: dict[str, Any] = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
)
SOUND = SIZES | dict(
    conv_dim=(16, 16),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
    apply_spec_augment=False,
)
SEEN = SIZES | dict(image_size=32, patch_size=16)
WORDS = SIZES | dict(vocab_size=64, max_position_embeddings=32)
SERIES = BOTH | dict(
    prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1
)
T5 = dict(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=64)
STATES = dict(hidden_size=32, num_hidden_layers=2, vocab_size=64)
PATCHED: dict[str, dict[str, Any]] = {
    "Wav2Vec2Model": SOUND,
    "HubertModel": SOUND,
    "ASTModel": SIZES
    | dict(max_length=64, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8),
    "ViTModel": SEEN,
    "Dinov2Model": SEEN,
    "VideoMAEModel": SEEN | dict(num_frames=4, tubelet_size=2),
    "VJEPA2Model": SEEN
    | dict(
        crop_size=32,
        frames_per_clip=4,
        mlp_ratio=1,
        pred_hidden_size=32,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=1,
    ),
    "SiglipModel": dict(text_config=WORDS, vision_config=SEEN),
    "BertModel": WORDS,
}
"""Encoders that an operator runs in."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "WavLMModel": (SOUND, "does not use AttentionInterface"),
    "Wav2Vec2BertModel": (
        SIZES | dict(feature_projection_input_dim=16),
        "uses a position bias on the attention scores",
    ),
    "WhisperModel": (
        BOTH
        | dict(vocab_size=64, num_mel_bins=16, max_source_positions=20, max_target_positions=20)
        | dict(decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        "has a decoder",
    ),
    "BartModel": (BOTH | dict(vocab_size=64), "has a decoder"),
    "T5EncoderModel": (T5, "uses a position bias"),
    "CLIPModel": (
        dict(
            text_config=WORDS | dict(bos_token_id=1, eos_token_id=2, projection_dim=16),
            vision_config=SEEN,
            projection_dim=16,
        ),
        "is causal",
    ),
    "TimesformerModel": (SEEN | dict(num_frames=2), "does not use AttentionInterface"),
    "TimeSeriesTransformerModel": (SERIES, "has a decoder"),
    "PatchTSTModel": (
        dict(context_length=32, num_input_channels=2, d_model=32, num_attention_heads=4),
        "reads past_values, of which attnplan can make no example",
    ),
    "DacModel": (
        dict(encoder_hidden_size=8, decoder_hidden_size=32, hidden_size=32, codebook_size=16)
        | dict(downsampling_ratios=[2, 2], upsampling_ratios=[2, 2]),
        "did not run on an example of its input_values",
    ),
    "EncodecModel": (
        dict(num_filters=4, hidden_size=16, codebook_size=16, upsampling_ratios=[4, 2]),
        "does not use AttentionInterface",
    ),
    "MambaForCausalLM": (STATES | dict(state_size=4), "does not use AttentionInterface"),
    "RwkvForCausalLM": (STATES | dict(attention_hidden_size=32), "does not use AttentionInterface"),
    "MusicgenForCausalLM": (SIZES | dict(ffn_dim=32, vocab_size=64), "did not run on an example"),
}
SIZES_OF = PATCHED | {name: sizes for name, (sizes, _) in REFUSED.items()}


def made(name: str) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**SIZES_OF[name])).eval()


def first_value(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return value


@pytest.mark.parametrize("name", SIZES_OF)
def test_what_cannot_be_found_is_said_in_one_sentence(name: str) -> None:
    model = made(name)
    before = implementations(model)
    for find in (attention_calls, attention_sites):
        try:
            assert isinstance(find(model), list | tuple)
        except ValueError as error:
            said = str(error)
            assert type(model).__name__ in said and "\n" not in said and len(said) < 400
    assert implementations(model) == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_encoder_is_refused(name: str) -> None:
    model = made(name)
    before = implementations(model)
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        patch_encoder(model, first_value)
    assert implementations(model) == before


@pytest.mark.parametrize("name", PATCHED)
def test_encoders_of_every_kind_run_an_operator(name: str) -> None:
    model = made(name)
    calls = len(attention_calls(model))
    runs: list[int] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        runs.append(1)
        return value

    patch_encoder(model, counted)
    example = {
        "input_values": torch.zeros(1, 64, 16) if name == "ASTModel" else torch.zeros(1, 4000),
        "pixel_values": torch.zeros(1, *([4] if name == "VideoMAEModel" else []), 3, 32, 32),
        "pixel_values_videos": torch.zeros(1, 4, 3, 32, 32),
        "input_ids": torch.zeros(1, 2, dtype=torch.long),
    }
    names = ("input_ids", "pixel_values") if name == "SiglipModel" else (model.main_input_name,)
    with torch.no_grad():
        model(**{one: example[one] for one in names})
    assert len(runs) == calls > 0
