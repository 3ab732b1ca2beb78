"""The best set of targets, by search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation

from ._constraints import Constraints
from ._goals import Goal
from ._model import as_model, check_context
from ._rank import check_sizes, listed, ranked
from ._result import Ranking, Why
from ._scoring import Risk, Scoring, check_risk, doses_of, in_blocks, together

_SMOOTHING = 0.7
"""Share of the probabilities that the elite sets."""
_PATIENCE = 3  # rounds without a better set
_RISK_DRAWS = 64
_AT_A_TIME = 200  # sets
_NEVER = -1e300


@dataclass(frozen=True)
class Plan:
    """The best set that was found, and how.

    Attributes
    ----------
    ranking
        The best of all sets that were looked at, drawn together.
    history
        Best value so far, per restart and round, with the number of sets looked at by then.
    n_evaluated
        How many sets the model predicted.
    """

    ranking: Ranking
    history: pd.DataFrame
    n_evaluated: int

    @property
    def best(self) -> str:
        """The best set."""
        return self.ranking.best

    def table(self, n: int | None = None) -> pd.DataFrame:
        """See :meth:`Ranking.table`."""
        return self.ranking.table(n)

    def why(self, perturbation: str | None = None) -> Why:
        """See :meth:`Ranking.why`."""
        return self.ranking.why(perturbation)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Ranking.plot`."""
        return self.ranking.plot(*args, **kwargs)

    def to_anndata(self, n: int = 50) -> Any:
        """See :meth:`Ranking.to_anndata`."""
        return self.ranking.to_anndata(n)

    def __repr__(self) -> str:
        return f"Plan: {self.best}, after {self.n_evaluated:,} sets\n{self.ranking!r}"


def plan(
    model: Any,
    goal: Goal,
    max_targets: int = 3,
    *,
    targets: Sequence[str] | None = None,
    context: str | None = None,
    constraints: Constraints | None = None,
    risk: Risk = "mean",
    threshold: float | None = None,
    n_samples: int = 100,
    n_elite: int = 10,
    n_rounds: int = 20,
    n_restarts: int = 3,
    n_joint: int = 100,
    n_draws: int = 200,
    seed: int = 0,
) -> Plan:
    """Search for the set of targets, and doses, that meets a goal best.

    The cross-entropy method (Rubinstein and Kroese 2004) over sets: sets are drawn without
    replacement from probabilities of targets and sizes, which then move towards the best of them.
    All targets alone are looked at first; in the last round of a restart, each target of the best set
    is exchanged for each of the most probable others. Every set is predicted by the full model.

    Parameters
    ----------
    model, goal, context, constraints, risk, threshold, n_joint, n_draws, seed
        As in :func:`rank`.
    max_targets
        Targets in a set.
    targets
        What sets are made of; by default all targets measured in the context, at their doses. A dose
        is given as in ``"A@10"``.
    n_samples, n_elite
        Sets drawn in a round, and those that the probabilities move towards.
    n_rounds, n_restarts
        Rounds of a restart, which ends early when three bring nothing better; and restarts.

    Returns
    -------
    Plan
    """
    check_risk(risk)
    check_sizes(
        max_targets=max_targets,
        n_samples=n_samples,
        n_elite=n_elite,
        n_rounds=n_rounds,
        n_restarts=n_restarts,
        n_joint=n_joint,
        n_draws=n_draws,
    )
    if n_elite > n_samples:
        raise ValueError(f"n_elite={n_elite} is more than n_samples={n_samples}.")
    model = as_model(model)
    context = check_context(model, context)
    limits = constraints or Constraints()
    scoring = Scoring(model, goal, context, limits, threshold)
    if targets is None:
        given = doses_of(model, context)
    else:
        given = list(model.parse(listed(targets, "targets")))
    if any(len(s.targets) != 1 for s in given):
        raise ValueError("targets are single targets; a combination is what plan() looks for.")
    limits.check_targets({t for s in given for t in s.targets})
    singles = [s for s in given if limits.permits(s)]
    if not singles:
        raise ValueError(
            f"No candidates are left: the constraints permit none of {len(given)} targets."
        )
    most = min(max_targets, limits.max_targets or max_targets, len({s.targets for s in singles}))
    search = _Search(scoring, singles, most, risk, seed)
    rows = []
    for restart in range(n_restarts):
        rng = np.random.default_rng([seed, restart])
        for row in search.restart(rng, n_samples, n_elite, n_rounds):
            rows.append((restart, *row))
    found = search.best(n_joint)
    ranking = ranked(scoring, found, {}, search.n_predicted, risk, n_joint, n_draws, seed)
    history = pd.DataFrame(rows, columns=["restart", "round", "best", "n_evaluated"])
    return Plan(ranking, history, search.n_predicted)


