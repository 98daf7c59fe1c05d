"""A cache that follows a plan generates what dense attention under the same mask generates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_patch import CONFIGS, SIZES, build, logits, padded, text
from torch import Tensor
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from attnplan.kernels import catalog
from attnplan.kernels.cache_policies.clusters import Clusters
from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.cache_policies.observed import Observed
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.cache_policy import SLACK, Keeper
from attnplan.kernels.selectors.window import Window
from attnplan.models.attention_sites import implementation
from attnplan.models.load import LoadedModel, identity
from attnplan.plan.plan import DecodeSection, Plan, PlanError, Target
from attnplan.runtime.attention import KEPT
from attnplan.runtime.cache import PlanLayer, stored_bytes
from attnplan.runtime.patch import load, patch, patch_assignment, patched_stats, unpatch

NARROW, FULL = Recent(window=32, sinks=2), Full()
WIDE = Recent(window=400)
MODELS = ["llama", "qwen2", "qwen3", "mistral", "mistral-sliding", "gemma", "gemma3"]
Kept = Sequence[Sequence[Keeper]]


def kept_by(model: PreTrainedModel, keeper: Keeper) -> list[list[Keeper]]:
    """The keeper in the first kv head of every full-attention layer, all else full."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    sliding = getattr(model.config, "sliding_window", None) is not None
    rows = []
    for kind in types:
        own = (
            keeper if kind == "full_attention" and not (sliding and len(set(types)) == 1) else FULL
        )
        rows.append([own, FULL])
    return rows


def keeping(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    dense = [[catalog.DENSE] * 4] * len(kept)
    fitted = {
        layer: {"clusters.query_mean": torch.zeros(2, 16), "clusters.metric": torch.eye(16)[None]}
        for layer in range(len(kept))
    }
    for row in fitted.values():
        row["clusters.metric"] = row["clusters.metric"].expand(2, -1, -1)
    return patch_assignment(model, dense, fitted, keepers=kept)


@dataclass
class Masked:
    """Dense attention over a dense cache, under the mask of what `Recent` would have kept."""

    kept: Kept
    rows: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    def positions(self, layer: int, head: int, new: range, start: list[int]) -> Tensor:
        """Which keys each new query sees, bool [batch, queries, keys]; then what is kept."""
        keeper = self.kept[layer][head]
        rows = self.rows.setdefault((layer, head), [[] for _ in start])
        if new.start == 0:
            rows[:] = [[] for _ in start]
        mask = torch.zeros(len(start), len(new), new.stop, dtype=torch.bool)
        for b, own in enumerate(rows):
            for r, position in enumerate(new):
                mask[
                    b, r, [p for p in [*own, *range(new.start, position + 1)] if p >= start[b]]
                ] = True
            own.extend(new)
            if isinstance(keeper, Recent) and len(own) >= keeper.limit + SLACK:
                valid = [p for p in own if p >= start[b]][: keeper.sinks]
                newest = own[-keeper.window :]
                fill = keeper.limit - len({*valid, *newest})
                spare = [p for p in own if p not in valid and p not in newest]
                own[:] = sorted({*valid, *newest, *spare[len(spare) - fill :]})
        return mask


_MASKED: list[Masked] = []


def masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    reference = _MASKED[-1]
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    group, layer = heads // key.shape[1], module.layer_idx
    assert mask is not None
    keep = mask
    if any(keeper != FULL for keeper in reference.kept[layer]):
        start = [int(hidden) for hidden in (~mask[:, 0, -1]).sum(1)]  # the last query sees all
        new = range(keys - queries, keys)
        seen = [reference.positions(layer, h, new, start) for h in range(key.shape[1])]
        keep = torch.stack(seen, 1).repeat_interleave(group, 1) & mask
    scale = options.get("scaling") or 1 / math.sqrt(query.shape[3])
    full_key, full_value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = (query @ full_key.mT * scale).masked_fill(~keep, float("-inf"))
    weight = scores.softmax(-1).nan_to_num(0.0)
    return (weight @ full_value).transpose(1, 2).contiguous(), None


def always_square(*args: Any, **options: Any) -> Tensor | None:
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Tensor | None = sdpa_mask(*args, **options)
    return made


AttentionInterface.register("masked_reference", masked_attention)
AttentionMaskInterface.register("masked_reference", always_square)


@contextmanager
def masked(model: PreTrainedModel, kept: Kept) -> Iterator[None]:
    unpatch(model)
    _MASKED.append(Masked(kept))
    try:
        with implementation(model, "masked_reference"):
            yield
    finally:
        _MASKED.pop()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
}


