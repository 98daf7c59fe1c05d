"""The whole job by library calls on a tiny model, and what is learnt from measurements."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny_model

from attnplan.costs.prefill import measure_device, parse, spell
from attnplan.kernels import cache_catalog, catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.window import Window
from attnplan.models.load import LoadedModel, load_model
from attnplan.pipeline.learnt import Corrections
from attnplan.pipeline.request import Choice, Outcome, Request
from attnplan.pipeline.score_methods import promising, score, scout
from attnplan.pipeline.search_prefill import best_of, gated, never_slower, plan
from attnplan.pipeline.to_plan import figures, to_plan
from attnplan.pipeline.verify import Measured, crossover, density, fast, misses, running, unjudged
from attnplan.plan.plan import Plan
from attnplan.profiles.store.database import Store
from attnplan.profiles.text.calibration import TokenSet, load_sequences
from attnplan.profiling.profiling import (
    Workload,
    capture_files,
    fitted_tensors,
    profile,
    repeated_string,
    run_key,
)
from attnplan.quality.prefill import Quality, Reference
from attnplan.report.explain import timing_rows
from attnplan.report.search_tables import HEADERS, comparison, lines
from attnplan.search.budget import Budget, BudgetError, Limit
from attnplan.search.candidates import candidates, parse_methods
from attnplan.search.corrections import Corrections as SearchCorrections
from attnplan.search.evaluation import BROKEN_KL, Evaluated
from attnplan.search.latency import LatencyModel
from attnplan.search.problem import Assignment, Problem
from attnplan.search.solve import limits_of

CONTEXT = 256
DENSE, NARROW = catalog.DENSE, Approximation(Window(32))


@dataclass(frozen=True)
class Job:
    """A model, its texts, and where everything is kept."""

    loaded: LoadedModel
    work: Workload
    holdout: TokenSet
    folder: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/store.db"

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(1, 4, 2, CONTEXT, CONTEXT, 16)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny kernels on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("planning")
    tiny_model.save(folder / "tiny")
    loaded = load_model(str(folder / "tiny"))
    sets = [
        load_sequences(loaded.tokenizer, "builtin", context=CONTEXT, sequences=2, split=split)
        for split in ("calibration", "holdout")
    ]
    return Job(loaded, Workload(sets[0], seed=0), sets[1], folder)


@pytest.fixture(scope="module")
def outcome(job: Job) -> Outcome | str:
    """A search, or why nothing can be faster than dense here: both are right answers."""
    files = capture_files(run_key(job.loaded, job.work), job.folder / "captures")
    request = Request(Budget(max_density=0.6), trials=2, swaps=1, repeats=1)
    with Store(job.url) as store:
        try:
            return plan(job.loaded, job.work, job.holdout, store, job.url, files, request)
        except BudgetError as error:
            return str(error)


def measured(
    *,
    density: float = 0.4,
    kl: float = 0.01,
    ratio: float = 1.01,
    induction: float = 0.69,
    speedup: float = 1.5,
    slow: bool = False,
) -> Measured:
    """What a good plan measures, or another."""
    quality = Quality(kl, 0.001, 20.0 * ratio, 20.0, 510, (kl, kl))
    speedups = {128: 0.9, CONTEXT: speedup}
    return Measured(
        density, quality, induction, 0.7, 100 / speedup, 100.0, None if slow else CONTEXT, speedups
    )


def choice(found: Measured, name: str = "per head") -> Choice:
    layers = [[NARROW] * 4, [NARROW, DENSE, NARROW, NARROW]]
    return Choice(name, layers, 0.008, 70.0, found)


def problem() -> Problem:
    """Two layers of four heads; the window is four times as fast as dense and loses 0.001."""
    fisher = np.zeros((2, 4, 2))
    fisher[:, :, 1] = 0.001
    return Problem(
        names=("dense", "window"),
        families=("dense", "sparse"),
        windows=(CONTEXT, 32),
        fisher=fisher,
        density=np.array([1.0, 0.25]),
        kv_bytes=np.ones(2),
        group=2,
        latency=LatencyModel(40.0, 0.0, np.array([10.0, 2.5]), np.zeros(2), 20.0),
    )


ALL_NARROW = np.ones((2, 4), np.int64)


# What a search finds


def test_a_search_ends_with_a_valid_plan_or_a_reason(job: Job, outcome: Outcome | str) -> None:
    if isinstance(outcome, str):
        assert outcome.startswith("no plan within the budget is predicted to be faster than dense")
        return
    assert outcome.attempts
    for attempt in outcome.attempts[:-1]:
        assert attempt.misses
    if outcome.plan is None:
        assert outcome.attempts[-1].misses
        return
    found = outcome.plan.measured
    assert found.density <= 0.6 and found.speedup > 1 and found.crossover is not None
    assert outcome.plan.predicted_kl >= 0
    written = to_plan(job.loaded, outcome, job.work, job.holdout, Budget(max_density=0.6))
    written.save(job.folder / "found.yaml")
    assert Plan.load(job.folder / "found.yaml") == written


def test_the_store_reads_a_search_back(job: Job, outcome: Outcome | str) -> None:
    with Store(job.url) as store:
        runs = store.runs()
        assert [run.complete for run in runs] == [True]
        assert len(store.head_profiles(runs[0].id, arrays=False)) == 8
        files = capture_files(run_key(job.loaded, job.work), job.folder / "nowhere")
        # everything is there: nothing is captured, as there is nowhere to keep it
        offered = scout(job.loaded, job.work, store, files, runs[0], candidates(job.shape))
        costs = measure_device(job.loaded, job.work, store, runs[0], offered)
        ms = costs.fit.model.head_ms
        table = score(job.loaded, job.work, store, files, runs[0], offered, head_ms=ms)
    assert not (job.folder / "nowhere").exists()
    names = [catalog.key(a) for a in offered]
    assert table.texts.shape == table.copying.shape == (2, 4, len(names))
    assert (table.texts >= 0).all() and np.isfinite(table.texts).all()
    assert not table.texts[:, :, 0].any() and table.candidates[0].is_dense
    assert costs.fit.model.dense_layer_ms > 0 and costs.dense_prefill_ms > 0
    if isinstance(outcome, Outcome):
        assert outcome.costs.dense_prefill_ms == costs.dense_prefill_ms


def test_hopeless_candidates_are_scored_on_the_first_text_alone(
    job: Job, outcome: Outcome | str, tmp_path: Path
) -> None:
    files = capture_files(run_key(job.loaded, job.work), tmp_path)
    offered = candidates(job.shape)
    density = np.array([a.density(job.shape) for a in offered])
    shutil.copy(job.folder / "store.db", tmp_path / "store.db")
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("delete from candidate_scores where sequence > 0")
        connection.execute("delete from score_shards where sequence > 0")
    with Store(f"sqlite:///{tmp_path}/store.db") as store:
        run = store.runs()[0]
        pruned = score(job.loaded, job.work, store, files, run, offered, head_ms=density)
        before = store.load_scores(run.id)
        texts = [int((before.sequence == text).sum()) for text in range(3)]
        assert texts[0] == 8 * len(offered) and 8 < max(texts[1:]) < texts[0]
        whole = score(job.loaded, job.work, store, files, run, offered)
        after = store.load_scores(run.id)
    assert len(after.fisher) == 3 * texts[0]
    assert np.isfinite(pruned.texts).all() and np.isfinite(pruned.copying).all()
    # what was scored on all texts is the same, and nothing else can be the best of a head
    names = [catalog.key(a) for a in offered]
    second = {
        (layer, head, names.index(before.names[c]))
        for text, layer, head, c in zip(
            before.sequence, before.layer, before.head, before.approximation, strict=True
        )
        if text == 1
    }
    for layer, head, c in second:
        assert pruned.texts[layer, head, c] == pytest.approx(whole.texts[layer, head, c], rel=1e-5)
        assert pruned.copying[layer, head, c] <= whole.copying[layer, head, c] * (1 + 1e-5)


def test_a_search_may_be_held_to_some_methods() -> None:
    shape = AttentionShape(1, 4, 2, 2048, 2048, 16)
    some = candidates(shape, parse_methods("window, quest,centroid_t"))
    pairs = {"window+centroid_t", "quest+centroid_t"}
    assert {a.name for a in some} == {"dense", "window", "quest", *pairs}
    assert some[0].is_dense and set(some) < set(candidates(shape))
    with pytest.raises(ValueError, match="unknown method 'windw'; known: dense, "):
        parse_methods("windw")
    asked = Request(Budget(max_density=0.5))
    assert asked.canonical == asked.budget.canonical()
    assert replace(asked, methods=frozenset({"b", "a"})).canonical["methods"] == ["a", "b"]


def test_a_plan_that_loses_to_its_own_baseline_is_not_the_answer() -> None:
    own, layered = choice(measured(kl=0.12)), choice(measured(kl=0.01), "per layer")
    uniform = choice(measured(kl=0.001, slow=True), "uniform")  # never faster than dense
    budget = Budget(max_density=0.5)
    assert best_of(own, [uniform, layered], budget) is layered
    assert best_of(own, [uniform, replace(layered, misses=("slow",))], budget) is own
    assert best_of(None, [layered], budget) is layered and best_of(None, [], budget) is None
    better = choice(measured(kl=0.005))
    assert best_of(better, [uniform, layered], budget) is better
    fast = choice(measured(kl=0.01, speedup=2.0), "per layer")
    least = Budget(max_kl=0.1, minimize="latency")
    assert best_of(better, [fast], least) is fast and best_of(better, [layered], least) is better


def test_a_candidate_is_hopeless_beside_a_cheaper_and_better_one() -> None:
    density, ms = np.array([1.0, 0.2, 0.3, 0.2]), np.array([1.0, 0.2, 0.5, 0.4])
    assert promising(np.array([0.0, 1, 3, 0.5]), density, ms).tolist() == [1, 1, 0, 1]
    assert promising(np.array([0.0, 1, 1.4, 3]), density, ms).tolist() == [1, 1, 1, 0]
    assert promising(np.array([0.0, 5, 0.1, 0.1]), density, ms).tolist() == [1, 1, 1, 1]
    assert promising(np.array([0.0, np.inf, 1, 1]), density, ms).tolist() == [1, 1, 1, 1]
    # slower by no more than noise
    assert promising(np.array([0.0, 1, 9, 0.1]), density, ms).tolist() == [1, 1, 0, 1]


def test_a_scout_drops_what_no_head_would_miss(
    job: Job, outcome: Outcome | str, tmp_path: Path
) -> None:
    files = capture_files(run_key(job.loaded, job.work), tmp_path)
    offered = candidates(job.shape)
    names = [catalog.key(a) for a in offered]
    with Store(job.url) as store:
        run = store.runs()[0]
        some = scout(job.loaded, job.work, store, files, run, offered)
        stored = store.load_scores(run.id)
    fisher = np.full((2, 4, len(offered)), np.nan)
    for text, layer, head, c, value in zip(
        *(stored.sequence, stored.layer, stored.head, stored.approximation, stored.fisher),
        strict=True,
    ):
        if text == 0 and stored.names[c] in names:
            fisher[layer, head, names.index(stored.names[c])] = value
    assert not np.isnan(fisher).any()  # a model with so few heads is scouted whole
    assert some[0].is_dense and len(some) < 0.8 * len(offered)
    density = np.array([a.density(job.shape) for a in offered])
    left = [offered.index(a) for a in some]
    for price in np.geomspace(1e-5, 1e2, 40) * fisher.max():
        priced = (fisher + price * density).reshape(8, -1)
        assert priced[:, left].min(-1).sum() <= 1.02 * priced.min(-1).sum()
    assert any(a.static for a in some[1:])


def test_stored_scores_predict_the_measured_kl(
    job: Job, outcome: Outcome | str, tmp_path: Path
) -> None:
    """To second order: on a random model within a factor of three for one layer's windows."""
    with Store(job.url) as store:
        run = store.runs()[0]
        files = capture_files(run_key(job.loaded, job.work), tmp_path)
        some = (DENSE, Approximation(Window(64)))
        table = score(job.loaded, job.work, store, files, run, some)
        fitted = fitted_tensors(store, run.id)
    column = table.candidates.index(Approximation(Window(64)))
    layers = [[table.candidates[column]] * 4, [DENSE] * 4]
    reference = Reference(job.loaded.model, job.work.tokens.tokens)
    quality = reference.quality(lambda: running(job.loaded.model, layers, fitted))
    predicted = float(table.texts[0, :, column].sum())
    assert quality.kl_per_token / 3 < predicted < quality.kl_per_token * 3


