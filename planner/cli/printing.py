"""Values as text: one JSON object, or the cells of a table."""

from __future__ import annotations

import json
import math
from typing import Any


def print_json(found: dict[str, Any]) -> None:
    """One object on standard output; what is not finite becomes null."""
    print(json.dumps(finite(found), allow_nan=False))


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    return str(value)
