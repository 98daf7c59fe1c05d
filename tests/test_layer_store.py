"""What a layer stores: exact where it keeps, closed under condensing, the same in any steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnplan.kernels import cache_catalog
from attnplan.kernels.cache_policies.clusters import Clusters
from attnplan.kernels.cache_policies.full import Full
from attnplan.kernels.cache_policies.observed import Observed
from attnplan.kernels.cache_policies.pages import Pages
from attnplan.kernels.cache_policies.recent import Recent
from attnplan.kernels.contracts.cache_policy import SLACK, BoundedKeeper, Keeper
from attnplan.kernels.engines.reference import decode as reference_decode
from attnplan.kernels.kv_cache.layer_cache import LayerStore, capacity, row_bytes
from attnplan.kernels.operands.kv_rows import PAGE, bounds_of

BATCH, GROUP, DIM = 2, 3, 16
SMALL: list[Keeper] = [
    Full(),
    Recent(window=40),
    Observed(window=32, keys=24),
    Clusters(window=32, keys=16, clusters=12),
    Pages(pages=3, window=32),
]


def tokens(count: int, kv_heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a layer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (kv_heads * GROUP, kv_heads, kv_heads)
    query, key, value = (torch.randn(BATCH, h, count, DIM, generator=generator) for h in sizes)
    return query, key, value


def fitted(kv_heads: int) -> dict[str, Tensor]:
    return {
        "clusters.query_mean": torch.full((kv_heads, DIM), 0.1),
        "clusters.metric": torch.eye(DIM).expand(kv_heads, -1, -1),
    }


def feed(
    store: LayerStore,
    text: tuple[Tensor, Tensor, Tensor],
    steps: list[int],
    padding: Tensor | None = None,
) -> Tensor:
    """Everything that attention gave, [batch, heads, tokens, dim]."""
    found, first = [], 0
    for step in steps:
        query, key, value = (t[:, :, first : first + step] for t in text)
        hidden = None if padding is None else padding[:, first : first + step]
        store.append(key, value, hidden)
        found.append(store.attend(query))
        store.settle(query)
        first += step
    return torch.cat(found, 2)


def store_of(*kept: Keeper) -> LayerStore:
    return LayerStore(kept, scale=DIM**-0.5, fitted=fitted(len(kept)))


def dense(text: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    query, key, value = (t.double() for t in text)
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("steps", [[300], [1] * 150, [64, 1, 1, 100, 3]])
def test_a_full_store_is_dense_attention(steps: list[int]) -> None:
    """At once, token by token, in chunks."""
    text = tokens(sum(steps), 2)
    found = feed(store_of(Full(), Full()), text, steps)
    torch.testing.assert_close(found.double(), dense(text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keeper", SMALL[1:4])
def test_a_past_below_the_limit_is_kept_whole(keeper: BoundedKeeper) -> None:
    """Nothing is condensed before there is more than the limit and its slack."""
    count = keeper.limit + SLACK - 1
    text = tokens(count, 1)
    store = store_of(keeper)
    found = feed(store, text, [7] + [1] * (count - 7))
    torch.testing.assert_close(found.double(), dense(text), rtol=0, atol=1e-5)
    assert store.rows == (count,)


def test_recent_is_attention_under_its_mask() -> None:
    """Sinks, the last window, and what accumulated since the last condensing."""
    keeper, count = Recent(window=40, sinks=3), 200
    text = tokens(count, 1)
    store, mask = store_of(keeper), torch.zeros(count, count, dtype=torch.bool)
    kept: list[int] = []
    found = []
    for i in range(count):
        kept.append(i)
        mask[i, kept] = True
        found.append(feed(store, tuple(t[:, :, i : i + 1] for t in text), [1]))  # type: ignore[arg-type]
        if len(kept) == keeper.limit + SLACK:
            kept = [*range(3), *range(i + 1 - 40, i + 1)]
        assert store.rows == (len(kept),)
    query, key, value = (t.double() for t in text)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1), attn_mask=mask
    )
    torch.testing.assert_close(torch.cat(found, 2).double(), expected, rtol=0, atol=1e-5)


def test_observed_keeps_what_is_attended_to() -> None:
    """Keys that all queries point at survive; their equals that none points at do not."""
    query, key, value = tokens(400, 1)
    wanted = [50, 90, 170, 300]
    query = query * 0.1 + 4 * torch.nn.functional.one_hot(torch.tensor(0), DIM)
    key[..., 0] = 0
    key[:, :, wanted, 0] = 8.0
    store = store_of(Observed(window=32, keys=4 + 4, pool=1))
    feed(store, (query, key, value), [400])
    kept = store.stored[0].key[:, :, : store.rows[0]]
    for position in wanted:
        assert (kept == key[:, :, position : position + 1]).all(-1).any(2).all()
    assert store.rows == (4 + 8 + 32,)


def test_clusters_are_exact_where_keys_coincide() -> None:
    """Copies of a few keys are represented without loss by as many clusters."""
    query, key, value = tokens(300, 1)
    few, one = tokens(6, 1, seed=1)[1:]
    place = torch.arange(300) % 6
    key, value = few[:, :, place], one[:, :, place]
    text = (query, key, value)
    store = store_of(Clusters(window=32, keys=8, clusters=64, sinks=1))
    feed(store, text, [300])
    more = tokens(1, 1, seed=2)
    store.append(*more[1:])
    whole = (more[0], torch.cat([key, more[1]], 2), torch.cat([value, more[2]], 2))
    expected = dense((torch.cat([query, whole[0]], 2), whole[1], whole[2]))[:, :, -1:]
    torch.testing.assert_close(store.attend(more[0]).double(), expected, rtol=0, atol=1e-4)
    mass = [r.bias[:, :, : r.length].exp().sum(-1) for r in store.stored if r.bias is not None]
    assert torch.isfinite(mass[0]).all()


@pytest.mark.parametrize("keeper", SMALL)
def test_chunks_of_the_slack_equal_single_steps(keeper: Keeper) -> None:
    """After a prefill, 32 tokens at once are 32 single tokens."""
    text = tokens(256 + 3 * SLACK, 2)
    one, many = store_of(keeper, Full()), store_of(keeper, Full())
    by_one = feed(one, text, [256] + [1] * (3 * SLACK))
    by_chunk = feed(many, text, [256] + [SLACK] * 3)
    torch.testing.assert_close(by_one, by_chunk, rtol=0, atol=2e-5)
    assert one.rows == many.rows
    assert one.seen == many.seen == 256 + 3 * SLACK


@pytest.mark.parametrize("keeper", SMALL)
def test_batch_mates_and_left_padding_change_nothing(keeper: Keeper) -> None:
    """A padded text gives what it gives alone, at every step."""
    count, start = 220, 2 * PAGE
    text = tokens(count, 1)
    padding = torch.zeros(BATCH, count, dtype=torch.bool)
    padding[1, :start] = True
    for tensor in text[1:]:
        tensor[1, :, :start] = 1e4  # must not matter
    steps = [160] + [1] * 60
    found = feed(store_of(keeper), text, steps, padding)[1:, :, start:]
    alone = tuple(t[1:, :, start:] for t in text)
    expected = feed(store_of(keeper), alone, [160 - start] + [1] * 60)  # type: ignore[arg-type]
    before = min(160 - start, 60) if keeper.limit else count - start
    torch.testing.assert_close(found[:, :, :before], expected[:, :, :before], rtol=0, atol=1e-4)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("keeper", SMALL)
def test_bytes_are_what_was_promised(keeper: Keeper) -> None:
    """Counted from storages; whatever is observed on the way is small and counted too."""
    store = store_of(keeper, keeper)
    text = tokens(512, 2)
    feed(store, text, [512])
    each = row_bytes(keeper, DIM, DIM, 4)
    assert store.nbytes == BATCH * 2 * capacity(keeper, 512) * each
    feed(store, tokens(10, 2), [1] * 10)
    waiting = BATCH * 2 * GROUP * 10 * DIM * 4 if keeper.observes else 0
    assert store.nbytes == BATCH * 2 * capacity(keeper, 522) * each + waiting


@pytest.mark.parametrize("keeper", SMALL)
def test_tokens_can_be_taken_back_while_recording(keeper: Keeper) -> None:
    """A wrong guess of several tokens leaves no trace."""
    text, guess = tokens(300, 1), tokens(9, 1, seed=5)
    plain, recording = store_of(keeper), store_of(keeper)
    feed(plain, text, [256] + [1] * 44)
    recording.recording = True
    feed(recording, text, [256])
    recording.crop(0)
    rest = tuple(t[:, :, 256:] for t in text)
    for i in range(44):
        one = tuple(t[:, :, i : i + 1] for t in rest)
        steps = tuple(torch.cat(pair, 2) for pair in zip(one, guess, strict=True))
        feed(recording, steps, [10])  # type: ignore[arg-type]
        recording.crop(9)
    assert recording.rows == plain.rows
    query = tokens(1, 1, seed=6)
    for store in (plain, recording):
        store.append(*query[1:])
    expected = plain.attend(query[0])
    torch.testing.assert_close(recording.attend(query[0]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("keeper", SMALL)
def test_a_step_does_what_its_parts_do(keeper: Keeper) -> None:
    """Beside a whole kv head; between chunks, tokens that are taken back and chosen rows."""
    text = tokens(400, 3)
    stores = [store_of(keeper, Full(), keeper) for _ in range(2)]
    first, taken = 70, 0
    for store in stores:
        feed(store, tuple(t[:, :, :first] for t in text), [first])  # type: ignore[arg-type]
    for number in range(180):
        chunk = 3 if number % 50 == 20 else 1
        query, key, value = (t[:, :, first : first + chunk] for t in text)
        if number % 60 == 40:
            for store in stores:
                store.select(torch.tensor([1, 0]))
        for store in stores:
            store.recording = number % 70 < 6
        found = [feed(stores[0], (query, key, value), [chunk])]
        step = stores[1].step(query, key, value) if chunk == 1 else None
        taken += step is not None
        found.append(feed(stores[1], (query, key, value), [chunk]) if step is None else step)
        assert torch.equal(*found)
        first += chunk
        if number % 70 == 5:
            for store in stores:
                store.crop(2)
        assert stores[0].rows == stores[1].rows and stores[0].seen == stores[1].seen
    assert taken == 0 if keeper.reads else taken > 150
    for one, other in zip(stores[0].stored, stores[1].stored, strict=True):
        assert torch.equal(one.key[:, :, : one.length], other.key[:, :, : one.length])
        assert torch.equal(one.value[:, :, : one.length], other.value[:, :, : one.length])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_stores_sixteen_bits(dtype: torch.dtype) -> None:
    query, key, value = (t.to(dtype) for t in tokens(80, 2))
    stores = [store_of(Full(), Full()) for _ in range(2)]
    for store in stores:
        feed(store, (query[:, :, :60], key[:, :, :60], value[:, :, :60]), [60])
    for at in range(60, 80):
        one = tuple(t[:, :, at : at + 1] for t in (query, key, value))
        step = stores[0].step(*one)
        found = feed(stores[1], one, [1])  # type: ignore[arg-type]
        assert at == 64 or step is not None  # there the tensors grow
        assert torch.equal(feed(stores[0], one, [1]) if step is None else step, found)  # type: ignore[arg-type]


def test_a_step_refuses_what_does_not_fit_and_goes_back_to_its_parts() -> None:
    text = tokens(100, 2)
    store = store_of(Full(), Full())
    assert store.step(*(t[:, :, :1] for t in text)) is None  # nothing is stored yet
    feed(store, tuple(t[:, :, :70] for t in text), [70])  # type: ignore[arg-type]
    query, key, value = (t[:, :, 70:71] for t in text)
    assert store.step(query, key[..., :8], value) is None
    assert store.step(query, key.double(), value) is None
    assert store.rows == (70, 70)
    strided = torch.stack([value, value], -1)[..., 0]
    assert strided.stride(3) == 2 and store.step(query, key, strided) is None
    found = store.step(query, key, value)
    assert found is not None and store.rows == (71, 71)
    expected = dense(tuple(t[:, :, :71] for t in text))[:, :, -1:]  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_what_is_condensed_cannot_be_taken_back() -> None:
    """Without recording the error says what to do."""
    store = store_of(Recent(window=40))
    feed(store, tokens(300, 1), [300])
    feed(store, tokens(5, 1), [5])
    store.crop(5)
    with pytest.raises(ValueError, match="all but the last 0 are condensed"):
        store.crop(1)


@pytest.mark.parametrize("keeper", SMALL)
def test_rows_of_the_batch_can_be_chosen(keeper: Keeper) -> None:
    """As beam search does: a row may go on twice."""
    text = tokens(200, 1)
    store = store_of(keeper)
    feed(store, text, [190] + [1] * 10)
    before = store.attend(text[0][:, :, -1:])
    store.select(torch.tensor([1, 1, 0]))
    after = store.attend(text[0][[1, 1, 0], :, -1:])
    torch.testing.assert_close(after, before[[1, 1, 0]])


@pytest.mark.parametrize("keeper", [k for c in (128, 1024, 8192) for k in cache_catalog.choices(c)])
def test_keepers_are_spelled_and_read_back(keeper: Keeper) -> None:
    """All choices of the catalog, at several contexts."""
    assert cache_catalog.from_dict(cache_catalog.to_dict(keeper)) == keeper
    assert keeper.limit is None or keeper.limit >= keeper.recent
    assert math.prod(capacity(keeper, n) for n in (1, 8192)) > 0


def test_bad_spellings_are_refused() -> None:
    """Unknown names, unknown knobs, values that make no sense."""
    with pytest.raises(ValueError, match="unknown keeper 'fifo'; known: full, recent"):
        cache_catalog.from_dict({"keep": {"name": "fifo"}})
    with pytest.raises(ValueError, match="recent has no knob 'top'"):
        cache_catalog.from_dict({"keep": {"name": "recent", "window": 64, "top": 3}})
    with pytest.raises(ValueError, match="window must be at least 32 keys, got 8"):
        cache_catalog.from_dict({"keep": {"name": "recent", "window": 8}})
    with pytest.raises(ValueError, match="pool must be odd, got 4"):
        Observed(window=64, pool=4)
    with pytest.raises(ValueError, match="pages must be at least 1, got 0"):
        cache_catalog.from_dict({"keep": {"name": "pages", "pages": 0}})
    with pytest.raises(ValueError, match="window must be at least 16 keys, got 8"):
        Pages(pages=4, window=8)
    with pytest.raises(ValueError, match="clusters must be at least 1"):
        Clusters(window=64, clusters=0)


def test_all_pages_are_dense_attention() -> None:
    text = tokens(200, 2)
    found = feed(store_of(Pages(pages=99), Pages(pages=10)), text, [150] + [1] * 50)
    torch.testing.assert_close(found.double(), dense(text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [[1] * 60, [7, 31, 22]])
def test_pages_are_chosen_by_their_bounds(steps: list[int]) -> None:
    """Against dense attention under the mask that the definition gives, head by head."""
    keeper, count = Pages(pages=2, window=40), 260
    text = tokens(count, 1)
    query, key, value = (t.double() for t in text)
    key[:, :, 80] *= 4  # some page that matters to half of the queries
    text = (text[0], key.float(), text[2])
    found = feed(store_of(keeper), text, [200, *steps])[:, :, 200:]
    for i in range(200, count):
        newest = (i + 1 - 40) // PAGE
        for b in range(BATCH):
            pages = key[b, 0, : newest * PAGE].unflatten(0, (-1, PAGE))
            q = query[b, :, i]
            each = torch.maximum(q[:, None] * pages.amax(1), q[:, None] * pages.amin(1)).sum(-1)
            worth = (each * DIM**-0.5).softmax(-1).sum(0)
            best = (worth[1:].argsort(descending=True)[:2] + 1).tolist()
            rows = [r for p in [0, *best] for r in range(p * PAGE, (p + 1) * PAGE)]
            rows += range(newest * PAGE, i + 1)
            weight = (q @ key[b, 0, rows].mT * DIM**-0.5).softmax(-1)
            expected = weight @ value[b, 0, rows]
            torch.testing.assert_close(found[b, :, i - 200].double(), expected, rtol=0, atol=1e-5)


def test_bounds_bound() -> None:
    """No key of a page scores more; a last page may be short."""
    query, key, _ = tokens(70, 1)
    high, low = bounds_of(key).chunk(2, -1)
    assert high.shape == (BATCH, 1, 5, DIM)
    q = query[:, :1, :, None]
    bound = torch.maximum(q * high[:, :, None], q * low[:, :, None]).sum(-1)
    scores = torch.nn.functional.pad(query[:, :1] @ key.mT, (0, 10), value=float("-inf"))
    assert (scores.unflatten(-1, (5, PAGE)).amax(-1) <= bound + 1e-5).all()


def test_engines_see_every_kv_head_once() -> None:
    """Mixed keepers in one layer, in any order, against the reference."""
    text = tokens(300, 4)
    store = store_of(SMALL[1], SMALL[0], SMALL[3], SMALL[1])
    feed(store, text, [280] + [1] * 19)
    query, key, value = (t[:, :, -1:] for t in text)
    store.append(key, value)
    wide = [
        type(r)(r.kv_heads, r.key.double(), r.value.double(), r.bias, r.length)
        for r in store.stored
    ]
    expected, _ = reference_decode.decode(query.double(), wide, scale=store.scale)
    torch.testing.assert_close(store.attend(query).double(), expected, rtol=0, atol=1e-5)
