"""Retrieval probes: what a model still finds in its past once that has been condensed.

Facts are hidden in a text at several depths: pass keys in prose, key-value pairs as in JSON, and
random strings of tokens. Then each is asked for, in two ways. Asked in the prompt, the past is
condensed only after the question has been read, as when a document and a question come together;
asked later, it is condensed before, as when a question about a document comes in a next turn.

Source: Mohtashami and Jaggi, Landmark Attention, https://arxiv.org/abs/2305.16300, section 4.2 (the
pass key); Liu et al., Lost in the Middle, https://arxiv.org/abs/2307.03172, section 3 (key-value
retrieval). Unlike there, the facts lie in real text, all in one, and answers are teacher-forced.
"""

from __future__ import annotations

import copy
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnplan.profiles.capture.capture import logits_of
from attnplan.profiles.capture.output_head import Body, output_head
from attnplan.quality.continuation import condense, prompt, step
from attnplan.quality.prefill import Applied
from attnplan.runtime.acting import acting

KINDS = ("passkey", "key_value", "copy")
PROBED = 2
"""Texts in which facts are hidden when a plan is verified."""
DEPTHS = 5
"""Facts of each kind in a text, spread evenly."""
PLACES = ("Oslo", "Cairo", "Lima", "Tokyo", "Delhi", "Rome", "Berlin", "Madrid", "Vienna", "Sydney")
SHORT = "retrieval could not be judged: the texts are too short to hide facts in"
TOLERANCE = 0.02
"""Share of facts that a plan may find less than the original model."""
CUE, COPIED = 16, 8
"""Tokens of a random string that are shown again, and that must follow."""


class TooShort(ValueError):
    """Facts of all kinds would fill more than half of a text."""


@dataclass(frozen=True)
class Probe:
    """One fact.

    Attributes:
        kind: of `KINDS`.
        fact: tokens that stand in the text.
        question: tokens that ask for it.
        answer: tokens that must follow.
    """

    kind: str
    fact: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Recall:
    """Share of exact answers, by kind.

    Attributes:
        in_prompt: asked before the past was condensed.
        later: asked after it.
    """

    in_prompt: dict[str, float]
    later: dict[str, float]

    def worse(self, than: Recall, tolerance: float = TOLERANCE) -> list[str]:
        """Kinds of facts that are found in the prompt less often than by another model."""
        return [k for k in KINDS if self.in_prompt[k] < than.in_prompt[k] - tolerance]

    def unjudged(self, tolerance: float = TOLERANCE) -> str | None:
        """Which losses could not show beside this model, the original; None where all could."""
        kinds = [k for k in KINDS if self.in_prompt[k] <= tolerance]
        if not kinds:
            return None
        return (
            f"retrieval of {' and '.join(kinds)} could not be judged: the original model finds at "
            f"most {max(self.in_prompt[k] for k in kinds):.2f} of the facts itself"
        )