def test_a_profile_older_than_a_method_is_fitted_again_without_the_model(
    job: Job, outcome: Outcome | str
) -> None:
    """What a new method fits comes from the stored statistics."""
    with Store(job.url) as store:
        run = store.runs()[0]
        before = store.load_fitted(run.id)
    with sqlite3.connect(job.folder / "store.db") as connection:
        connection.execute("delete from fitted where name like 'balanced.%'")
    nowhere = capture_files(run_key(job.loaded, job.work), job.folder / "nowhere")
    with Store(job.url) as store:
        assert not any(n.startswith("balanced.") for n in store.load_fitted(run.id)[0])
        assert profile(job.loaded, job.work, store, nowhere) == run
        after = store.load_fitted(run.id)
    wanted = catalog.fitted_names(16) | cache_catalog.fitted_names(16)
    assert all(set(after[layer]) == wanted for layer in range(2))
    for layer, data in before.items():
        for name, array in data.items():
            np.testing.assert_array_equal(after[layer][name], array)


def test_an_interrupted_profile_goes_on_with_the_next_text(job: Job, tmp_path: Path) -> None:
    files = capture_files(run_key(job.loaded, job.work), tmp_path)

    class Interrupted(Exception):
        pass

    def interrupt(what: str) -> None:
        if what.startswith("text 2"):
            raise Interrupted

    with Store(f"sqlite:///{tmp_path}/store.db") as store, Store(job.url) as whole:
        with pytest.raises(Interrupted):
            profile(job.loaded, job.work, store, files, interrupt)
        (run,) = store.runs()
        assert not run.complete and store.shards_done(run.id) == {0}
        assert [files.has(text) for text in range(3)] == [True, False, False]
        steps: list[str] = []
        assert profile(job.loaded, job.work, store, files, steps.append).complete
        assert steps == ["text 2 of 2", "fitting"]
        again = profile(job.loaded, job.work, whole, files)
        for mine, theirs in zip(
            store.head_profiles(run.id), whole.head_profiles(again.id), strict=True
        ):
            assert mine.scalars == pytest.approx(theirs.scalars, rel=1e-4)


