"""Captured tensors between profiling and scoring: one safetensors file per text, in bfloat16.

They are a cache, not data: too large for the store, deleted once all candidates are scored, and
captured again where they are missing. Outputs are not kept; they follow from the rest.

A folder belongs to one run at a time, which holds a lock on it: another run on the same model and
texts takes a folder of its own. A lock ends with its process, so what a killed run left behind is
taken up by the next run of its kind, and removed by any other.
"""

from __future__ import annotations

import os
import re
import secrets
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnplan.profiles.capture.capture import LayerCapture, SequenceCapture

_TENSORS = ("query", "key", "value", "gradient", "projection")
_FOLDER = re.compile(r"[0-9a-f]{16}(-\d+)?")
_FILE = re.compile(r"\d+\.(safetensors|\d+\.partial)")


class CaptureFiles:
    """The captured tensors of one profile run.

    Args:
        folder: where they are kept; made when the first text is saved. Where another run uses it,
            a number is added to its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self._wanted = folder
        self._lock: weakref.finalize[..., CaptureFiles] | None = None
        """Closes what holds the lock; called by the garbage collector at the latest."""

    def claim(self, *, make: bool = True) -> bool:
        """Take a folder that no other run uses, with what a run that is gone left in it.

        Args:
            make: a new one where there is none.

        Returns:
            Whether there is one.
        """
        if self._lock is None:
            try:
                held = self._free(make)
            except (ImportError, OSError):  # no locks here: a folder that nobody else can know
                if not make:
                    return False
                name = f"{self._wanted.name}-{secrets.token_hex(4)}"
                self.folder = self._wanted.with_name(name)
                self.folder.mkdir(parents=True)
                held = os.open(self.folder, os.O_RDONLY)
            else:
                _sweep(self.folder)
            if held is not None:
                self._lock = weakref.finalize(self, os.close, held)
        return self._lock is not None

    def release(self) -> None:
        """Let go of the folder; what is in it stays for the next run of the same kind."""
        if self._lock is not None:
            self._lock()
            self._lock, self.folder = None, self._wanted

    def has(self, sequence: int) -> bool:
        """Whether the tensors of this text are there, complete."""
        return self.claim(make=False) and self._path(sequence).exists()

    def save(self, sequence: int, captured: SequenceCapture) -> None:
        """Keep one text; its file appears when it is complete."""
        self.claim()
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
        self.claim(make=False)
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
        if self.claim(make=False):
            _empty(self.folder)
            self.release()

    def _free(self, make: bool) -> int | None:
        """Sets the folder to the first that no run uses; what holds its lock."""
        folder, number = self._wanted, 0
        while True:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            elif not folder.is_dir():
                return None
            held = _lock(folder)
            if held is not None:
                self.folder = folder
                for partial in folder.glob("*.partial"):
                    partial.unlink()
                return held
            number += 1
            folder = self._wanted.with_name(f"{self._wanted.name}-{number}")

    def _path(self, sequence: int) -> Path:
        return self.folder / f"{sequence}.safetensors"


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on a folder; None where another run does."""
    import fcntl  # not on Windows

    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(folder)):  # not removed in the meantime
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(held)
        raise
    os.close(held)
    return None


def _sweep(mine: Path) -> None:
    """Remove what runs that are gone have left beside a folder."""
    for folder in mine.parent.iterdir() if mine.parent.is_dir() else ():
        if folder != mine and _FOLDER.fullmatch(folder.name):
            with suppress(OSError):
                held = _lock(folder)
                if held is not None:
                    _empty(folder)
                    os.close(held)


def _empty(folder: Path) -> None:
    """Delete captured tensors, and their folder where nothing else is in it."""
    for path in folder.iterdir():
        if _FILE.fullmatch(path.name):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()
