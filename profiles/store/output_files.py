"""Files that commands write: never over something of another kind, and whole or not at all.

Names are checked before any work, so that nothing is lost to a name at its end: what stands at a
name that the user typed must be of the kind that is written there, and what stands at a name that
follows from it, as the data of a plan, must belong to it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, its folder included; readers see the old one or the new one."""
    replace_files({path: content})


def replace_files(contents: dict[Path, bytes]) -> None:
    """Write files that belong together: all of them are complete before the first one appears."""
    partial: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".attnplan-{secrets.token_hex(8)}")
            with temporary.open("xb") as file:  # never a file that is there already
                partial[path] = temporary
                file.write(content)
        for path, temporary in partial.items():
            os.replace(temporary, path)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


def check_output(path: Path, kind: str, is_one: Callable[[Path], bool]) -> None:
    """Raises ValueError where a file cannot be written, or would replace one of another kind.

    Args:
        path: the name.
        kind: what is written there, in words, such as 'a table of timings'.
        is_one: whether a file that is there is of this kind. An empty one holds nothing to lose.
    """
    _check_folder(path)
    if not os.path.lexists(path):
        return
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise ValueError(f"{path} is {what}, and {kind} is to go there: choose another name")
    if path.stat().st_size and not is_one(path):
        raise ValueError(
            f"{path} is there and is not {kind}, which would replace it: choose another name"
        )


def check_apart(outputs: dict[str, Path], others: dict[str, Path]) -> None:
    """Raises ValueError where an output is the same file as something else of a command.

    Args:
        outputs, others: option to file.
    """
    for option, path in outputs.items():
        for other, taken in others.items():
            if path.resolve() == taken.resolve():
                raise ValueError(f"{option} and {other} are the same file, {path}: choose another")


def _check_folder(path: Path) -> None:
    """Raises ValueError where the folder of a file is none and cannot be made."""
    for folder in path.absolute().parents:
        if os.path.lexists(folder):
            if not folder.is_dir():
                raise ValueError(f"{path} cannot be written: {folder} is no folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise ValueError(f"{path} cannot be written: {folder} is not writable")
            return
