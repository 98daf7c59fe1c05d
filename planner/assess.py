"""One model under one plan, measured: what `attnplan evaluate` reports."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from torch import Tensor

from attnplan.continuation import Continuation, decode_ms, peak_bytes
from attnplan.evaluate import Reference, induction_accuracy, kv_bytes, original, prefill_latency
from attnplan.models import LoadedModel
from attnplan.patch import applied
from attnplan.plan import Plan
from attnplan.profiling import COPIED
from attnplan.retrieval import PROBED, retrieval
from attnplan.verify import density


def assess(
    loaded: LoadedModel,
    plan: Plan | None,
    sequences: Tensor,
    *,
    seed: int = 0,
    repeats: int = 5,
    force: bool = False,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Quality, speed and memory of a model under a plan, beside the model as it is.

    Args:
        loaded: the model, not patched.
        plan: None measures the model against itself.
        sequences: int64 [sequences, tokens], text.
        seed: of the random strings.
        repeats: pairs of timed prefills.
        force: run the plan on another device or in another dtype than its own.
        advance: called after each unit of work.

    Returns:
        Plain values: kl_per_token, kl_last_quarter of the positions, perplexity, perplexity_dense,
        tokens, density, latency_ms {plan, dense}, speedup, kv_bytes {plan, dense} after the
        prefill, peak_bytes {plan, dense} of all tensors that the prefill and a few tokens more
        allocate, continuation_kl per token once the past is condensed, decode_ms_per_token {plan,
        dense}, induction_accuracy {plan, dense}, retrieval {plan, dense} of facts hidden in the
        text (null for a plan that keeps everything, or a short text), planned_layers (how many
        layers ran the plan at this length, the others dense).

    Raises:
        ValueError: the plan did not act where it should have (see `Reference.quality`).
    """
    model, context = loaded.model, int(sequences.shape[1])

    def planned() -> AbstractContextManager[Any]:
        return original() if plan is None else applied(model, plan, force=force)

    reference = Reference(model, sequences)
    continuation = Continuation(reference)
    quality = reference.quality(planned, lambda: advance("held-out text"))
    planned_layers = quality.planned_layers or 0
    advance("induction")
    length = induction_length(plan, context)
    copied = {
        "plan": induction_accuracy(model, planned, length=length, seed=seed),
        "dense": induction_accuracy(model, original, length=length, seed=seed),
    }
    found = None
    probes = retrieval(model, loaded.tokenizer, sequences[:PROBED], seed=seed)
    if plan is not None and plan.decode and probes is not None:
        advance("retrieval")
        found = {
            "plan": asdict(probes.recall(planned)),
            "dense": asdict(probes.recall(original)),
        }
    advance("prefill")
    text = sequences[0]
    timing = prefill_latency(model, planned, text, repeats=repeats)
    return {
        "kl_per_token": quality.kl_per_token,
        "kl_last_quarter": quality.kl_last_quarter,
        "perplexity": quality.perplexity,
        "perplexity_dense": quality.perplexity_dense,
        "tokens": quality.tokens,
        "density": _density(loaded, plan, context) if planned_layers else 1.0,
        "latency_ms": {"plan": timing.median_ms, "dense": timing.dense_ms},
        "speedup": timing.dense_ms / timing.median_ms,
        "kv_bytes": {
            "plan": kv_bytes(model, planned, text),
            "dense": kv_bytes(model, original, text),
        },
        "peak_bytes": {
            "plan": peak_bytes(model, planned, text),
            "dense": peak_bytes(model, original, text),
        },
        "continuation_kl": statistics.fmean(
            continuation.kl(planned, index) for index in range(len(sequences))
        ),
        "decode_ms_per_token": dict(
            zip(("plan", "dense"), decode_ms(model, planned, text), strict=True)
        ),
        "induction_accuracy": copied,
        "retrieval": found,
        "planned_layers": planned_layers,
    }


def induction_length(plan: Plan | None, context: int) -> int:
    """A string short enough to be copied, and long enough for the plan to run on it."""
    first = min((s.context[0] for s in plan.prefill), default=1) if plan is not None else 1
    return min(context, max(COPIED, first))


def _density(loaded: LoadedModel, plan: Plan | None, context: int) -> float:
    if plan is None:
        return 1.0
    return density(plan.kernels(context), loaded.identity.prefill_shape(context))