def test_a_repeated_string_is_said_twice() -> None:
    text = repeated_string(101, 256, seed=1)
    assert len(text) == 101 and torch.equal(text[:50], text[51:])
    assert int(text.min()) >= 64 and int(text.max()) < 256
    assert torch.equal(text, repeated_string(101, 256, seed=1))
    assert not torch.equal(text, repeated_string(101, 256, seed=2))


def test_timings_are_named_by_what_the_heads_run() -> None:
    names = [catalog.key(DENSE), catalog.key(NARROW)]
    assert spell([NARROW, DENSE, NARROW]) == spell([NARROW, NARROW, DENSE])
    assert parse(spell([NARROW, DENSE, NARROW]), names) == [1, 2]
    assert parse(spell([Approximation(Window(99))]), names) is None


def test_timings_of_other_engines_and_sizes_are_not_shown(job: Job, success: Outcome) -> None:
    costs = success.costs
    with Store(job.url) as store:
        headers, before = timing_rows(store, job.loaded, costs, job.shape)
        timing = store.load_timings(costs.device)[0]
        others = [replace(timing, engine="an old one"), replace(timing, heads=8, kv_heads=4)]
        store.save_timings(costs.device, others)
        _, after = timing_rows(store, job.loaded, costs, job.shape)
    names = [row[0] for row in after]
    assert after == before and len(set(names)) == len(names) == len(candidates(job.shape))
    assert all(len(row) == len(headers) for row in after)


