"""Quality and cost of generating under a plan: what is lost once the past has been condensed.

A text is cut in two. The model reads the first part at once, as a prompt; then the rest is fed as
if the model had generated it (teacher-forced), and its predictions are compared with those of the
original model, which remembers everything.
"""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from attnplan.kernels.bench.measure import timed
from attnplan.kernels.contracts.cache_policy import SLACK
from attnplan.profiles.capture.capture import logits_of
from attnplan.profiles.capture.output_head import Body, run_body
from attnplan.quality.prefill import CHUNK, Applied, Reference, original
from attnplan.runtime.acting import acting
from attnplan.runtime.cache import PlanLayer, stored_bytes
from attnplan.search.evaluation import finite_kl

CONTINUED = 256
"""Tokens at the end of a text that are fed as a continuation."""
TURN = 8
"""Tokens in a row that are timed under one plan, before it is another's turn."""
WARM_UP = 2
"""Tokens that are not timed."""
STEPS = 32
"""Tokens that are timed."""
SHORTEST = STEPS + WARM_UP + 1
"""Tokens of the shortest text: those that are timed, after a prompt."""


def check_length(context: int) -> None:
    """Raises ValueError where a text of `context` tokens is too short to measure generation on."""
    if context < SHORTEST:
        raise ValueError(
            f"context must be at least {SHORTEST} tokens to time generated tokens in it, "
            f"got {context}"
        )


def continued(context: int) -> int:
    """How many of `context` tokens are a continuation: whole condensings, at most half."""
    return max(1, min(CONTINUED, context // 2 // SLACK * SLACK))


@dataclass(frozen=True)
class Continued:
    """A continuation under a plan.

    Attributes:
        kl: mean KL(original || planned) of its positions, in nats.
        loss, loss_dense: mean -log p(next token), of those that have one.
        condensed: whether the cache held less than all tokens.
    """

    kl: float
    loss: float
    loss_dense: float
    condensed: bool


class Continuation:
    """The original model's answers on the ends of some sequences.

    Args:
        reference: of the same sequences.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.tokens = continued(int(reference.sequences.shape[1]))

    def kl(self, applied: Applied, index: int) -> float:
        """Mean KL over the continuation of one sequence; see `compare`."""
        return self.compare(applied, index).kl

    def compare(self, applied: Applied, index: int) -> Continued:
        """What the model loses on the continuation of one sequence.

        Tokens are fed by as many as accumulate between two condensings, which is the same as one by
        one.

        Raises:
            ValueError: a layer did not run the plan that it has for the prompt, or the cache was
                condensed, but not one prediction changed.
        """
        model, text = self.reference.model, self.reference.sequences[index]
        first = len(text) - self.tokens
        known = self.reference.states(index)[:, first:]
        with applied():
            with acting(model, first):
                body = prompt(model, text[:first])
            parts = []
            for some in text[first:].split(SLACK):
                body = step(model, body, some)
                parts.append(body.last_hidden_state)
        labels = text[first:].roll(-1).to(known.device)  # nothing is known to follow the last
        rows = self.reference.rows(body, known, torch.cat(parts, 1), labels)
        condensed = is_condensed(body)
        if condensed and not bool(rows[:, 0].any()):
            raise ValueError(
                f"the plan did not act: {type(model).__name__} condensed its cache, but all "
                "predictions after it are those of the original model to the last bit"
            )
        loss, loss_dense = rows[: max(1, len(rows) - 1), 1:].mean(0).tolist()
        kl = finite_kl(float(rows[:, 0].mean()))
        return Continued(kl, finite_kl(loss), loss_dense, condensed)


@dataclass(frozen=True)
class Likelihood:
    """How likely a model is to continue a prompt with given tokens.

    Attributes:
        log_probability: of all of them together, in nats.
        greedy: whether each is the most likely one.
    """

    log_probability: float
    greedy: bool


def likelihoods(
    model: Any, tokens: Tensor, continuations: Sequence[Tensor]
) -> tuple[Likelihood, ...]:
    """Score continuations by decoding: each is read from the cache that the prompt left.

    One forward pass over prompt and continuation together, as evaluation harnesses do it, never
    reads a condensed cache, so that a plan that stores less would score as the original model.

    Args:
        model: a causal language model, under a plan or not.
        tokens: int64 [tokens], the prompt; read once.
        continuations: each int64 [at least 1].

    Raises:
        ValueError: an empty prompt or continuation, or a model without a cache.
    """
    if not len(tokens) or not all(len(one) for one in continuations):
        raise ValueError("a likelihood needs at least one token of prompt and of continuation")
    read = prompt(model, tokens)
    found = []
    for continuation in continuations:
        body = copy.deepcopy(read)
        parts = [body.last_hidden_state[:, -1:]]
        for some in continuation[:-1].split(SLACK) if len(continuation) > 1 else ():
            body = step(model, body, some)
            parts.append(body.last_hidden_state)
        found.append(_likelihood(model, body, torch.cat(parts, 1), continuation))
    return tuple(found)


@torch.no_grad()
def _likelihood(model: Any, body: Body, states: Tensor, tokens: Tensor) -> Likelihood:
    total, greedy = 0.0, True
    labels = tokens.to(states.device)[:, None]
    with logits_of(model, body) as logits:
        for some in torch.arange(len(tokens), device=states.device).split(CHUNK):
            p = logits(states[:, some])[0].float().log_softmax(-1)
            total += float(p.gather(1, labels[some]).double().sum())
            greedy &= bool((p.argmax(-1) == labels[some][:, 0]).all())
    return Likelihood(total, greedy)


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


def is_condensed(body: Body) -> bool:
    """Whether the cache of a body holds less than all tokens that it has seen."""
    return any(
        keeper.limit is not None and layer.get_seq_length() >= keeper.limit + keeper.slack
        for layer in cache_of(body).layers
        if isinstance(layer, PlanLayer)
        for keeper in layer.keepers
    )


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
    model: Any, applied: Applied, tokens: Tensor, *, steps: int = STEPS
) -> tuple[float, float]:
    """Median time of one token after a prompt, logits included, (plan, dense), in turn, in ms.

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
