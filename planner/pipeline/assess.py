"""One model under one plan, measured: what `attnplan evaluate` reports."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from torch import Tensor

from attnplan.models.load import LoadedModel
from attnplan.pipeline.verify import density, unjudged
from attnplan.plan.plan import Plan
from attnplan.profiling.profiling import COPIED
from attnplan.quality.continuation import Continuation, check_length, decode_ms, peak_bytes
from attnplan.quality.prefill import (
    Reference,
    induction_accuracy,
    kv_bytes,
    original,
    prefill_latency,
)
from attnplan.quality.retrieval import PROBED, SHORT, retrieval
from attnplan.runtime.patch import applied


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

    Raises:
        ValueError: the sequences are too short.

    Returns:
        Plain values: kl_per_token, kl_last_quarter of the positions, perplexity, perplexity_dense,
        tokens, density, latency_ms {plan, dense}, speedup, kv_bytes {plan, dense} after the
        prefill, peak_bytes {plan, dense} of all tensors that the prefill and a few tokens more
        allocate, continuation_kl per token and continuation_perplexity {plan, dense} of the end of
        each text, decoded after a prompt, decode_ms_per_token {plan, dense}, induction_accuracy
        {plan, dense}, retrieval {plan, dense} of facts hidden in the text (null for a plan that
        keeps everything, or a short text), planned_layers (how many layers ran the plan at this
        length, the others dense), notes (sentences on what did not act or could not be judged).

    Raises:
        ValueError: the plan did not act where it should have (see `Reference.quality`).
    """
    model, context = loaded.model, int(sequences.shape[1])
    check_length(context)

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
    keeps_less = plan is not None and bool(plan.decode)
    if keeps_less and probes is not None:
        advance("retrieval")
        found = {"plan": probes.recall(planned), "dense": probes.recall(original)}
    advance("continuation")
    ends = [continuation.compare(planned, index) for index in range(len(sequences))]
    notes = [
        _prefill_note(plan, context, planned_layers),
        _decode_note(plan, ends[0].condensed, context, continuation.tokens),
        unjudged(copied["dense"]),
        SHORT if keeps_less and probes is None else None,
        None if probes is None or found is None else found["dense"].unjudged(probes.tolerance),
    ]
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
        "continuation_kl": statistics.fmean(end.kl for end in ends),
        "continuation_perplexity": {
            "plan": math.exp(statistics.fmean(end.loss for end in ends)),
            "dense": math.exp(statistics.fmean(end.loss_dense for end in ends)),
        },
        "decode_ms_per_token": dict(
            zip(("plan", "dense"), decode_ms(model, planned, text), strict=True)
        ),
        "induction_accuracy": copied,
        "retrieval": found and {name: asdict(recall) for name, recall in found.items()},
        "planned_layers": planned_layers,
        "notes": [note for note in notes if note is not None],
    }


def _prefill_note(plan: Plan | None, context: int, planned_layers: int) -> str | None:
    if plan is None or not plan.prefill or planned_layers:
        return None
    section = plan.section(context)
    if section is None:
        contexts = " and ".join("{} to {}".format(*one.context) for one in plan.prefill)
        why = f"it is for {contexts} tokens, not for {context}"
    elif all(head.is_dense for row in section.layers for head in row):
        why = f"its heads are dense for {context} tokens"
    else:
        why = f"it was made for {plan.target.kind} in {plan.target.dtype}"
    return f"no layer ran the plan, all ran dense: {why}"


def _decode_note(plan: Plan | None, condensed: bool, context: int, tokens: int) -> str | None:
    if plan is None or not plan.decode:
        return None
    if not condensed:
        return (
            f"the caches of {context} tokens were not condensed, so nothing was measured of what "
            "the plan keeps of a longer past"
        )
    return (
        "kl_per_token, perplexity and induction come from one pass over whole texts, which never "
        f"reads a condensed cache; continuation_kl and continuation_perplexity decode {tokens} "
        "tokens from it"
    )


def induction_length(plan: Plan | None, context: int) -> int:
    """A string short enough to be copied, and long enough for the plan to run on it."""
    first = min((s.context[0] for s in plan.prefill), default=1) if plan is not None else 1
    return min(context, max(COPIED, first))


def _density(loaded: LoadedModel, plan: Plan | None, context: int) -> float:
    if plan is None:
        return 1.0
    return density(plan.kernels(context), loaded.identity.prefill_shape(context))