class _Search:
    """Sets of single targets, their values, and restarts of the search among them."""

    def __init__(
        self, scoring: Scoring, singles: list[Perturbation], most: int, risk: Risk, seed: int
    ) -> None:
        self.scoring, self.singles, self.most = scoring, singles, most
        self.risk, self.seed = risk, seed
        self.value: dict[Perturbation, float] = {}
        self.n_predicted = 0
        names = {t: k for k, t in enumerate(sorted({p.targets for p in singles}))}
        self.target = np.array([names[p.targets] for p in singles])

    def evaluate(self, sets: Sequence[Perturbation]) -> np.ndarray:
        """Value of each set; each is predicted once."""
        new = [p for p in dict.fromkeys(sets) if p not in self.value]
        permitted = [p for p in new if self.scoring.constraints.permits(p)]
        self.value |= dict.fromkeys(new, _NEVER)
        for block in in_blocks(len(permitted), _AT_A_TIME):
            allowed = permitted[block]
            self.n_predicted += len(allowed)
            table = self.scoring.table(allowed)
            value = table["expected" if self.risk == "expected" else "score"].to_numpy(float)
            function = self.scoring.objective.linear is None
            if self.risk in ("quantile", "success") or (self.risk == "expected" and function):
                drawn = self.scoring.drawn(allowed, _RISK_DRAWS, self.seed)
                # Where none of the draws succeeds, the score says where to go.
                value = self.scoring.value(drawn, self.risk) + 1e-6 * np.tanh(value)
            if "feasible" in table:
                value = np.where(table["feasible"], value, -1e6 - table["side_effect"])
            self.value |= dict(zip(allowed, map(float, value), strict=True))
        return np.array([self.value[p] for p in sets])

    def best(self, n: int) -> list[Perturbation]:
        """The n best sets of all that were looked at."""
        return sorted(
            (p for p, v in self.value.items() if v > _NEVER), key=lambda p: (-self.value[p], p)
        )[:n]

    def restart(
        self, rng: np.random.Generator, n_samples: int, n_elite: int, n_rounds: int
    ) -> list[tuple[int, float, int]]:
        """Rounds from even probabilities; per round the best value so far, and sets looked at."""
        n = len(self.singles)
        alone = self.evaluate(self.singles)
        of_single, of_size = np.full(n, 1 / n), np.full(self.most, 1 / self.most)
        best = int(np.argmax(alone))
        top, top_value, idle, rows = [best], float(alone[best]), 0, []
        for turn in range(n_rounds):
            drawn = [self._draw(rng, of_single, of_size) for _ in range(n_samples)]
            value = self.evaluate([together(self.singles[i] for i in s) for s in drawn])
            elite = np.argsort(-value, kind="stable")[:n_elite]
            counts = np.bincount(np.concatenate([drawn[i] for i in elite]), minlength=n)
            sizes = np.bincount([len(drawn[i]) - 1 for i in elite], minlength=self.most)
            of_single += _SMOOTHING * (counts / counts.sum() - of_single)
            of_size += _SMOOTHING * (sizes / sizes.sum() - of_size)
            idle += 1
            if value[elite[0]] > top_value:
                top, top_value, idle = drawn[elite[0]], float(value[elite[0]]), 0
            rows.append((turn, top_value, self.n_predicted))
            if idle >= _PATIENCE:
                break
        top, top_value = self._exchanged(top, top_value, of_single, n_samples)
        rows.append((len(rows), top_value, self.n_predicted))
        return rows

    def _draw(
        self, rng: np.random.Generator, of_single: np.ndarray, of_size: np.ndarray
    ) -> list[int]:
        """A set without a target twice: the largest of Gumbel variables (Kool et al. 2019)."""
        size = 1 + int(rng.choice(len(of_size), p=of_size / of_size.sum()))
        keys = np.log(of_single + 1e-6) + rng.gumbel(size=len(of_single))
        by_target: dict[int, int] = {}
        for i in np.argsort(-keys):
            by_target.setdefault(int(self.target[i]), int(i))
            if len(by_target) == size:
                break
        return list(by_target.values())

    def _exchanged(
        self, top: list[int], value: float, of_single: np.ndarray, n: int
    ) -> tuple[list[int], float]:
        """One target less, another in its place, or one more, for as long as that is better."""
        while True:
            likely = np.argsort(-of_single, kind="stable")[: max(n // len(top), 1)]
            used = {self.target[i] for i in top}
            near = [top[:k] + top[k + 1 :] for k in range(len(top)) if len(top) > 1]
            for i in map(int, likely):
                for k in range(len(top)):
                    if self.target[i] not in used - {self.target[top[k]]} and i != top[k]:
                        near.append([*top[:k], i, *top[k + 1 :]])
                if len(top) < self.most and self.target[i] not in used:
                    near.append([*top, i])
            if not near:
                return top, value
            values = self.evaluate([together(self.singles[i] for i in s) for s in near])
            best = int(np.argmax(values))
            if not values[best] > value:
                return top, value
            top, value = near[best], float(values[best])
