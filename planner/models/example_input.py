"""A small input of the kind that a model reads: two tokens, one image, a second of sound, a series.

Sizes come from the configuration, and what a forward pass takes from its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnplan.profiles.capture.output_head import input_device

SAMPLES = 4000
"""Of raw sound: a quarter of a second."""
FRAMES = 64
"""Of sound as a spectrogram, where the configuration does not say how many."""


def examples(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """What to call a model with: its main input alone, then together with all that it takes.

    Raises:
        ValueError: nothing is known about the main input.
    """
    main = model.main_input_name
    main = main if isinstance(main, str) else main[0]
    if main not in _MAKERS:
        raise ValueError(
            f"{type(model).__name__} reads {main}, of which attnplan can make no example: it is "
            "for models of tokens, images, videos and sound"
        )
    return _examples(model, main)


def _examples(model: PreTrainedModel, main: str) -> Iterator[dict[str, Any]]:
    accepted = inspect.signature(model.forward).parameters
    generates = {"use_cache": False} if model.can_generate() else {}
    alone = {main: _made(model, main)}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        alone["decoder_input_ids"] = _tokens(model)
    yield alone | generates
    others = [name for name in _MAKERS if name in accepted and name != main]
    if others:
        yield alone | {name: _made(model, name) for name in others} | generates


def _made(model: PreTrainedModel, name: str) -> Tensor:
    made = _MAKERS[name](model)
    return made.to(model.dtype) if made.is_floating_point() else made


def _tokens(model: PreTrainedModel) -> Tensor:
    return torch.zeros(1, 2, dtype=torch.long, device=input_device(model))


def _image(model: PreTrainedModel) -> Tensor:
    height, width = _pair(_size(model, "image_size", "input_size", default=224))
    channels = _size(model, "num_channels", "in_channels", "in_chans", default=3)
    frames = _size(model, "num_frames", "frames_per_clip", default=0)
    sizes = (frames, channels, height, width) if frames else (channels, height, width)
    return torch.zeros(1, *sizes, device=model.device)


def _video(model: PreTrainedModel) -> Tensor:
    height, width = _pair(_size(model, "image_size", "crop_size", "input_size", default=224))
    channels = _size(model, "num_channels", "in_channels", "in_chans", default=3)
    frames = _size(model, "num_frames", "frames_per_clip", default=16)
    return torch.zeros(1, frames, channels, height, width, device=model.device)


def _sound(model: PreTrainedModel) -> Tensor:
    mels = _size(model, "num_mel_bins", default=0)
    if mels and not hasattr(model.config, "conv_kernel"):
        return torch.zeros(1, _size(model, "max_length", default=FRAMES), mels, device=model.device)
    channels = _size(model, "audio_channels", default=0)
    sizes = (channels, SAMPLES) if channels else (SAMPLES,)
    return torch.zeros(1, *sizes, device=model.device)


def _features(model: PreTrainedModel) -> Tensor:
    mels = _size(model, "num_mel_bins", default=0)
    positions = _size(model, "max_source_positions", default=0)
    if mels and positions:
        return torch.zeros(1, mels, 2 * positions, device=model.device)
    width = _size(
        model, "feature_projection_input_dim", "input_feat_per_channel", "feature_size",
        default=mels or 80,
    )  # fmt: skip
    return torch.zeros(1, FRAMES, width, device=model.device)


_MAKERS: dict[str, Callable[[PreTrainedModel], Tensor]] = {
    "input_ids": _tokens,
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "input_values": _sound,
    "input_features": _features,
}


def _size(model: PreTrainedModel, *names: str, default: Any) -> Any:
    """A size by any of its names in the configuration or in those inside it."""
    config = model.config
    inside = (getattr(config, key, None) for key in config.sub_configs)
    for one in (config, *inside):
        for name in names:
            found = getattr(one, name, None)
            if found is not None:
                return found
    return default


def _pair(size: Any) -> tuple[int, int]:
    """Height and width, from one number or two."""
    if isinstance(size, int):
        return size, size
    height, width = list(size)[-2:]
    return int(height), int(width)
