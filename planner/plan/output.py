"""Where a plan is written: never over a file that is not its own.

Fitted data has a name that the user never typed, so what stands there must be the data that this
very plan names.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from attnplan.plan.located_yaml import Entry, PlanError, read
from attnplan.profiles.store.output_files import check_output


def data_file(path: Path) -> Path:
    """Where the fitted data of a plan goes: a name that no checkpoint and no other plan has.

    `a.plan.safetensors` for `a.yaml`; `a.yml.data.plan.safetensors` and `a.data.plan.safetensors`
    for `a.yml` and `a`.
    """
    stem = path.name.removesuffix(".yaml")
    return path.with_name(
        f"{stem}.plan.safetensors" if stem != path.name else f"{stem}.data.plan.safetensors"
    )


def check_plan(path: Path, *, fitted: bool = True) -> None:
    """Raises PlanError where a plan, or its fitted data, would replace a file that is not its own.

    Args:
        path: the plan.
        fitted: whether there is, or may be, fitted data.
    """
    try:
        check_output(path, "a plan", lambda file: _plan(file) is not None)
    except ValueError as error:
        raise PlanError(str(error)) from None
    data = data_file(path)
    if not fitted or not os.path.lexists(data):
        return
    if not owns_data(path):
        raise PlanError(
            f"{data} is in the way: the fitted data of {path.name} would replace it, and no plan "
            "there names it as its data; move it, or choose another name for the plan"
        )
    for other in sorted(file for file in path.parent.glob("*.y*ml") if file.is_file()):
        if other.name != path.name and _reads(other, data.name):
            raise PlanError(
                f"{data} would be replaced, and {other.name} reads it too: remove that plan, or "
                "choose another name for the new one"
            )


def owns_data(path: Path) -> bool:
    """Whether what stands where a plan's fitted data goes is what the plan there names."""
    data, told = data_file(path), _data_of(path)
    if told.get("file") != data.name or not data.is_file():
        return False
    return bool(told.get("digest") == digest_of(data.read_bytes()))


def digest_of(data: bytes) -> str:
    """How plans write the digest of a file."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _plan(path: Path) -> Entry | None:
    """The top entry of a file that is a plan, of whatever version; None where it is none."""
    try:
        top = read(path)
    except PlanError:
        return None
    is_plan = isinstance(top.value, dict) and {"attnplan", "model", "phases"} <= top.value.keys()
    return top if is_plan else None


def _reads(plan: Path, data: str) -> bool:
    """Whether a file is a plan with this data; a look at the text tells most that are none."""
    return data.encode() in plan.read_bytes() and _data_of(plan).get("file") == data


def _data_of(path: Path) -> dict[str, Any]:
    """What a plan says of its fitted data; empty where there is no plan, or none that says it."""
    top = _plan(path)
    told = None if top is None or "data" not in top.value else top.value["data"].plain()
    return told if isinstance(told, dict) else {}
