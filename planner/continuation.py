"""Quality and cost of generating under a plan: what is lost once the past has been condensed.

A text is cut in two. The model reads the first part at once, as a prompt; then the rest is fed as
if the model had generated it (teacher-forced), and its predictions are compared with those of the
original model, which remembers everything.
"""

from __future__ import annotations

import inspect
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from attnplan.cache import stored_bytes
from attnplan.evaluate import Applied, Reference, original
from attnplan.kernels.benchmark import timed
from attnplan.kernels.keeper import SLACK
from attnplan.profiles.output_head import Body, run_body

CONTINUED = 256
"""Tokens at the end of a text that are fed as a continuation."""
TURN = 8
"""Tokens in a row that are timed under one plan, before it is another's turn."""
WARM_UP = 2
"""Tokens that are not timed."""


def continued(context: int) -> int:
    """How many of `context` tokens are a continuation: whole condensings, at most half."""
    return max(1, min(CONTINUED, context // 2 // SLACK * SLACK))


class Continuation:
    """The original model's answers on the ends of some sequences.

    Args:
        reference: of the same sequences.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.tokens = continued(int(reference.sequences.shape[1]))

    def kl(self, applied: Applied, index: int) -> float:
        """Mean KL(original || planned) over the continuation of one sequence, nats per token.

        Tokens are fed by as many as accumulate between two condensings, which is the same as one by
        one.
        """
        model, text = self.reference.model, self.reference.sequences[index]
        first = len(text) - self.tokens
        known = self.reference.states(index)[:, first:]
        with applied():
            body = prompt(model, text[:first])
            parts = []
            for some in text[first:].split(SLACK):
                body = step(model, body, some)
                parts.append(body.last_hidden_state)
        return self.reference.divergence(body, known, torch.cat(parts, 1))


def prompt(model: Any, tokens: Tensor, *, recording: bool = False) -> Body:
    """The model without its head on a prompt [tokens], with its cache.

    While `recording`, nothing is condensed before `condense`.
    """
    cache = DynamicCache(config=model.config)
    for layer in cache.layers if recording else ():
        layer.record_past = True
    return _read(model, tokens, cache)


def step(model: Any, body: Body, tokens: Tensor) -> Body:
    """More tokens after `body`."""
    return _read(model, tokens, cache_of(body))


def condense(body: Body) -> None:
    """Let the cache condense what it has held back."""
    for layer in cache_of(body).layers:
        layer.crop(0)


@torch.no_grad()
def _read(model: Any, tokens: Tensor, cache: Any) -> Body:
    accepted = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values"):  # renamed in 5.24
        if name in accepted:
            return run_body(model, tokens, cache=cache, cache_name=name)
    raise ValueError(f"{type(model).__name__} takes no KV cache: it has nothing to decode from")


def cache_of(body: Body) -> Any:
    """The cache that a forward pass filled."""
    return body.cache


def held_bytes(model: Any, applied: Applied, tokens: Tensor, more: int) -> tuple[int, int]:
    """Bytes that the cache holds after a prompt, and after `more` further tokens.

    Args:
        model: a causal language model.
        applied: a context in which to run it.
        tokens: int64 [tokens], the prompt; it is begun again for the further tokens.
        more: how many of them; what they are does not matter for the bytes.
    """
    with applied():
        body = prompt(model, tokens)
        before = stored_bytes(cache_of(body))
        for some in tokens[:more].split(SLACK):
            body = step(model, body, some)
        return before, stored_bytes(cache_of(body))


def decode_ms(
    model: Any, applied: Applied, tokens: Tensor, *, steps: int = 32
) -> tuple[float, float]:
    """Median time of one token after a prompt, (plan, dense), in turn, in ms.

    Args:
        model: a causal language model, not patched.
        applied: a context in which the model runs under the plan.
        tokens: int64 [tokens], prompt and continuation.
        steps: timed tokens of each.
    """
    first = len(tokens) - steps - WARM_UP
    contexts = (applied, original)
    bodies: list[Body] = []
    for context in contexts:
        with context():
            bodies.append(prompt(model, tokens[:first]))
    times: list[list[float]] = [[], []]

    def generate(number: int, token: Tensor) -> None:
        bodies[number] = step(model, bodies[number], token)

    for some in tokens[first:].split(TURN):
        for number, context in enumerate(contexts):
            with context():
                times[number] += [timed(partial(generate, number, t)) for t in some.split(1)]
    plan, dense = (statistics.median(found[WARM_UP:]) for found in times)
    return plan, dense


def peak_bytes(model: Any, applied: Applied, tokens: Tensor, *, steps: int = 4) -> int:
    """Most bytes that tensors made by a prompt and a few tokens after it hold at one time.

    Args:
        model: a causal language model.
        applied: a context in which to run it.
        tokens: int64 [tokens].
        steps: tokens after the prompt.
    """
    first = max(len(tokens) - steps, 1)
    with applied():
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
            _generate(model, tokens, first)
            return torch.cuda.max_memory_allocated(model.device) - before
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as watched:
            _generate(model, tokens, first)
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _generate(model: Any, tokens: Tensor, first: int) -> None:
    body = prompt(model, tokens[:first])
    for token in tokens[first:].split(1):
        body = step(model, body, token)
