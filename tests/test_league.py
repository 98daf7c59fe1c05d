"""The league table: each method's best at equal cost, and who wins where."""

from __future__ import annotations

import numpy as np
import pytest

from attnplan.kernels import catalog
from attnplan.kernels.approximation import Approximation, AttentionShape
from attnplan.kernels.near.quest import Quest
from attnplan.kernels.near.window import Window
from attnplan.league import Entry, lines, table
from attnplan.scoring import ScoreTable
from attnplan.search.latency import LatencyModel
from attnplan.timing import spell

SHAPE = AttentionShape(1, 4, 2, 2048, 2048, 16)
CHOICES = (
    catalog.DENSE,
    Approximation(Window(64)),
    Approximation(Window(256)),
    Approximation(Quest(2)),
)
DENSITY = [a.density(SHAPE) for a in CHOICES]


def entries(density: float) -> dict[str, Entry]:
    """Two layers: windows lose least on the first, Quest on the second."""
    losses = np.zeros((2, 4, 4))
    losses[0, :, 1:] = [0.020, 0.010, 0.015]
    losses[1, :, 1:] = [0.020, 0.010, 0.005]
    losses[:, :, 1:] *= np.arange(1, 5)[:, None]  # the later the head, the more it loses
    scores = ScoreTable(CHOICES, losses, losses, losses * 10)
    ms = {spell((a,) * 4): cost for a, cost in zip(CHOICES, (8.0, 1.0, 2.0, 4.0), strict=True)}
    latency = LatencyModel(8.0, 0.0, np.array([2.0, 0.25, 0.5, 1.0]), np.zeros(4), 1.0)
    statistics = {
        "sink_local_mass": -losses[:, :, 1],
        "top_block_mass_4": np.ones((2, 4)),
    }
    return {e.name: e for e in table(scores, latency, ms, SHAPE, density, statistics)}


def test_methods_are_compared_at_their_best_setting_within_the_density() -> None:
    found = entries(0.3)
    window, quest = found["window"], found["quest"]
    assert list(found) == ["window", "quest"]  # least loss first, as each head's own choice
    assert window.setting == catalog.key(CHOICES[2]) and window.density == DENSITY[2]
    assert window.kl == pytest.approx(2 * 0.010 * 10) and window.error == pytest.approx(0.25)
    assert window.speedup == 4.0 and quest.speedup == 2.0
    assert (window.wins, quest.wins) == (4, 4)
    assert window.correlation == pytest.approx(-1) and quest.correlation is None


def test_own_choice_spends_the_density_on_the_heads_that_need_it() -> None:
    window = entries(0.5)["window"]
    assert window.kl is not None and window.kl_per_head is not None
    assert window.kl_per_head < window.kl  # some heads stay dense
    room = (0.5 - DENSITY[2]) / (1 - DENSITY[2])  # heads that can, as a share
    assert window.kl_per_head >= window.kl * (1 - 8 / 5 * (int(room * 8) + 1) / 8)


def test_a_method_that_is_too_dear_says_so() -> None:
    quest = entries((DENSITY[1] + min(DENSITY[2:])) / 2)["quest"]
    assert (quest.setting, quest.kl, quest.wins) == (None, None, 0)
    assert lines([quest])[0][1] == "none so cheap"
