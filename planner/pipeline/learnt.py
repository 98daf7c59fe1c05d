"""What measurements taught about the predictions of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attnplan.pipeline.request import Choice
from attnplan.pipeline.verify import copies, fast
from attnplan.search.budget import Budget
from attnplan.search.problem import Assignment, Problem

COPYING = 0.2
"""Weight of the repeated random string among the scores; raised when the induction gate fails."""
HELD_OUT = 1.15
"""How much more a plan is expected to lose on held-out than on calibration text."""
MARGIN = 0.8
"""Attention under a plan must be predicted below this share of dense: no plan may be slower."""
MEASURED_MARGIN = 0.85
"""The same, once the prediction is corrected by a plan that was verified."""


@dataclass(frozen=True)
class Corrections:
    """What measurements taught about the predictions.

    Attributes:
        copying: weight of the repeated random string among the scores.
        kl: by what a limit on KL is divided, so that held-out text keeps it: a plan that is
            chosen by its KL on calibration text loses more on other text.
        ms: measured over predicted time of mixed layers.
        margin: what attention may take of dense, as predicted; wider once a plan was measured.
    """

    copying: float = COPYING
    kl: float = HELD_OUT
    ms: float = 1.0
    margin: float = MARGIN

    def tightened(self, budget: Budget) -> Budget:
        """The budget with limits on KL that leave room for held-out text."""
        if budget.max_kl is not None:
            budget = replace(budget, max_kl=budget.max_kl / self.kl)
        if budget.max_ppl_ratio is not None:
            budget = replace(budget, max_ppl_ratio=budget.max_ppl_ratio ** (1 / self.kl))
        return budget

    def copying_more(self) -> Corrections:
        """Corrections under which the repeated string counts for more."""
        return replace(self, copying=self.copying * 5)

    def late(
        self, plan_ms: float, dense_ms: float, assignment: Assignment, problem: Problem
    ) -> Corrections:
        """Corrections under which a measured prefill would have been predicted."""
        here = plan_ms * problem.predict(problem.dense).latency_ms / dense_ms
        ms = self.ms * problem.latency.factor(assignment, here)
        return replace(self, ms=ms, margin=MEASURED_MARGIN)

    def learn(
        self, choice: Choice, assignment: Assignment, problem: Problem, budget: Budget
    ) -> Corrections:
        """Corrections under which the broken limits would have been seen coming."""
        measured = choice.measured
        learnt = self
        if not copies(measured.induction, measured.induction_dense):
            learnt = learnt.copying_more()
        excess = 1.0
        if budget.max_kl is not None:
            excess = max(excess, measured.quality.kl_per_token / budget.max_kl)
        if budget.max_ppl_ratio is not None:
            loss = math.log(max(measured.quality.perplexity_ratio, 1.0))
            excess = max(excess, loss / math.log(budget.max_ppl_ratio))
        if excess > 1:
            learnt = replace(learnt, kl=learnt.kl * excess * 1.1)
        if not fast(measured.latency_ms, measured.dense_ms, budget):
            learnt = learnt.late(measured.latency_ms, measured.dense_ms, assignment, problem)
        return learnt
