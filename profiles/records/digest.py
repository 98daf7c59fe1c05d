"""One digest for everything that is a key: SHA-256 of canonical JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text.

    Args:
        value: dictionaries with string keys, lists, tuples, strings, finite numbers, None.

    Raises:
        ValueError: something in it has no canonical JSON, such as NaN or an object.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"no canonical JSON for {value!r}: {error}") from None


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
