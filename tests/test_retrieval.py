"""Facts hidden in a text are found by a model that can, and only with what it keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.cache_policy import Keeper
from attnplan.models.load import LoadedModel
from attnplan.profiles.text.calibration import load_sequences
from attnplan.quality.prefill import original
from attnplan.quality.retrieval import DEPTHS, KINDS, Recall, Retrieval, rehearsal, retrieval
from attnplan.runtime.patch import patch_assignment, unpatch


@contextmanager
def keeping(loaded: LoadedModel, keeper: Keeper) -> Iterator[None]:
    identity = loaded.identity
    dense = [[catalog.DENSE] * identity.heads] * identity.layers
    patch_assignment(loaded.model, dense, keepers=[[keeper] * identity.kv_heads] * identity.layers)
    try:
        yield
    finally:
        unpatch(loaded.model)


def test_a_window_forgets_what_lies_before_it(smollm2: LoadedModel) -> None:
    """Keeping everything answers as the original model does; a window does not."""
    text = load_sequences(
        smollm2.tokenizer, "builtin", context=1024, sequences=1, split="holdout"
    ).tokens
    probes = Retrieval(smollm2.model, smollm2.tokenizer, text)
    assert len(probes.texts[0][0]) <= 1024
    dense = probes.recall(original)
    assert dense.in_prompt == dense.later
    assert dense.in_prompt["key_value"] >= 0.6
    assert probes.recall(lambda: keeping(smollm2, cache_catalog.FULL)) == dense
    window = probes.recall(lambda: keeping(smollm2, Recent(64)))
    assert window.later["key_value"] <= 0.2
    assert "key_value" in window.worse(dense)


def test_every_fact_stands_in_the_text_once(smollm2: LoadedModel) -> None:
    text = torch.randint(1000, 40000, (2, 1500), generator=torch.Generator().manual_seed(0))
    for hidden, probes in Retrieval(smollm2.model, smollm2.tokenizer, text).texts:
        line = hidden.tolist()
        for probe in probes:
            size = len(probe.fact)
            found = sum(
                line[at : at + size] == list(probe.fact) for at in range(len(line) - size + 1)
            )
            assert found == 1
            asked = (*probe.question, *probe.answer)
            if probe.kind != "passkey":  # whose question is worded otherwise
                assert probe.fact[: len(asked)] == asked


def test_a_short_text_has_no_room(smollm2: LoadedModel) -> None:
    text = torch.zeros(1, 300, dtype=torch.int64)
    assert retrieval(smollm2.model, smollm2.tokenizer, text) is None
    with pytest.raises(ValueError, match=r"at least .* tokens, got 300"):
        Retrieval(smollm2.model, smollm2.tokenizer, text)


def test_a_few_points_are_no_loss() -> None:
    dense = Recall(dict.fromkeys(KINDS, 0.9), dict.fromkeys(KINDS, 0.9))
    same = Recall(dict.fromkeys(KINDS, 0.89), dict.fromkeys(KINDS, 0.0))
    worse = Recall({**same.in_prompt, "copy": 0.87}, same.later)
    assert same.worse(dense) == []
    assert worse.worse(dense) == ["copy"]


def test_a_rehearsal_ends_with_every_question_and_answer(smollm2: LoadedModel) -> None:
    """As long as the text; facts that are asked for stand in it, the oldest excepted."""
    text = load_sequences(
        smollm2.tokenizer, "builtin", context=2048, sequences=1, split="calibration"
    ).tokens[0]
    made = rehearsal(smollm2.model, smollm2.tokenizer, text)
    assert made is not None
    tokens, new = made
    assert len(tokens) == 2048 and 0 < new < 512
    told = smollm2.tokenizer.decode(tokens[:-new])
    asked = smollm2.tokenizer.decode(tokens[-new:])
    keys = re.findall(r"The pass key of (\w+) is (\d{5})", asked)
    assert len(keys) == DEPTHS
    assert sum(f"The pass key of {name} is {key}" in told for name, key in keys) >= DEPTHS - 1
    assert rehearsal(smollm2.model, smollm2.tokenizer, text[:500]) is None


def test_what_the_original_model_does_not_find_cannot_be_judged() -> None:
    found = Recall({"passkey": 0.9, "key_value": 0.0, "copy": 0.02}, dict.fromkeys(KINDS, 0.0))
    said = found.unjudged()
    assert said is not None
    assert said.startswith("retrieval of key_value and copy could not be judged")
    assert said.endswith("at most 0.02 of the facts itself")
    assert Recall(dict.fromkeys(KINDS, 0.5), dict.fromkeys(KINDS, 0.0)).unjudged() is None