# Gates


@pytest.mark.parametrize(
    ("budget", "found", "message"),
    [
        (Budget(max_density=0.4), measured(), None),
        (Budget(max_density=0.3), measured(), "density 0.400 is above 0.3"),
        (Budget(max_kl=0.005), measured(), "KL 0.0100 is above 0.005"),
        (Budget(max_density=0.4), measured(kl=BROKEN_KL), "outputs are not finite"),
        (Budget(max_ppl_ratio=1.005), measured(), "perplexity ratio 1.0100 is above 1.005"),
        (Budget(max_latency=Limit(0.6, "x")), measured(), "prefill of 67 ms is above 60 ms"),
        (Budget(max_latency=Limit(0.7, "x")), measured(), None),
        (Budget(max_density=1.0), measured(speedup=0.9, slow=True), "not faster than dense"),
        (Budget(max_density=1.0), measured(induction=0.671), None),
        (Budget(max_density=1.0), measured(induction=0.66), "induction copies 0.660"),
    ],
)
def test_a_plan_is_held_against_what_was_measured(
    budget: Budget, found: Measured, message: str | None
) -> None:
    missed = misses(found, budget)
    assert len(missed) == (message is not None)
    assert message is None or message in missed[0]


def test_an_original_that_copies_nothing_cannot_be_judged_by_what_is_copied() -> None:
    assert unjudged(0.031) is None
    said = unjudged(0.03)
    assert said is not None and "the original model copies 0.030" in said


