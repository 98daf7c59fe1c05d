"""Captured tensors between profiling and scoring: one safetensors file per text, in bfloat16.

They are a cache, not data: too large for the store, deleted once all candidates are scored, and
captured again where they are missing. Outputs are not kept; they follow from the rest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnplan.profiles.capture import LayerCapture, SequenceCapture

_TENSORS = ("query", "key", "value", "gradient", "projection")


class CaptureFiles:
    """The captured tensors of one profile run.

    Args:
        folder: where they are kept; made when the first text is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, sequence: int) -> bool:
        """Whether the tensors of this text are there, complete."""
        return self._path(sequence).exists()

    def save(self, sequence: int, captured: SequenceCapture) -> None:
        """Keep one text; its file appears when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for layer in captured.layers:
            for name in _TENSORS:
                tensor: Tensor | None = getattr(layer, name)
                if tensor is not None:
                    dtype = torch.float32 if name == "projection" else torch.bfloat16
                    tensors[f"{layer.layer}.{name}"] = tensor.to("cpu", dtype).contiguous()
        scales = {str(layer.layer): repr(layer.scale) for layer in captured.layers}
        temporary = self._path(sequence).with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, temporary, metadata=scales)
        os.replace(temporary, self._path(sequence))

    def layers(self, sequence: int) -> Iterator[LayerCapture]:
        """The layers of one text, one at a time in memory; `output` is empty."""
        with safe_open(self._path(sequence), framework="pt") as file:
            scales: dict[str, str] = file.metadata()
            names = set(file.keys())
            for layer in sorted(int(number) for number in scales):
                found = {
                    name: file.get_tensor(f"{layer}.{name}")
                    for name in _TENSORS
                    if f"{layer}.{name}" in names
                }
                yield LayerCapture(
                    layer=layer,
                    name="",
                    output=torch.empty(0),
                    scale=float(scales[str(layer)]),
                    **found,
                )

    def discard(self) -> None:
        """Delete all files of this run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, sequence: int) -> Path:
        return self.folder / f"{sequence}.safetensors"
