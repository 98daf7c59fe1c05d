"""The league table: each method's best at equal cost, and who wins where."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from attnplan.bench.league import COSTS, HEADERS, Entry, lines, table
from attnplan.costs.prefill import spell
from attnplan.kernels import catalog
from attnplan.kernels.contracts.approximation import Approximation
from attnplan.kernels.operands.shape import AttentionShape
from attnplan.kernels.selectors.quest import Quest
from attnplan.kernels.selectors.window import Window
from attnplan.pipeline.score_methods import ScoreTable
from attnplan.report import league_page
from attnplan.search.latency import LatencyModel

SHAPE = AttentionShape(1, 4, 2, 2048, 2048, 16)
CHOICES = (
    catalog.DENSE,
    Approximation(Window(64)),
    Approximation(Window(256)),
    Approximation(Quest(2)),
)
DENSITY = [a.density(SHAPE) for a in CHOICES]
LOSSES = np.zeros((2, 4, 4))
LOSSES[0, :, 1:] = [0.020, 0.010, 0.015]
LOSSES[1, :, 1:] = [0.020, 0.010, 0.005]
LOSSES[:, :, 1:] *= np.arange(1, 5)[:, None]  # the later the head, the more it loses


def entries(density: float) -> dict[str, Entry]:
    """Two layers: windows lose least on the first, Quest on the second."""
    scores = ScoreTable(CHOICES, LOSSES, LOSSES, LOSSES * 10)
    ms = {spell((a,) * 4): cost for a, cost in zip(CHOICES, (8.0, 1.0, 2.0, 4.0), strict=True)}
    latency = LatencyModel(8.0, 0.0, np.array([2.0, 0.25, 0.5, 1.0]), np.zeros(4), 1.0)
    statistics = {
        "sink_local_mass": -LOSSES[:, :, 1],
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


def test_own_choice_is_a_step_from_the_best_mix_of_the_methods_settings_and_dense() -> None:
    """Against all 3^8 ways to give eight heads dense or one of two windows."""
    window = entries(0.5)["window"]
    settings = (0, 1, 2)
    heads = LOSSES[:, :, settings].reshape(8, 3)
    best = min(
        sum(heads[h, c] for h, c in enumerate(choice))
        for choice in itertools.product(range(3), repeat=8)
        if np.mean([DENSITY[settings[c]] for c in choice]) <= 0.5
    )
    # prices leave a gap of at most one head's step to the exact optimum
    assert window.kl is not None and window.kl_per_head is not None
    assert best - 1e-12 <= window.kl_per_head <= best + heads[:, 2].max() < window.kl


def test_a_method_that_is_too_dear_says_so() -> None:
    quest = entries((DENSITY[1] + min(DENSITY[2:])) / 2)["quest"]
    assert (quest.setting, quest.kl, quest.wins) == (None, None, 0)
    assert lines([quest])[0][1] == "none so cheap"


def test_the_table_is_written_as_its_name_ends(tmp_path: Path) -> None:
    rows = list(entries(0.3).values())
    with pytest.raises(ValueError, match=r"must end in \.md or \.html"):
        league_page.write(tmp_path / "table.txt", rows, "All methods", "attnplan compare x")
    for name in ("table.md", "table.html"):
        league_page.write(tmp_path / name, rows, "All <methods>", "attnplan compare x")
    markdown = (tmp_path / "table.md").read_text()
    assert markdown.count("\n|") == 2 + len(rows) and "attnplan compare x" in markdown
    page = (tmp_path / "table.html").read_text()
    # density is no time, and both forms say so beside the measured one
    assert COSTS in markdown and COSTS in page and "vs dense" in HEADERS
    assert "All &lt;methods&gt;" in page and "All <methods>" not in page
    svg = ElementTree.fromstring(league_page.chart(rows))
    kinds = [child.tag.rpartition("}")[2] for child in svg]
    assert kinds.count("rect") == sum(e.kl_per_head is not None for e in rows)
    assert kinds.count("circle") == sum(e.kl is not None for e in rows) == 2
    widths = [float(c.attrib["width"]) for c in svg if c.tag.endswith("rect")]
    assert widths == sorted(widths)  # as the rows are: least loss first


def test_a_chart_of_nothing_is_empty() -> None:
    assert league_page.chart([]) == ""