def generated(
    model: PreTrainedModel, input_ids: Tensor, tokens: int = 40, **options: Any
) -> Tensor:
    torch.manual_seed(0)
    made: Tensor = model.generate(
        input_ids, max_new_tokens=tokens, min_new_tokens=tokens, **options
    )
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_dense_under_the_mask(name: str, way: str) -> None:
    """A condensed kv head beside a full one, over several condensings."""
    model = build(CONFIGS[name]())
    kept, ids = kept_by(model, NARROW), text(120, 1)
    mask = torch.ones_like(ids)
    found = generated(keeping(model, kept), ids, attention_mask=mask, **WAYS[way])
    ran = any(counts.get(KEPT) for counts in patched_stats(model).values())
    assert ran == (name != "mistral-sliding")  # whose layers all have windows of their own
    with masked(model, kept):
        expected = generated(model, ids, attention_mask=mask, **WAYS[way])
    assert torch.equal(found, expected)


SOME = Observed(window=400, keys=64)


def page_of_words(smollm2: LoadedModel) -> Any:
    """Two texts as tokens, the shorter padded on the left."""
    words = Path(__file__).read_text().split()
    texts = [" ".join(words[:60]), " ".join(words[80:130])]
    return smollm2.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_smollm2_generates_what_dense_does_under_the_mask(smollm2: LoadedModel, way: str) -> None:
    """A real model and real text: other keepers in every kv head, two texts, one padded."""
    model, given = smollm2.model, page_of_words(smollm2)
    kept = [[(NARROW, FULL, SOME)[(layer + h) % 3] for h in range(3)] for layer in range(30)]
    patch_assignment(model, [[catalog.DENSE] * 9] * 30, {}, keepers=kept)
    try:
        found = generated(model, tokens=36, **given, **WAYS[way])
        with masked(model, kept):
            expected = generated(model, tokens=36, **given, **WAYS[way])
    finally:
        unpatch(model)
    assert torch.equal(found, expected)


def test_smollm2_with_lookup_is_the_model_as_it_is(smollm2: LoadedModel) -> None:
    """Guesses that are taken back, below what is kept."""
    model, given = smollm2.model, page_of_words(smollm2)
    ids = given.input_ids[:1].repeat(1, 2)
    expected = generated(model, ids, 36, do_sample=False)
    patch_assignment(model, [[catalog.DENSE] * 9] * 30, {}, keepers=[[WIDE, FULL, SOME]] * 30)
    try:
        found = generated(model, ids, 36, do_sample=False, prompt_lookup_num_tokens=3)
    finally:
        unpatch(model)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padded_batches_equal_dense_under_the_mask(name: str) -> None:
    """Left padding: what is kept of a text does not depend on its batch mates."""
    model = build(CONFIGS[name]())
    ids, mask = padded(130, 40)
    kept = kept_by(model, NARROW)
    found = generated(keeping(model, kept), ids, attention_mask=mask, do_sample=False)
    with masked(model, kept):
        expected = generated(model, ids, attention_mask=mask, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [7, 50])
def test_a_prefill_in_chunks_equals_dense_under_the_mask(chunk: int) -> None:
    """Later chunks see what was kept of the earlier ones."""
    model = build(CONFIGS["llama"]())
    kept, ids = kept_by(model, NARROW), text(150, 2)

    def run() -> Tensor:
        cache = DynamicCache(config=model.config)
        parts = ids.split(chunk, 1)
        return torch.cat([logits(model, part, cache=cache) for part in parts], 1)

    keeping(model, kept)
    found = run()
    with masked(model, kept):
        expected = run()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("keeper", [WIDE, Observed(400, keys=64), Clusters(400), FULL])
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {}, {"num_beams": 2}])
def test_what_forgets_nothing_is_the_model_as_it_is(
    keeper: Keeper, options: dict[str, Any]
) -> None:
    """Below the limit, prompt lookup included, the tokens are those of the dense cache."""
    model = build(CONFIGS["llama"]())
    ids = text(40, 1).repeat(1, 3)
    expected = generated(model, ids, do_sample=False, **options)
    keeping(model, kept_by(model, keeper))
    assert torch.equal(generated(model, ids, do_sample=False, **options), expected)


