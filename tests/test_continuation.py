"""Continuations are scored by decoding, from what the cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.architectures import text, tiny
from torch import Tensor

from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.cache_policy import SLACK, Keeper
from attnplan.quality import continuation
from attnplan.quality.continuation import Continuation, likelihoods
from attnplan.quality.prefill import Reference, original
from attnplan.runtime.patch import patch_assignment, unpatch

PROMPT, MORE = text(150), text(SLACK + 9, 2)


@contextmanager
def keeping(model: Any, keeper: Keeper) -> Iterator[None]:
    patch_assignment(model, [[catalog.DENSE] * 4] * 2, keepers=[[keeper] * 2] * 2)
    try:
        yield
    finally:
        unpatch(model)


@torch.no_grad()
def in_one_pass(model: Any, more: Tensor) -> tuple[float, bool]:
    """Log-probability of a continuation as harnesses compute it, and whether it is greedy."""
    scores = model(input_ids=torch.cat([PROMPT, more])[None]).logits[0].double().log_softmax(-1)
    rows = scores[len(PROMPT) - 1 : -1]
    chosen = rows.gather(1, more[:, None]).sum()
    return float(chosen), bool((rows.argmax(-1) == more).all())


@torch.no_grad()
def decoded(model: Any, more: Tensor) -> float:
    """The same, token by token through the model's own cache."""
    output = model(input_ids=PROMPT[None], use_cache=True)
    total = 0.0
    for token in more:
        total += float(output.logits[0, -1].double().log_softmax(-1)[token])
        name = "cache" if "cache" in output else "past_key_values"  # renamed in 5.24
        output = model(input_ids=token[None, None], use_cache=True, **{name: output[name]})
    return total


@pytest.mark.parametrize("name", ["Llama", "OPT, projected", "GPT-2"])
def test_likelihoods_of_the_original_model_are_those_of_one_pass(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        best = model.generate(PROMPT[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    continuations = [MORE, MORE[:1], best[0, len(PROMPT) :]]
    for found, more in zip(likelihoods(model, PROMPT, continuations), continuations, strict=True):
        right, greedy = in_one_pass(model, more)
        assert found.log_probability == pytest.approx(right, rel=1e-4, abs=1e-4)
        assert found.greedy == greedy
    assert found.greedy


def test_likelihoods_under_a_plan_read_the_condensed_cache() -> None:
    model = tiny("Llama")
    with keeping(model, Recent(32)):
        (alone,) = likelihoods(model, PROMPT, [MORE])
        _, found = likelihoods(model, PROMPT, [MORE[:5], MORE])
        right = decoded(model, MORE)
        blind, _ = in_one_pass(model, MORE)
    assert found == alone  # what was scored before leaves no trace
    assert found.log_probability == pytest.approx(right, rel=1e-5)
    assert blind == pytest.approx(in_one_pass(model, MORE)[0], rel=1e-6)
    assert abs(found.log_probability - blind) > 1e-3


def test_nothing_has_no_likelihood() -> None:
    model = tiny("Llama")
    for prompt, more in ((PROMPT[:0], MORE), (PROMPT, MORE[:0])):
        with pytest.raises(ValueError, match="at least one token of prompt and of continuation"):
            likelihoods(model, prompt, [more])


def test_losses_of_a_continuation_are_those_of_its_tokens() -> None:
    model, whole = tiny("Llama"), torch.cat([PROMPT, MORE])
    found = Continuation(Reference(model, whole[None]))
    plain = found.compare(original, 0)
    with torch.no_grad():
        scores = model(input_ids=whole[None]).logits[0].double().log_softmax(-1)
    rows = scores.gather(1, whole[1:, None])[-found.tokens + 1 :]
    assert plain.loss == pytest.approx(plain.loss_dense, rel=1e-4)
    assert plain.loss_dense == pytest.approx(-float(rows.mean()), rel=1e-4)
    assert not plain.condensed and plain.kl < 1e-6
    kept = found.compare(lambda: keeping(model, Recent(32)), 0)
    assert kept.condensed and kept.kl > 1e-4 and kept.loss != kept.loss_dense
    assert not found.compare(lambda: keeping(model, cache_catalog.FULL), 0).condensed


def test_a_cache_that_was_condensed_without_effect_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, whole = tiny("Llama"), torch.cat([PROMPT, MORE])
    found = Continuation(Reference(model, whole[None]))
    monkeypatch.setattr(continuation, "is_condensed", lambda body: True)
    states = found.reference.states(0)

    def known(model: Any, tokens: Tensor, cache: Any) -> Any:
        body = plain(model, tokens, cache)
        seen = cache.get_seq_length()
        body.last_hidden_state = states[:, seen - len(tokens) : seen]
        return body

    plain = continuation._read
    monkeypatch.setattr(continuation, "_read", known)
    with pytest.raises(ValueError, match="did not act: LlamaForCausalLM condensed its cache"):
        found.compare(original, 0)
