"""Quality and speed of a planned model, measured against the model it was.

Quality is KL(original || planned) in nats per token and the perplexity of both, teacher-forced on
real text, and the share of tokens copied correctly in the second half of a random string that is
repeated once. Speed is the median of interleaved runs of the whole prefill.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnplan.kernels.bench.measure import Timing, interleaved, median_ms
from attnplan.profiles.capture.capture import logits_of
from attnplan.profiles.capture.output_head import (
    Body,
    input_device,
    output_head,
    overflowing,
    run_body,
)
from attnplan.runtime.acting import Act, acting, refuse_without_effect
from attnplan.runtime.cache import stored_bytes
from attnplan.search.evaluation import finite_kl

CHUNK = 512
"""Positions whose logits are held at once."""

Applied = Callable[[], AbstractContextManager[Any]]
"""A context in which the model runs under a plan."""


@dataclass(frozen=True)
class Quality:
    """What a plan costs in quality on some text.

    Attributes:
        kl_per_token: mean over all compared positions, in nats.
        kl_spread: standard error of that mean over the sequences; None for a single one.
        perplexity, perplexity_dense: of the next token of the text.
        tokens: positions compared.
        kl_by_sequence: mean KL of every sequence.
        kl_last_quarter: mean over the last quarter of each sequence, where most is left out; None
            in what was stored before it was measured.
        planned_layers: how many layers ran the plan, the others dense; None where unknown.
    """

    kl_per_token: float
    kl_spread: float | None
    perplexity: float
    perplexity_dense: float
    tokens: int
    kl_by_sequence: tuple[float, ...]
    kl_last_quarter: float | None = None
    planned_layers: int | None = None

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.perplexity_dense


@dataclass(frozen=True)
class Comparison:
    """One sequence under a plan and as the original model sees it.

    Attributes:
        kl: mean over the compared positions, in nats; BROKEN_KL where something overflowed.
        last_quarter: of the positions in the last quarter of the text.
        loss, loss_dense: mean -log p(next token of the text).
        act: what ran.
    """

    kl: float
    last_quarter: float
    loss: float
    loss_dense: float
    act: Act


class Reference:
    """The original model's answers on some sequences, kept as final hidden states.

    Logits of a whole text are never held: they are recomputed in chunks from the hidden states.

    Args:
        model: a causal language model, not patched.
        sequences: int64 [sequences, tokens].
    """

    def __init__(self, model: Any, sequences: Tensor) -> None:
        if sequences.ndim != 2 or sequences.shape[1] < 2:
            raise ValueError(
                f"comparing needs sequences of at least 2 tokens, got {list(sequences.shape)}"
            )
        self.model = model
        self.sequences = sequences
        self._states: dict[int, Tensor] = {}

    def states(self, index: int) -> Tensor:
        """Final hidden states of the original model, [1, tokens, hidden]."""
        if index not in self._states:
            self._states[index] = body_of(self.model, self.sequences[index]).last_hidden_state
        return self._states[index]

    def compare(self, applied: Applied, index: int, stride: int = 1) -> tuple[float, float, float]:
        """Mean KL and mean log-losses (planned, original) of one sequence; see `comparison`."""
        found = self.comparison(applied, index, stride)
        return found.kl, found.loss, found.loss_dense

    def comparison(self, applied: Applied, index: int, stride: int = 1) -> Comparison:
        """Compare one sequence.

        What is not finite under the plan, because something overflowed, is BROKEN_KL.

        Args:
            applied: a context in which the model runs under the plan.
            index: which sequence.
            stride: compare every `stride`-th position only; the plan still runs on all.

        Raises:
            ValueError: a layer did not run the plan that it has for this length, or the original
                model overflows.
        """
        original = self.states(index)
        with applied(), acting(self.model, original.shape[1]) as act:
            body = body_of(self.model, self.sequences[index])
        planned = body.last_hidden_state
        labels = self.sequences[index].to(original.device)
        compared = torch.arange(stride - 1, planned.shape[1] - 1, stride, device=labels.device)
        if not len(compared):
            compared = torch.arange(planned.shape[1] - 1, device=labels.device)
        found = self.rows(body, original[:, compared], planned[:, compared], labels[compared + 1])
        late = found[compared.cpu() >= planned.shape[1] * 3 // 4]
        kl, loss, loss_dense = found.mean(0).tolist()
        last = float((late if len(late) else found)[:, 0].mean())
        return Comparison(finite_kl(kl), finite_kl(last), finite_kl(loss), loss_dense, act)

    def rows(self, body: Body, original: Tensor, planned: Tensor, labels: Tensor) -> Tensor:
        """KL(original || planned), loss and original loss of some positions, float64 [n, 3].

        Args:
            body: any output of `body_of`.
            original, planned: [1, n, width], final hidden states.
            labels: int64 [n], the tokens that follow.

        Raises:
            ValueError: the original model overflows.
        """
        made = []
        with torch.no_grad(), logits_of(self.model, body) as logits:
            for some in torch.arange(len(labels), device=original.device).split(CHUNK):
                p, q = (logits(x[:, some])[0].float().log_softmax(-1) for x in (original, planned))
                target = labels[some][:, None].to(p.device)
                losses = [-x.gather(1, target)[:, 0] for x in (q, p)]
                made.append(torch.stack([kl_rows(p, q), *losses], 1).double().cpu())
        found = torch.cat(made)
        if not bool(found[:, 2].isfinite().all()):
            raise ValueError(overflowing(self.model))
        return found

    def quality(self, applied: Applied, progress: Callable[[], None] = lambda: None) -> Quality:
        """Compare on all sequences and positions; `progress` is called after each sequence.

        Raises:
            ValueError: the plan did not act (see `comparison`): it leaves something out, but KL is
                exactly 0 everywhere.
        """
        rows = []
        for index in range(len(self.sequences)):
            rows.append(self.comparison(applied, index))
            progress()
        kls = [row.kl for row in rows]
        if not any(kls):
            refuse_without_effect(self.model, rows[0].act)
        count = len(rows)
        spread = statistics.stdev(kls) / count**0.5 if count > 1 else None
        return Quality(
            statistics.fmean(kls),
            spread,
            math.exp(statistics.fmean(row.loss for row in rows)),
            math.exp(statistics.fmean(row.loss_dense for row in rows)),
            count * (self.sequences.shape[1] - 1),
            tuple(kls),
            statistics.fmean(row.last_quarter for row in rows),
            rows[0].act.layers,
        )


def kl_rows(p: Tensor, q: Tensor) -> Tensor:
    """KL of each row from log-probabilities [rows, vocabulary]; ids that p rules out count 0."""
    return torch.where(p.isneginf(), 0, (p - q) * p.exp()).sum(-1)


@torch.no_grad()
def body_of(model: Any, tokens: Tensor) -> Body:
    """The model without its head on one text [tokens]."""
    return run_body(model, tokens)


@torch.no_grad()
def induction_accuracy(
    model: Any, applied: Applied, *, length: int, strings: int = 4, seed: int = 0
) -> float:
    """Share of correct next tokens in the second half of a twice-repeated random token string.

    Args:
        model: a causal language model.
        applied: a context in which to run it; `nullcontext` for the original.
        length: tokens of the whole text, two copies of length // 2.
        strings: how many texts.
        seed: of the random tokens.

    Raises:
        ValueError: no room for two tokens twice, or the plan did not act (see `acting`).
    """
    half = length // 2
    if half < 2:
        raise ValueError(f"induction needs at least 4 tokens, got {length}")
    generator = torch.Generator().manual_seed(seed)
    correct = 0
    for _ in range(strings):
        # the first ids of a vocabulary are special tokens and single bytes
        low = min(1000, model.config.get_text_config().vocab_size // 4)
        high = model.config.get_text_config().vocab_size
        once = torch.randint(low, high, (half,), generator=generator)
        tokens = torch.cat([once, once])
        output_head(model, tokens)
        with applied(), acting(model, len(tokens)):
            body = body_of(model, tokens)
        with logits_of(model, body) as logits:
            for some in torch.arange(half, 2 * half - 1).split(CHUNK):
                guess = logits(body.last_hidden_state[:, some])[0].argmax(-1).cpu()
                correct += int((guess == tokens[some + 1]).sum())
    return correct / (strings * (half - 1))


def prefill_latency(model: Any, applied: Applied, tokens: Tensor, *, repeats: int = 5) -> Timing:
    """Time the whole prefill under a plan beside the original model's, in turn.

    A prefill fills the cache and computes the logits of the last position.

    Args:
        model: a causal language model, not patched.
        applied: a context in which the model runs under the plan; entering is not timed.
        tokens: int64 [tokens], real text.
        repeats: pairs of runs.
    """
    ids = tokens[None].to(input_device(model))
    return interleaved(
        lambda: _prefill(model, ids),
        lambda: _prefill(model, ids),
        repeats,
        context=applied,
    )


def dense_prefill_ms(model: Any, tokens: Tensor, repeats: int) -> float:
    """Median time of the original model's whole prefill, after one that warms up."""
    ids = tokens[None].to(input_device(model))
    return median_ms(lambda: _prefill(model, ids), repeats)


@torch.no_grad()
def kv_bytes(model: Any, applied: Applied, tokens: Tensor) -> int:
    """Bytes that the cache holds after a prefill, counted from tensor storage."""
    with applied():
        output = _prefill(model, tokens[None].to(input_device(model)))
    cache = output["cache" if "cache" in output else "past_key_values"]  # renamed in 5.24
    return stored_bytes(cache)


@torch.no_grad()
def _prefill(model: Any, ids: Tensor) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def original() -> AbstractContextManager[None]:
    """The context of the unplanned model."""
    return nullcontext()
