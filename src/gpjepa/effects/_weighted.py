"""Estimates as weighted sums of measured effects, and sums of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

KINDS = ("spread", "unseen", "without features", "transfer", "combinations")
"""Kinds of residual variance: how large an effect may be, and what experts leave of it."""
SPREAD, UNSEEN, WITHOUT_FEATURES, TRANSFER, COMBINATIONS = range(len(KINDS))


@dataclass(frozen=True)
class Weights:
    """Weights of some columns; all others are 0.

    Attributes
    ----------
    columns
        Which columns, each once where these are weights of measured effects.
    values
        Their weights, same shape.
    fixed
        What is added to the weighted sum, shape (n_genes,).
    """

    columns: np.ndarray
    values: np.ndarray
    fixed: np.ndarray | None = None

    @classmethod
    def equal(cls, columns: Sequence[int] | np.ndarray, total: float = 1.0) -> Weights:
        """The same weight for each column; none for no columns."""
        return cls(np.asarray(columns, int), np.full(len(columns), total / max(len(columns), 1)))

    @classmethod
    def of(
        cls, values: np.ndarray, first: int = 0, rows: Sequence[int] | np.ndarray | None = None
    ) -> Weights:
        """What is not 0 of a vector whose first value has a given column, or of given columns."""
        where = np.flatnonzero(values)
        return cls(first + where if rows is None else np.asarray(rows)[where], values[where])

    def times(self, factor: float) -> Weights:
        """All weights times a factor."""
        fixed = None if self.fixed is None else factor * self.fixed
        return Weights(self.columns, factor * self.values, fixed)


def added(weights: Iterable[Weights]) -> Weights:
    """Sum of weights without what is fixed; a column may occur more than once."""
    found = list(weights)
    if len(found) == 1:
        return found[0]
    return Weights(
        np.concatenate([NOTHING.columns, *(w.columns for w in found)]),
        np.concatenate([NOTHING.values, *(w.values for w in found)]),
    )


def once(weights: Weights) -> Weights:
    """The same weights, each column once."""
    columns, at = np.unique(weights.columns, return_inverse=True)
    return Weights(columns, np.bincount(at, weights.values, len(columns)))


NOTHING = Weights(np.zeros(0, int), np.zeros(0))
Terms = Sequence[tuple[float, Weights]]
"""A sum of weights, each times a factor."""


@dataclass(frozen=True)
class Share:
    """What one expert contributes to a prediction.

    Attributes
    ----------
    part
        The perturbation that the expert speaks of.
    expert
        Name of the expert.
    weight
        Its weight.
    of
        The expert's own prediction: weights of the measured effects, then of the control profiles
        of the contexts.
    """

    part: str
    expert: str
    weight: float
    of: Weights

    def times(self, factor: float, role: str = "") -> Share:
        """The same share of a prediction that enters another with a factor, in some role."""
        expert = f"{role}, {self.expert}" if role and self.part else self.expert
        return replace(self, weight=factor * self.weight, expert=expert)


@dataclass(frozen=True)
class Estimate:
    """One mean effect as a weighted sum, and what remains unknown of it.

    Attributes
    ----------
    shares
        What each expert contributes.
    left
        Weights on the variances of the profiles of what shrinkage leaves unknown.
    residual
        Weights on the kinds of residual variance, shape (n_kinds,).
    bias
        Further variance of each gene: what shrinkage is seen to take off a measured effect beyond
        its noise, squared, or what experts leave in a context of its own.
    interaction
        Weight on the variance of interactions.
    singles
        Of a combination: what it takes of the estimate of each single.
    """

    shares: tuple[Share, ...] = ()
    left: Weights = NOTHING
    residual: np.ndarray = field(default_factory=lambda: np.zeros(len(KINDS)))
    bias: Weights = NOTHING
    interaction: float = 0.0
    singles: tuple[float, ...] = ()

    @property
    def terms(self) -> Terms:
        """The weighted sum."""
        return [(s.weight, s.of) for s in self.shares]

    def times(self, factor: float) -> Estimate:
        """The estimate times a factor."""
        return Estimate(
            tuple(s.times(factor) for s in self.shares),
            self.left.times(factor**2),
            factor**2 * self.residual,
            self.bias.times(factor**2),
            factor**2 * self.interaction,
            tuple(factor * s for s in self.singles),
        )

    def less_sure(self, kind: int, by: float) -> Estimate:
        """The estimate with residual variance of a kind."""
        residual = self.residual.copy()
        residual[kind] += by
        return replace(self, residual=residual)


def total(estimates: Sequence[Estimate]) -> Estimate:
    """Sum of estimates; what each leaves unknown is independent of the others."""
    return Estimate(
        tuple(share for e in estimates for share in e.shares),
        added(e.left for e in estimates),
        np.sum([e.residual for e in estimates], axis=0) if estimates else np.zeros(len(KINDS)),
        added(e.bias for e in estimates),
        float(np.sum([e.interaction for e in estimates])),
    )


@dataclass(frozen=True)
class Sums:
    """Experts that each add up some of the same parts.

    Attributes
    ----------
    parts
        Estimates that they are made of.
    experts
        How often each expert takes each part, shape (n_experts, n_parts).
    names
        Of the experts.
    """

    parts: Sequence[Estimate]
    experts: np.ndarray
    names: Sequence[str]

    def weighted(self, weights: np.ndarray) -> Estimate:
        """The weighted sum of the experts; what is unknown of a part is unknown once."""
        shares = [
            share.times(float(weight * often), name)
            for weight, expert, name in zip(weights, self.experts, self.names, strict=True)
            for part, often in zip(self.parts, expert, strict=True)
            if weight and often
            for share in part.shares
        ]
        factors = weights @ self.experts
        whole = total([p.times(float(f)) for p, f in zip(self.parts, factors, strict=True)])
        return replace(whole, shares=tuple(shares))

    def terms(self) -> list[Terms]:
        """The weighted sum that each expert is."""
        return [
            [
                (often * weight, of)
                for part, often in zip(self.parts, expert, strict=True)
                if often
                for weight, of in part.terms
            ]
            for expert in self.experts
        ]