def test_a_prefill_is_fast_where_it_beats_dense_and_the_budget() -> None:
    anything, half = Budget(max_density=0.5), Budget(max_latency=Limit(0.5, "x"))
    assert fast(90, 100, anything) and not fast(98, 100, anything) and not fast(110, 100, anything)
    assert fast(50, 100, half) and not fast(60, 100, half)


def test_a_model_that_overflows_is_broken_not_undefined(job: Job) -> None:
    model, tokens = job.loaded.model, job.work.tokens.tokens

    @contextmanager
    def overflowing() -> Iterator[None]:
        weight = model.model.norm.weight
        before = weight.detach().clone()
        try:
            weight.data.fill_(math.inf)
            yield
        finally:
            weight.data.copy_(before)

    quality = Reference(model, tokens).quality(overflowing)
    assert quality.kl_by_sequence == (BROKEN_KL, BROKEN_KL)
    assert math.isfinite(quality.perplexity) and quality.perplexity > 1e9
    assert quality.perplexity_dense < 1e9


def test_crossover_is_where_the_plan_stays_faster() -> None:
    assert crossover({256: 0.9, 512: 1.1, 1024: 1.3}) == 512
    assert crossover({256: 1.5, 512: 1.01, 1024: 1.3}) == 1024  # too close to dense in between
    assert crossover({1024: 0.99, 512: 2.0}) is None
    assert crossover({1024: 1.2}) == 1024


