"""The text that profiles are taken of: sequences of token ids from a file or the built-in text."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from attnplan.profiles.records.records import DatasetIdentity
from attnplan.profiles.text.builtin_text import KINDS, documents

BUILTIN = "builtin"
SPLITS = ("calibration", "holdout", "all")
CALIBRATION_SHARE = 0.7
"""Of the characters of a user's file; the rest is the holdout part."""
_PIECE = 1 << 15  # characters that are tokenised at a time


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class TokenSet:
    """Sequences of tokens, none of which spans two kinds of text.

    Attributes:
        tokens: int64 [sequences, context].
        kinds: of each sequence: 'prose', 'reference' or 'code' of the built-in text, else 'text'.
        digest: of the token ids and the context.
        name: 'builtin', or the name of the file.
        split: 'calibration', 'holdout' or 'all'.
        offset: tokens that were skipped.
    """

    tokens: Tensor
    kinds: tuple[str, ...]
    digest: str
    name: str
    split: str
    offset: int = 0

    @property
    def identity(self) -> DatasetIdentity:
        """The same as a row of the store."""
        more = {"kinds": list(self.kinds), "offset": self.offset}
        return DatasetIdentity(self.digest, self.name, self.split, self.tokens.numel(), more)


def load_sequences(
    tokenizer: Tokenizer,
    data: str | Path,
    *,
    context: int,
    sequences: int,
    split: str,
    offset: int = 0,
) -> TokenSet:
    """The first `sequences` sequences of `context` tokens after `offset` tokens.

    The built-in text alternates: sequence 0 is prose, 1 reference, 2 code, 3 prose, ...; there an
    offset counts whole sequences, rounded up. Only as much text as needed is tokenised. Where the
    tokenizer puts a beginning-of-sequence token before a text, every sequence starts with it.

    Args:
        tokenizer: turns text into ids.
        data: 'builtin', or a UTF-8 text file. (A file of the name 'builtin' is './builtin'.)
        split: which part: 'calibration' is the first 70 % of a file, 'holdout' the rest.
        offset: tokens of the part to skip.

    Raises:
        ValueError: the file is missing, empty or no text, the part is too short, or an argument is
            out of range.
    """
    if context < 2:
        raise ValueError(f"context must be at least 2 tokens, got {context}")
    if sequences < 1:
        raise ValueError(f"sequences must be at least 1, got {sequences}")
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    start = _bos(tokenizer)
    length = context - len(start)

    if data == BUILTIN:
        name, first = BUILTIN, -(-offset // context)
        texts = documents(split)
        kinds = tuple(KINDS[i % len(KINDS)] for i in range(first, first + sequences))
    else:
        name, first = Path(data).name, 0
        texts = {"text": (_part(Path(data), split),)}
        kinds = ("text",) * sequences

    rows: list[list[int]] = [[] for _ in kinds]
    for kind, parts in texts.items():
        places = [i for i, k in enumerate(kinds) if k == kind]
        if not places:
            continue
        skip = offset if kind == "text" else length * ((first + places[0]) // len(KINDS))
        wanted = skip + length * len(places)
        ids = _take(tokenizer, parts, wanted)
        if len(ids) < wanted:
            of = f"{name}, part {split}" + (f", {kind}" if data == BUILTIN else "")
            raise ValueError(f"{of}: {_too_short(len(ids), skip, length, len(places))}")
        for n, i in enumerate(places):
            rows[i] = start + ids[skip + n * length : skip + (n + 1) * length]

    tokens = torch.tensor(rows, dtype=torch.int64)
    seal = hashlib.sha256(f"{context}:".encode() + tokens.numpy().astype("<i8").tobytes())
    return TokenSet(tokens, kinds, seal.hexdigest(), name, split, offset)


def _too_short(found: int, skip: int, length: int, sequences: int) -> str:
    """What is missing, and what would do."""
    left = max(0, found - skip)
    message = f"{found} tokens"
    if skip:
        message += f", {left} after the {skip} that are skipped"
    message += f", but {sequences} x {length} are wanted; "
    if left >= 2 * sequences:
        message += f"a context of at most {left // sequences} would do, "
    if left >= length and sequences > 1:
        message += f"or {left // length} x {length}, "
    if skip:
        message += "or a smaller offset, "
    return message + "or a longer text"


def _bos(tokenizer: Tokenizer) -> list[int]:
    """The beginning-of-sequence token where the tokenizer would put it, else nothing."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [bos] if len(ids) and ids[0] == bos else []


def _take(tokenizer: Tokenizer, texts: tuple[str, ...], wanted: int) -> list[int]:
    """At least `wanted` token ids of the texts in turn, or all there are."""
    quiet = {"verbose": False} if _accepts(tokenizer, "verbose") else {}
    ids: list[int] = []
    for text in texts:
        for piece in _pieces(text):
            if len(ids) >= wanted:
                return ids
            ids += tokenizer(piece, add_special_tokens=False, **quiet)["input_ids"]
    return ids


def _accepts(tokenizer: Tokenizer, name: str) -> bool:
    parameters = inspect.signature(tokenizer).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def _pieces(text: str) -> Iterator[str]:
    """`text`, ended by a blank line, in pieces that end with a paragraph where there is one."""
    text = text.rstrip() + "\n\n"
    start = 0
    while start < len(text):
        end = _cut(text, start + _PIECE, start + 2 * _PIECE)
        yield text[start:end]
        start = end


def _cut(text: str, low: int, high: int) -> int:
    """Where to cut: after the first paragraph, else line, else word that ends in [low, high)."""
    for separator in ("\n\n", "\n", " "):
        at = text.find(separator, low, high)
        if at >= 0:  # tokens begin with a space, and lines end with their end
            return at if separator == " " else at + len(separator)
    return low


def _part(path: Path, split: str) -> str:
    """One part of a text file; parts meet at the end of a paragraph where there is one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{path}: not text: it has a zero byte at character {text.index(chr(0))}")
    text = re.sub(r"\r\n?", "\n", text).strip()
    if not text:
        raise ValueError(f"{path}: the file is empty; give a text file, or 'builtin'")
    if split == "all":
        return text
    share = int(CALIBRATION_SHARE * len(text))
    cut = _cut(text, share, share + len(text) // 20)
    return text[:cut] if split == "calibration" else text[cut:]
