"""Measured effects on one scale, and many weighted sums of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TypeVar

import numpy as np
from scipy.spatial.distance import cdist

from ._scales import Scale
from ._table import EffectTable
from ._weighted import NOTHING, Estimate, Terms, Weights

T = TypeVar("T")
BLOCK = 256
"""Sums made at a time, which bounds what they need of memory."""


def blocks(n: int) -> Iterator[range]:
    """The numbers below n, in blocks."""
    return (range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def thinned(rows: list[T], most: int) -> list[T]:
    """Every k-th of some rows, so that no more than so many are left."""
    return rows[:: ceil(len(rows) / most) or 1]


@dataclass(frozen=True)
class Assembled:
    """Weighted sums as matrices.

    Attributes
    ----------
    rows
        Rows of the table that have a weight.
    on_rows
        Their weights, shape (n, n_used_rows).
    on_controls
        Weights of the control profiles, shape (n, n_contexts).
    fixed
        What is added to the sums, shape (n, n_genes), or 0.
    place
        Column of each row of the table in ``on_rows``, -1 for those without.
    """

    rows: slice | np.ndarray
    on_rows: np.ndarray
    on_controls: np.ndarray
    fixed: np.ndarray | float
    place: np.ndarray

    def weight_of(self, rows: np.ndarray) -> np.ndarray:
        """The weight that each sum gives to a row of its own, shape (n,)."""
        found, at = np.zeros(len(rows)), self.place[rows]
        has = np.flatnonzero(at >= 0)
        found[has] = self.on_rows[has, at[has]]
        return found


class Measured:
    """The measured effects of a table on one scale, and weighted sums of them.

    Columns of :class:`Weights` are the rows of the table, then the control profiles of its
    contexts. An effect is a difference of two profiles, so that a sum of effects is one of
    profiles, whose sampling errors are independent of each other: those of the perturbed profiles,
    then of the control profiles (of the batches where there are any).

    Attributes
    ----------
    values
        Effects, shape (n_rows, n_genes).
    variance
        Sampling variance of the perturbed profiles, then of the control profiles,
        shape (n_rows + n_strata, n_genes); ``totals`` are its sums over genes.
    row
        Row of each (context, perturbation).
    """

    def __init__(self, effects: EffectTable, scale: Scale) -> None:
        self.effects, self.scale = effects, effects.check_scale(scale)
        self.values = effects.effect[scale].astype(float)
        self.variance = effects.profile_variance(scale)
        self.totals = self.variance.sum(1)
        self.row = {row: i for i, row in enumerate(effects.rows)}
        self._controls = effects.control_profiles(scale)
        self._of_rows, self._shares = effects.compared

    @cached_property
    def _for_intervals(self) -> np.ndarray:
        return self.effects.interval_variance(self.scale)

    @cached_property
    def alone(self) -> dict[str, list[int]]:
        """Rows of targets perturbed alone, by context."""
        return self._by_context(lambda n: n == 1)

    @cached_property
    def combined(self) -> dict[str, list[int]]:
        """Rows of combinations, by context."""
        return self._by_context(lambda n: n > 1)

    def _by_context(self, counts: Callable[[int], bool]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, (context, perturbation) in enumerate(self.effects.rows):
            if counts(len(perturbation.targets)):
                found.setdefault(context, []).append(i)
        return found

    @cached_property
    def control(self) -> dict[str, int]:
        """Column of the control profile of each context."""
        return {c: len(self.values) + i for i, c in enumerate(self.effects.contexts)}

    @cached_property
    def control_distances(self) -> np.ndarray:
        """Squared distances of the control profiles of the contexts, shape (n, n)."""
        return cdist(self._controls, self._controls, "sqeuclidean")

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Weights of the control profiles that rows were compared with, shape (n, n_strata)."""
        return np.asarray(self._of_rows[rows].todense())

    def one(self, row: int) -> Weights:
        """A measured effect as it is."""
        return Weights(np.array([row]), np.ones(1))

    def assemble(self, sums: Sequence[Terms]) -> Assembled:
        """Weighted sums as matrices over the rows that any of them uses."""
        n = len(self.values)
        used = np.zeros(n + len(self._controls), bool)
        for terms in sums:
            for _, weights in terms:
                used[weights.columns] = True
        rows = np.flatnonzero(used[:n])
        # Most of what lies between the first and the last: a slice copies nothing.
        whole = len(rows) and 2 * len(rows) > rows[-1] + 1 - rows[0]
        chosen = slice(rows[0], rows[-1] + 1) if whole else rows
        width = rows[-1] + 1 - rows[0] if whole else len(rows)
        at = np.full(len(used), -1)
        at[:n][chosen] = np.arange(width)
        at[n:] = width + np.arange(len(self._controls))
        dense = np.zeros((len(sums), width + len(self._controls)))
        fixed: np.ndarray | float = 0.0
        for i, terms in enumerate(sums):
            for factor, weights in terms:
                dense[i, at[weights.columns]] += factor * weights.values
                if weights.fixed is not None:
                    if isinstance(fixed, float):
                        fixed = np.zeros((len(sums), self.values.shape[1]))
                    fixed[i] += factor * weights.fixed
        return Assembled(chosen, dense[:, :width], dense[:, width:], fixed, at[:n])

    def mean(self, sums: Assembled) -> np.ndarray:
        """The sums themselves, shape (n, n_genes)."""
        found = sums.on_rows @ self.values[sums.rows] + sums.fixed
        return found + sums.on_controls @ self._controls if sums.on_controls.any() else found

    def on_strata(self, sums: Assembled) -> np.ndarray:
        """Weights of the control profiles whose errors are independent, shape (n, n_strata)."""
        found = -(sums.on_rows @ self._of_rows[sums.rows])
        return found + sums.on_controls @ self._shares if sums.on_controls.any() else found

    def noise(self, sums: Assembled, interval: bool = False) -> np.ndarray:
        """Sampling variance of the sums, shape (n, n_genes).

        Unbiased for corrections; for intervals it is nowhere 0.
        """
        variance = self._for_intervals if interval else self.variance
        n = len(self.values)
        own = sums.on_rows**2 @ variance[:n][sums.rows]
        return own + self.on_strata(sums) ** 2 @ variance[n:]

    def left(self, estimates: Sequence[Estimate]) -> np.ndarray:
        """What shrinkage leaves unknown, and what it is seen to take off, (n, n_genes)."""
        found = self.of_profiles([e.left for e in estimates])
        for own, estimate in zip(found, estimates, strict=True):
            np.add.at(own, estimate.bias.columns, estimate.bias.values)
        return found

    def of_profiles(self, weights: Sequence[Weights]) -> np.ndarray:
        """Weighted sums of variances of profiles, for intervals, shape (n, n_genes)."""
        columns = np.unique(np.concatenate([NOTHING.columns, *(w.columns for w in weights)]))
        dense = np.zeros((len(weights), len(columns)))
        for own, each in zip(dense, weights, strict=True):
            np.add.at(own, np.searchsorted(columns, each.columns), each.values)
        return dense @ self._for_intervals[columns]