class Retrieval:
    """Texts with hidden facts.

    Args:
        model: a causal language model, not patched.
        tokenizer: of the model.
        texts: int64 [texts, tokens], among whose words facts are hidden; what does not fit any more
            is cut off.
        seed: of the facts.

    Raises:
        TooShort: the texts are too short to hide facts in.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Tensor, *, seed: int = 0) -> None:
        self.model = model
        vocabulary = int(model.config.get_text_config().vocab_size)
        made = random.Random(seed)
        self.texts: list[tuple[Tensor, list[Probe]]] = []
        for text in texts.tolist():
            places = made.sample(PLACES, DEPTHS)
            probes = [
                _probe(kind, tokenizer, vocabulary, places, made)
                for _ in range(DEPTHS)
                for kind in KINDS
            ]
            self.texts.append((_hide(probes, text), probes))

    @property
    def tolerance(self) -> float:
        """`TOLERANCE`, or one fact where there are few."""
        return max(TOLERANCE, 1 / (DEPTHS * len(self.texts))) + 1e-9

    def recall(self, applied: Applied, advance: Callable[[], None] = lambda: None) -> Recall:
        """Ask everything of the model under a plan; `advance` is called after each text."""
        right: dict[tuple[str, bool], list[bool]] = {}
        for text, probes in self.texts:
            output_head(self.model, text)
            with applied():
                with acting(self.model, len(text)):
                    waiting = prompt(self.model, text, recording=True)
                condensed = copy.deepcopy(waiting)
                condense(condensed)
                for probe in probes:
                    for later, body in ((False, waiting), (True, condensed)):
                        found = self._knows(copy.deepcopy(body), probe)
                        right.setdefault((probe.kind, later), []).append(found)
            advance()

        def shares(later: bool) -> dict[str, float]:
            return {kind: sum(right[kind, later]) / len(right[kind, later]) for kind in KINDS}

        return Recall(shares(False), shares(True))

    def _knows(self, body: Body, probe: Probe) -> bool:
        body = step(self.model, body, torch.tensor(probe.question))
        states = [body.last_hidden_state[:, -1:]]
        condense(body)
        if len(probe.answer) > 1:
            body = step(self.model, body, torch.tensor(probe.answer[:-1]))
            states.append(body.last_hidden_state)
        with logits_of(self.model, body) as logits:
            guess = logits(torch.cat(states, 1))[0].argmax(-1)
        return guess.tolist() == list(probe.answer)


def retrieval(model: Any, tokenizer: Any, texts: Tensor, *, seed: int = 0) -> Retrieval | None:
    """Facts hidden in texts, None where the texts are too short for it."""
    try:
        return Retrieval(model, tokenizer, texts, seed=seed)
    except TooShort:
        return None


def rehearsal(
    model: Any, tokenizer: Any, text: Tensor, *, seed: int = 0
) -> tuple[Tensor, int] | None:
    """A text with hidden facts that ends with all questions and answers, and how long they are.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        text: int64 [tokens]; what is returned is as long.
        seed: of the facts.

    Returns:
        int64 [tokens] and the number of tokens from the first question on; None where the text is
        too short.
    """
    probes = retrieval(model, tokenizer, text[None], seed=seed)
    if probes is None:
        return None
    ((hidden, facts),) = probes.texts
    asked = [token for fact in facts for token in (*fact.question, *fact.answer)]
    kept = len(text) - len(asked)
    if kept < len(text) // 2:
        return None
    # the oldest tokens go: what they held is asked for, and cannot be known
    return torch.cat([hidden[-kept:], torch.tensor(asked)]), len(asked)


def _probe(
    kind: str, tokenizer: Any, vocabulary: int, places: list[str], made: random.Random
) -> Probe:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if kind == "copy":
        # the first ids of a vocabulary are special tokens and single bytes
        low = min(1000, vocabulary // 4)
        fact = [made.randrange(low, vocabulary) for _ in range(CUE + COPIED)]
        return Probe(kind, tuple(fact), tuple(fact[:CUE]), tuple(fact[CUE:]))
    answer = ids("".join(made.choices(string.digits, k=5)))
    if kind == "passkey":
        name = places.pop()
        asked = ids(f"\n\nThe pass key of {name} is ")
        again = ids(". Remember it. ") + answer + ids(f" is the pass key of {name}.\n\n")
        question = ids(f"\n\nWhat is the pass key of {name}? The pass key of {name} is ")
    else:
        name = "".join(made.choices(string.ascii_lowercase, k=6))
        asked = question = ids(f'\n"{name}": "')
        again = ids('",\n')
    return Probe(kind, tuple(asked + answer + again), tuple(question), tuple(answer))


def _hide(probes: list[Probe], text: list[int]) -> Tensor:
    """The beginning of a text with facts in it, evenly spread; question and answer have room."""
    taken = sum(len(probe.fact) for probe in probes)
    longest = max(len(probe.question) + len(probe.answer) for probe in probes)
    room = len(text) - taken - longest
    if room < taken:
        raise TooShort(
            f"retrieval probes need texts of at least {2 * taken + longest} tokens, got {len(text)}"
        )
    found: list[int] = []
    for number, probe in enumerate(probes):
        found += text[number * room // len(probes) : (number + 1) * room // len(probes)]
        # the first fact lies after the first piece of text, the last before the question
        found += probe.fact
    return torch.tensor(found)
