"""What a plan may cost and lose, and what to minimise within that."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

Objective = Literal["kl", "latency", "memory"]
Unit = Literal["x", "ms", "B"]

BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes per unit, by upper-case name."""

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*")


class BudgetError(ValueError):
    """No assignment meets the budget.

    Attributes:
        resource: 'density', 'latency_ms', 'kv_share' or 'kl'.
        smallest: the smallest value of it that was found, in the unit of `resource`.
    """

    def __init__(self, message: str, resource: str, smallest: float) -> None:
        super().__init__(message)
        self.resource = resource
        self.smallest = smallest


@dataclass(frozen=True)
class Limit:
    """An upper limit: a factor of what dense attention takes ('x'), milliseconds or bytes."""

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"a limit must be a positive number, got {self.value}{self.unit}")

    def of(self, dense: float) -> float:
        """The limit in the unit of `dense`, the value of dense attention."""
        return self.value * dense if self.unit == "x" else self.value

    def __str__(self) -> str:
        return f"{self.value!r}{self.unit}"


def parse_latency(text: str) -> Limit:
    """Read '0.6x' (a factor of dense) or '25ms'.

    Raises:
        ValueError: any other form.
    """
    number, unit = _split(text)
    if number is None or unit not in ("X", "MS"):
        raise ValueError(f"latency must be a factor of dense such as 0.6x or 25ms, got {text!r}")
    return Limit(number, "x" if unit == "X" else "ms")


def parse_memory(text: str) -> Limit:
    """Read '0.5x' (a factor of dense) or '512MiB' (B, KB, MB, GB, KiB, MiB, GiB).

    Raises:
        ValueError: any other form.
    """
    number, unit = _split(text)
    if number is None or unit not in (*BYTES, "X"):
        raise ValueError(
            "memory must be a factor of dense such as 0.5x or bytes such as 512MiB "
            f"(B, KB, MB, GB, KiB, MiB, GiB), got {text!r}"
        )
    return Limit(number, "x") if unit == "X" else Limit(number * BYTES[unit], "B")


def _split(text: str) -> tuple[float | None, str]:
    match = _NUMBER.fullmatch(text)
    if match is None or float(match[1]) <= 0 or not math.isfinite(float(match[1])):
        return None, ""
    return float(match[1]), match[2].upper()


@dataclass(frozen=True)
class Budget:
    """Upper limits, and what to minimise within them.

    Attributes:
        max_density: multiply-adds of attention and selection, as a share of dense, in (0, 1].
        max_latency: of the whole prefill.
        max_memory: of the KV cache.
        max_decode: of one generated token after a prompt of the whole context.
        max_kl: nats per token, KL(original || planned).
        max_ppl_ratio: perplexity of the plan over that of the original, above 1.
        minimize: None chooses: latency if only quality is bounded, else KL.
    """

    max_density: float | None = None
    max_latency: Limit | None = None
    max_memory: Limit | None = None
    max_decode: Limit | None = None
    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    minimize: Objective | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, f.name) is None for f in fields(self) if f.name != "minimize"):
            raise ValueError(
                "a budget needs a limit: --max-density, --max-latency, --max-memory, --max-decode, "
                "--max-kl or --max-ppl-ratio"
            )
        if self.max_density is not None and not 0 < self.max_density <= 1:
            raise ValueError(f"max density must be above 0 and at most 1, got {self.max_density}")
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise ValueError(f"max KL must be above 0 nats per token, got {self.max_kl}")
        if self.max_ppl_ratio is not None and not 1 < self.max_ppl_ratio < math.inf:
            raise ValueError(f"max perplexity ratio must be above 1, got {self.max_ppl_ratio}")
        if self.max_latency is not None and self.max_latency.unit == "B":
            raise ValueError(f"latency must be bounded in x or ms, got {self.max_latency}")
        if self.max_decode is not None and self.max_decode.unit == "B":
            raise ValueError(f"decoding must be bounded in x or ms, got {self.max_decode}")
        if self.max_memory is not None and self.max_memory.unit == "ms":
            raise ValueError(f"memory must be bounded in x or bytes, got {self.max_memory}")
        if self.minimize not in (None, *get_args(Objective)):
            raise ValueError(f"can minimize kl, latency or memory, got {self.minimize!r}")
        if self.minimize in ("latency", "memory") and self.kl_limit is None:
            raise ValueError(
                f"minimizing {self.minimize} needs a limit on quality: --max-kl or --max-ppl-ratio"
            )

    @property
    def kl_limit(self) -> float | None:
        """The tightest limit on KL, in nats per token.

        On text that the model itself finds typical, log perplexity rises by the KL, so a limit on
        the perplexity ratio searches with its logarithm; verification measures the ratio.
        """
        limits = [] if self.max_kl is None else [self.max_kl]
        if self.max_ppl_ratio is not None:
            limits.append(math.log(self.max_ppl_ratio))
        return min(limits, default=None)

    @property
    def bounds_cost(self) -> bool:
        """Whether density, latency, memory or decoding is limited."""
        limits = (self.max_density, self.max_latency, self.max_memory, self.max_decode)
        return any(limit is not None for limit in limits)

    @property
    def objective(self) -> Objective:
        return self.minimize or ("kl" if self.bounds_cost else "latency")

    def canonical(self) -> dict[str, float | str]:
        """Plain values that identify the budget: equal budgets give equal dictionaries."""
        plain: dict[str, float | str] = {"minimize": self.objective}
        for name in (f.name for f in fields(self) if f.name != "minimize"):
            value = getattr(self, name)
            if value is not None:
                plain[name] = str(value) if isinstance(value, Limit) else float(value)
        return plain

    @classmethod
    def from_canonical(cls, plain: Mapping[str, float | str]) -> Self:
        """The budget that `canonical` wrote."""
        values: dict[str, object] = dict(plain)
        for name in {"max_latency", "max_decode"} & values.keys():
            values[name] = parse_latency(str(values[name]))
        if "max_memory" in values:
            values["max_memory"] = parse_memory(str(values["max_memory"]))
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown limit {sorted(unknown)[0]!r} in a budget")
        return cls(**values)  # type: ignore[arg-type]
