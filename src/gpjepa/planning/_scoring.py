"""Scores of candidates under a goal and its constraints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation, UnknownTargetError

from ._constraints import Constraints
from ._goals import Goal
from ._model import EffectModel

Risk = Literal["mean", "expected", "quantile", "success"]
RISKS: tuple[Risk, ...] = ("mean", "expected", "quantile", "success")
QUANTILE = 0.1
"""Of the score, by which ``risk="quantile"`` ranks: it is as low, or lower, one time in ten."""
_AT_A_TIME = 500
KNOWN = ("seen", "seen2", "in combinations", "new dose")
"""Regimes in which every target was measured where the effect is wanted."""


@dataclass(frozen=True)
class Drawn:
    """Scores of some candidates, drawn together.

    Attributes
    ----------
    score, side
        Score and side effect, shape (n_draws, n_candidates).
    """

    score: np.ndarray
    side: np.ndarray


class Scoring:
    """A goal, its constraints, and the model that says what candidates do.

    Parameters
    ----------
    model, goal, context, constraints
        As in :func:`gpjepa.planning.rank`.
    threshold
        Score that counts as success; the goal's own by default.
    """

    def __init__(
        self,
        model: EffectModel,
        goal: Goal,
        context: str,
        constraints: Constraints,
        threshold: float | None = None,
    ) -> None:
        if not isinstance(goal, Goal):
            raise TypeError(
                f"goal={goal!r} is not a goal: give Signature, TowardsEffect, TowardsCells, CellState or "
                "Score of gpjepa.planning."
            )
        constraints.check(model, context)
        self.model, self.context, self.constraints = model, context, constraints
        self.objective = goal.objective(model, context)
        self.threshold = self.objective.threshold if threshold is None else float(threshold)
        self.protected = constraints.protected(model, context)
        wanted = self.objective.linear
        if wanted is not None and {*self.objective.genes[wanted != 0]} <= {
            *constraints.leave_alone
        }:
            raise ValueError("The goal is about genes that leave_alone says should not change.")

    def table(self, perturbations: Sequence[Perturbation]) -> pd.DataFrame:
        """Score, expected score, side effect and regime of each, by the full model."""
        blocks = in_blocks(len(perturbations), _AT_A_TIME)
        return pd.concat([self._table(perturbations[b]) for b in blocks], ignore_index=True)

    def _table(self, perturbations: Sequence[Perturbation]) -> pd.DataFrame:
        found = self.model.predict(perturbations, self.context)
        mean, variance = np.asarray(found.mean, float), np.asarray(found.variance, float)
        side = self._side(
            lambda c: mean if c == self.context else self.model.predict(perturbations, c).mean
        )
        taken = self.constraints.weight * side
        table = pd.DataFrame(
            {
                "regime": list(found.regime),
                "score": self.objective(mean) - taken,
                "expected": self.objective.expected(mean, variance) - taken,
            }
        )
        if self.constraints.cost:
            table["cost"] = self.constraints.costs(perturbations)
        if self.constraints.protects:
            table["side_effect"] = side
            most = self.constraints.max_change
            table["feasible"] = True if most is None else side <= most
        return table

    def _side(self, effects: Callable[[str], np.ndarray]) -> np.ndarray:
        """Root mean square of effects by context over what should not change, shape (n,)."""
        squares = [np.square(effects(c)[:, genes]) for c, genes in self.protected.items()]
        if not squares:
            return np.zeros(1)
        return np.sqrt(np.concatenate(squares, 1).mean(1, dtype=float))

    def drawn(self, perturbations: Sequence[Perturbation], n: int, seed: int) -> Drawn:
        """Scores and side effects of some candidates, drawn together."""
        contexts = [self.context, *(c for c in self.protected if c != self.context)]
        pairs = [(p, c) for c in contexts for p in perturbations]
        joint, k = self.model.joint(pairs), len(perturbations)
        at = {c: slice(i * k, (i + 1) * k) for i, c in enumerate(contexts)}
        score, side = np.empty((n, k)), np.zeros((n, k))
        for i, effects in enumerate(joint.draws(n, seed)):
            parts = {c: effects[rows] for c, rows in at.items()}
            side[i] = self._side(parts.__getitem__)
            score[i] = self.objective(np.asarray(effects[:k], float))
        return Drawn(score - self.constraints.weight * side, side)

    def success(self, drawn: Drawn) -> np.ndarray:
        """Which draws reach the threshold, and keep side effects small, (n_draws, n_candidates)."""
        return (drawn.score >= self.threshold) & self.within(drawn)

    def within(self, drawn: Drawn) -> np.ndarray:
        """Which draws keep side effects within the limit, shape (n_draws, n_candidates)."""
        most = self.constraints.max_change
        return np.ones(drawn.side.shape, bool) if most is None else drawn.side <= most

    def value(self, drawn: Drawn, risk: Risk) -> np.ndarray:
        """What is to be large, shape (n_candidates,)."""
        if risk == "success":
            return self.success(drawn).mean(0)
        if risk == "quantile":
            return np.quantile(drawn.score, QUANTILE, axis=0)
        return drawn.score.mean(0)


def check_risk(risk: str) -> None:
    """Refuse an unknown rule."""
    if risk not in RISKS:
        raise ValueError(f"risk={risk!r} is not known; choose one of {list(RISKS)}.")


def doses_of(model: EffectModel, context: str) -> list[Perturbation]:
    """Every target that was measured in a context, alone or not, at each of its doses.

    With a warning, without those that cannot be predicted alone, as no feature knows them.
    """
    found = sorted({s for p in model.measured(context) for s in p.singles})
    left_out = (
        []
        if _can_be_asked(model, found)
        else [str(s) for s in found if not _can_be_asked(model, [s])]
    )
    if left_out:
        found = [s for s in found if str(s) not in left_out]
        warnings.warn(
            f"{len(left_out)} targets are left out, as they were measured in combinations only and no "
            f"feature knows them: {', '.join(left_out[:5])}{' ...' * (len(left_out) > 5)}.",
            UserWarning,
            stacklevel=4,
        )
    if not found:
        raise ValueError(
            f"No target was measured in {context!r}: give candidates, or targets, to choose from."
        )
    return found


def _can_be_asked(model: EffectModel, singles: Sequence[Perturbation]) -> bool:
    try:
        model.parse(singles)
    except UnknownTargetError:
        return False
    return True


def together(singles: Iterable[Perturbation]) -> Perturbation:
    """A combination of some targets, each given alone."""
    parts = list(singles)
    return Perturbation.of([p.targets[0] for p in parts], [p.doses[0] for p in parts])


def in_blocks(n: int, size: int) -> Iterator[slice]:
    """The numbers below n, so many at a time."""
    return (slice(i, min(i + size, n)) for i in range(0, n, size))