def test_what_was_measured_survives_the_store() -> None:
    for found in (measured(), measured(slow=True), measured(kl=0.0)):
        assert Measured.from_dict(found.as_dict()) == found
    single = replace(measured().quality, kl_spread=None, kl_by_sequence=(0.01,))
    found = replace(measured(), quality=single)
    assert Measured.from_dict(found.as_dict()) == found


def test_density_is_the_mean_over_heads(job: Job) -> None:
    narrow = NARROW.density(job.shape)
    assert density([[DENSE] * 4, [DENSE] * 4], job.shape) == pytest.approx(1)
    mixed = density([[DENSE] * 4, [NARROW, NARROW, DENSE, DENSE]], job.shape)
    assert mixed == pytest.approx(0.75 + narrow / 4)


def test_the_best_plan_that_copies_is_taken() -> None:
    limits = limits_of(problem(), Budget(max_density=0.9))
    rows = [np.zeros((2, 4), np.int64) for _ in range(6)]
    for number, row in enumerate(rows[1:]):
        row.flat[: number + 3] = 1
    plans = [
        (Evaluated(row, problem().predict(row), (kl,)), SearchCorrections(power=kl))
        for row, kl in zip(rows, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True)
    ]
    asked: list[int] = []

    def copies(among: set[int]) -> Callable[[Assignment], bool]:
        asked.clear()

        def answer(assignment: Assignment) -> bool:
            asked.append(int(assignment.sum()))
            return int(assignment.sum()) in among

        return answer

    # the first, all dense, is over the limit: it is not even asked
    assert gated(plans, limits, copies({0, 4, 5})) == plans[2] and asked == [3, 4]
    assert gated(plans, limits, copies({7})) == plans[0] and asked == [3, 4, 5]


# What is learnt from a plan that missed


def test_nothing_is_learnt_from_a_plan_that_holds() -> None:
    learnt = Corrections().learn(choice(measured()), ALL_NARROW, problem(), Budget(max_density=0.5))
    assert learnt == Corrections()


def test_a_plan_that_does_not_copy_makes_copying_dearer() -> None:
    found = choice(measured(induction=0.3))
    learnt = Corrections().learn(found, ALL_NARROW, problem(), Budget(max_density=0.5))
    assert learnt.copying > Corrections().copying
    assert replace(learnt, copying=Corrections().copying) == Corrections()


def test_a_plan_that_loses_too_much_makes_every_loss_dearer() -> None:
    budget = Budget(max_kl=0.004)
    learnt = Corrections().learn(choice(measured(kl=0.01)), ALL_NARROW, problem(), budget)
    assert learnt.kl > 2.5
    perplexity = Budget(max_ppl_ratio=1.01)
    learnt = Corrections().learn(choice(measured(ratio=1.03)), ALL_NARROW, problem(), perplexity)
    assert learnt.kl > math.log(1.03) / math.log(1.01)


def test_a_plan_that_is_late_is_predicted_as_late_as_it_was() -> None:
    budget = Budget(max_latency=Limit(0.5, "x"))
    late = choice(measured(speedup=1.25))  # 80 of 100 ms; the model says 40 of 100
    learnt = Corrections().learn(late, ALL_NARROW, problem(), budget)
    corrected = replace(problem(), latency=problem().latency.calibrated(learnt.ms))
    assert 80 <= corrected.predict(ALL_NARROW).latency_ms < 83
    assert corrected.predict(problem().dense).latency_ms == 100
    never = choice(measured(speedup=0.9, slow=True))
    learnt = Corrections().learn(never, ALL_NARROW, problem(), Budget(max_density=0.5))
    corrected = replace(problem(), latency=problem().latency.calibrated(learnt.ms))
    assert corrected.predict(ALL_NARROW).latency_ms > 110