@pytest.mark.parametrize(
    "keeper", [NARROW, Observed(32, keys=16), Clusters(32, keys=8, clusters=8)]
)
def test_guesses_that_fail_leave_no_trace(keeper: Keeper) -> None:
    """Prompt lookup and an assistant on a condensed past: as many tokens, all finite."""
    model = build(CONFIGS["llama"]())
    ids = text(40, 1).repeat(1, 4)
    keeping(model, kept_by(model, keeper))
    looked_up = generated(model, ids, do_sample=False, prompt_lookup_num_tokens=4)
    assert looked_up.shape[1] == ids.shape[1] + 40
    assistant = build(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    helped = generated(model, ids, do_sample=False, assistant_model=assistant)
    assert helped.shape == looked_up.shape


def test_a_second_turn_goes_on_with_what_was_kept() -> None:
    """The cache of a first generation is handed to the next."""
    model = build(CONFIGS["llama"]())
    kept, ids = kept_by(model, NARROW), text(100, 1)

    def talk() -> Tensor:
        first = model.generate(
            ids, max_new_tokens=20, min_new_tokens=20, return_dict_in_generate=True, do_sample=False
        )
        cache = first["cache" if "cache" in first else "past_key_values"]
        more = torch.cat([first.sequences, text(9, 1)], 1)
        name = "cache" if "cache" in first else "past_key_values"
        made: Tensor = model.generate(more, max_new_tokens=20, do_sample=False, **{name: cache})
        return made

    keeping(model, kept)
    found = talk()
    with masked(model, kept):
        expected = talk()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "keeper", [NARROW, Observed(32, keys=16), Clusters(32, keys=8, clusters=8)]
)
def test_fewer_bytes_are_really_held(keeper: Keeper) -> None:
    """Counted from storage, after a prefill and after generating."""
    model = build(CONFIGS["llama"]())
    ids = text(400, 1)
    dense = logits_cache(model, ids)
    keeping(model, [[keeper, keeper]] * 2)
    planned = logits_cache(model, ids)
    assert stored_bytes(planned) < 0.25 * stored_bytes(dense)
    for step in range(70):
        logits(model, ids[:, step : step + 1], cache=planned)
    assert stored_bytes(planned) < 0.25 * stored_bytes(dense)
    assert all(isinstance(layer, PlanLayer) for layer in planned.layers)
    assert planned.get_seq_length() == 470


@torch.no_grad()
def logits_cache(model: PreTrainedModel, ids: Tensor) -> Any:
    """The cache that a forward pass makes by itself."""
    output = model(input_ids=ids, use_cache=True)
    return output["cache" if "cache" in output else "past_key_values"]


def test_a_planned_prefill_and_a_kept_past_go_together() -> None:
    """Both phases of one plan run."""
    model = build(CONFIGS["llama"]())
    near = catalog.Approximation(Window(8, 2))
    patch_assignment(model, [[near] * 4] * 2, keepers=[[NARROW] * 2] * 2)
    generated(model, text(120, 1), do_sample=False)
    for counts in patched_stats(model).values():
        assert counts == {"plan": 1, KEPT: 39}


def test_unpatching_takes_the_cache_away_too() -> None:
    """Afterwards the model makes caches of its own again."""
    model = build(CONFIGS["llama"]())
    before = generated(model, text(100, 1), do_sample=False)
    keeping(model, [[NARROW] * 2] * 2)
    unpatch(model)
    assert torch.equal(generated(model, text(100, 1), do_sample=False), before)
    assert not any(isinstance(layer, PlanLayer) for layer in logits_cache(model, text(9)).layers)
    keeping(model, [[NARROW] * 2] * 2)
    patch_assignment(model, [[catalog.DENSE] * 4] * 2)  # a patch without keepers replaces it
    assert not any(isinstance(layer, PlanLayer) for layer in logits_cache(model, text(9)).layers)


