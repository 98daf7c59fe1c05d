"""Budgets: what they accept, what they refuse, and what they mean."""

from __future__ import annotations

import math

import pytest

from attnplan.search.budget import Budget, Limit, parse_latency, parse_memory


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0.6x", Limit(0.6, "x")),
        ("25ms", Limit(25.0, "ms")),
        (" 1.5 MS ", Limit(1.5, "ms")),
        ("1e2ms", Limit(100.0, "ms")),
    ],
)
def test_latency_is_a_factor_or_milliseconds(text: str, limit: Limit) -> None:
    assert parse_latency(text) == limit


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0.5x", Limit(0.5, "x")),
        ("512MiB", Limit(512 * 2**20, "B")),
        ("2GB", Limit(2e9, "B")),
        ("100 kib", Limit(102400, "B")),
        ("7B", Limit(7, "B")),
    ],
)
def test_memory_is_a_factor_or_bytes(text: str, limit: Limit) -> None:
    assert parse_memory(text) == limit


@pytest.mark.parametrize("text", ["", "fast", "25", "-3ms", "0x", "25s", "1e999x", "25ms!"])
def test_a_latency_of_another_form_is_quoted_beside_the_accepted_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"0\.6x or 25ms, got") as caught:
        parse_latency(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["", "512", "25ms", "-1MiB", "0x", "1TiB"])
def test_a_memory_of_another_form_is_quoted_beside_the_accepted_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"0\.5x or bytes such as 512MiB") as caught:
        parse_memory(text)
    assert repr(text) in str(caught.value)


def test_a_factor_is_of_dense_and_a_number_is_itself() -> None:
    assert Limit(0.5, "x").of(40.0) == 20.0
    assert Limit(25.0, "ms").of(40.0) == 25.0


def test_quality_alone_minimizes_latency_and_cost_minimizes_kl() -> None:
    assert Budget(max_kl=0.1).objective == "latency"
    assert Budget(max_ppl_ratio=1.1).objective == "latency"
    assert Budget(max_density=0.5).objective == "kl"
    assert Budget(max_density=0.5, max_kl=0.1).objective == "kl"
    assert Budget(max_density=0.5, max_kl=0.1, minimize="latency").objective == "latency"


def test_the_kl_limit_is_the_tighter_of_kl_and_log_perplexity() -> None:
    assert Budget(max_kl=0.1, max_ppl_ratio=1.05).kl_limit == pytest.approx(math.log(1.05))
    assert Budget(max_kl=0.01, max_ppl_ratio=1.05).kl_limit == 0.01
    assert Budget(max_density=0.5).kl_limit is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a budget needs a limit"),
        ({"minimize": "kl"}, "a budget needs a limit"),
        ({"max_density": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"max_density": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"max_kl": -1.0}, "max KL must be above 0"),
        ({"max_kl": math.nan}, "max KL must be above 0"),
        ({"max_ppl_ratio": 0.9}, "must be above 1, got 0.9"),
        ({"max_latency": Limit(5.0, "B")}, "latency must be bounded in x or ms, got 5.0B"),
        ({"max_memory": Limit(5.0, "ms")}, "memory must be bounded in x or bytes, got 5.0ms"),
        ({"max_density": 0.5, "minimize": "joules"}, "got 'joules'"),
        ({"max_density": 0.5, "minimize": "latency"}, "needs a limit on quality"),
    ],
)
def test_a_budget_refuses_what_it_cannot_mean(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "budget",
    [
        Budget(max_density=0.45),
        Budget(max_latency=Limit(0.6, "x"), max_memory=Limit(2.0**20, "B")),
        Budget(max_kl=0.02, max_ppl_ratio=1.05, minimize="memory"),
    ],
)
def test_the_canonical_form_gives_the_budget_back(budget: Budget) -> None:
    plain = budget.canonical()
    assert Budget.from_canonical(plain).canonical() == plain
    assert plain["minimize"] == budget.objective


def test_an_unknown_limit_in_a_stored_budget_is_named() -> None:
    with pytest.raises(ValueError, match="unknown limit 'max_joules'"):
        Budget.from_canonical({"max_joules": 3.0})