def test_no_budget_allows_a_plan_slower_than_dense() -> None:
    limit = never_slower(Budget(max_density=0.5), problem()).max_latency
    assert limit is not None and limit.of(100.0) < 100
    tight = never_slower(Budget(max_latency=Limit(30, "ms")), problem()).max_latency
    assert tight == Limit(30, "ms")
    loose = never_slower(Budget(max_latency=Limit(3, "x")), problem()).max_latency
    assert loose is not None and loose.of(100.0) < 100
    # the objective is the one that was asked for, not what a latency limit would imply
    assert never_slower(Budget(max_kl=0.1), problem()).objective == "latency"
    assert never_slower(Budget(max_density=0.5), problem()).objective == "kl"


# Reports


@pytest.fixture
def success(job: Job, outcome: Outcome | str) -> Outcome:
    """A search that found a plan and both baselines, whatever this machine measures."""
    with Store(job.url) as store:
        run = store.runs()[0]
        costs = measure_device(job.loaded, job.work, store, run, candidates(job.shape))
    found = choice(measured())
    others = (choice(measured(kl=0.03), "per layer"), choice(measured(kl=0.05), "uniform"))
    return Outcome(found, (found,), others, costs, 1, run.id, {}, 0.01)


def test_a_report_compares_with_dense_and_the_baselines(success: Outcome) -> None:
    rows = comparison(success)
    assert [row.name for row in rows] == ["dense", "best uniform", "best per layer", "per head"]
    assert [row.kl for row in rows] == [0, 0.05, 0.03, 0.01]
    assert rows[-1].speedup == pytest.approx(1.5)
    assert rows[-1].predicted_speedup == pytest.approx(100 / 70)
    assert all(len(line) == len(HEADERS) for line in lines(rows))


def test_a_report_of_a_failure_shows_the_last_attempt(success: Outcome) -> None:
    last = replace(choice(measured(kl=0.2)), misses=("KL 0.2000 is above 0.1",))
    rows = comparison(replace(success, plan=None, attempts=(success.attempts[0], last)))
    assert (rows[-1].kl, rows[-1].note) == (0.2, "KL 0.2000 is above 0.1")


def test_a_plan_tells_its_evidence(job: Job, success: Outcome) -> None:
    budget = Budget(max_density=0.5)
    written = to_plan(job.loaded, success, job.work, job.holdout, budget)
    written.save(job.folder / "made.yaml")
    read = Plan.load(job.folder / "made.yaml")
    assert read == written
    assert read.prefill[0].context == (CONTEXT, CONTEXT)
    assert read.model.difference(job.loaded.identity) is None
    assert (read.target.kind, read.target.dtype) == ("cpu", "float32")
    evidence = read.evidence
    assert evidence["budget"] == budget.canonical()
    assert evidence["measured"]["kl_per_token"] == 0.01
    assert evidence["measured"]["latency_ms"] == [66.67, 100.0]
    assert evidence["predicted"]["latency_ms"] == 70
    assert set(evidence["baselines"]) == {"uniform", "per layer"}
    assert evidence["calibration"]["digest"] != evidence["holdout"]["digest"]
    assert evidence["store"] == {"profile_run": success.run, "search": 1}
    assert success.plan is not None
    assert figures(success.plan)["latency_dense_ms"] == 100


def test_a_failure_makes_no_plan(job: Job, success: Outcome) -> None:
    slow = choice(measured(speedup=0.9, slow=True))
    for failed in (replace(success, plan=None), replace(success, plan=slow)):
        with pytest.raises(ValueError, match="found no plan within its budget"):
            to_plan(job.loaded, failed, job.work, job.holdout, Budget(max_density=0.5))


def test_limits_on_kl_leave_room_for_held_out_text() -> None:
    corrections = Corrections(kl=2.0)
    assert corrections.tightened(Budget(max_kl=0.02)).max_kl == pytest.approx(0.01)
    assert corrections.tightened(Budget(max_ppl_ratio=1.21)).max_ppl_ratio == pytest.approx(1.1)
    density = Budget(max_density=0.25)
    assert corrections.tightened(density) == density