def test_other_caches_are_refused() -> None:
    """Static, filled before, offloaded, and masks that are more than causal: a sentence each."""
    model = build(CONFIGS["llama"]())
    filled = logits_cache(model, text(9))
    keeping(model, [[NARROW] * 2] * 2)
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="which a StaticCache cannot: use the default cache"):
        logits(model, text(9), cache=static)
    with pytest.raises(ValueError, match="StaticCache cannot"):
        generated(model, text(9), cache_implementation="static")
    with pytest.raises(ValueError, match="a cache that was filled without it cannot"):
        logits(model, text(1), cache=filled)
    with pytest.raises(ValueError, match="an offloaded cache cannot"):
        logits(model, text(9), cache=DynamicCache(config=model.config, offloading=True))
    square = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs a causal mask with padding at most"):
        logits(model, text(9), attention_mask=square, use_cache=True)


def plan_of(model: PreTrainedModel, kept: Kept, **options: Any) -> Plan:
    target = Target("here", "cpu", "float32", "cpu", {})
    section = DecodeSection((1, 400), tuple(tuple(row) for row in kept))
    return Plan(identity(model), target, {}, (), decode=(section,), **options)


def test_a_plan_file_keeps_what_is_kept(tmp_path: Path) -> None:
    """YAML there and back; the loaded model stores less."""
    model = build(CONFIGS["llama"]())
    plan = plan_of(model, [[NARROW, FULL], [FULL, Observed(32, keys=16)]])
    path = tmp_path / "plan.yaml"
    plan.save(path)
    again = Plan.load(path)
    assert again.decode == plan.decode
    assert "decoding keeps everything in 2 of 4 kv heads" in again.summary()
    model.save_pretrained(tmp_path / "model")
    loaded = load(str(tmp_path / "model"), path)
    cache = logits_cache(loaded, text(300, 1))
    assert [layer.store.rows for layer in cache.layers] == [(34, 300), (300, 52)]


def test_bad_decode_sections_are_told_with_their_place(tmp_path: Path) -> None:
    """A kv head twice, one missing, an unknown keeper, calibrated data that is not there."""
    model = build(CONFIGS["llama"]())
    path = tmp_path / "plan.yaml"
    plan_of(model, [[NARROW, FULL], [FULL, FULL]]).save(path)
    good = path.read_text()
    edits = {
        "full: 1}": ("full: 0-1}", "phases.decode[0].layers.0: kv head 0 is listed twice"),
        "      1: full": ("      0-1: full", "layer 0 is listed twice"),
        "name: recent": ("name: fifo", "unknown keeper 'fifo'"),
        "window: 32": ("window: 3", "window must be at least 32 keys, got 3"),
    }
    for old, (new, message) in edits.items():
        assert old in good, good
        path.write_text(good.replace(old, new, 1))
        with pytest.raises(PlanError) as raised:
            Plan.load(path)
        assert message in str(raised.value)
    with pytest.raises(PlanError, match="needs fitted data 'clusters"):
        plan_of(model, [[Clusters(64)] * 2] * 2).save(path)
    with pytest.raises(PlanError, match="decode, layer 1: 1 kv heads"):
        plan_of(model, [[FULL] * 2, [FULL]])


def test_models_that_cannot_follow_are_refused() -> None:
    """Sliding windows of the model's own; a model that keeps no cache."""
    model = build(CONFIGS["gemma3"]())
    with pytest.raises(PlanError, match="layer 0 has a sliding window of 32 keys"):
        keeping(model, [[NARROW] * 2] * 2)
    model = build(CONFIGS["llama"]())
    plan = plan_of(model, [[NARROW] * 2] * 2)
    model.config.use_cache = False
    with pytest.raises(PlanError, match="keeps no cache"):
        patch(model, replace(plan, model=identity(model)))
