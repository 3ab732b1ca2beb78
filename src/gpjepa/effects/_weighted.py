"""Estimates as weighted sums of measured effects, and sums of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


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
    weights, controls
        The weighted sum of measured effects, shape (n_rows,), and of control profiles, shape
        (n_contexts,), that it contributes, its weight included.
    """

    part: str
    expert: str
    weight: float
    weights: np.ndarray
    controls: np.ndarray

    def times(self, factor: float, role: str = "") -> Share:
        """The same share of a prediction that enters another with a factor, in some role."""
        return replace(
            self,
            weight=factor * self.weight,
            weights=factor * self.weights,
            controls=factor * self.controls,
            expert=f"{role}, {self.expert}" if role and self.part else self.expert,
        )


@dataclass(frozen=True)
class Estimate:
    """One mean effect as a weighted sum, and what remains unknown of it.

    Attributes
    ----------
    shares
        What each expert contributes.
    weights, controls
        Sums over the shares.
    left
        Weights on the variances of the profiles of what shrinkage leaves unknown.
    residual
        Weights on the kinds of residual variance.
    interaction
        Weight on the variance of interactions.
    bias
        Weights on what shrinkage is seen to take off each measured effect beyond its noise.
    singles
        Of a combination: what it takes of the estimate of each single.
    """

    shares: tuple[Share, ...]
    weights: np.ndarray
    controls: np.ndarray
    left: np.ndarray
    residual: np.ndarray
    bias: np.ndarray
    interaction: float = 0.0
    singles: tuple[float, ...] = ()

    def times(self, factor: float) -> Estimate:
        """The estimate times a factor."""
        return Estimate(
            tuple(s.times(factor) for s in self.shares),
            factor * self.weights,
            factor * self.controls,
            factor**2 * self.left,
            factor**2 * self.residual,
            factor**2 * self.bias,
            factor**2 * self.interaction,
            tuple(factor * s for s in self.singles),
        )


def total(estimates: Sequence[Estimate]) -> Estimate:
    """Sum of estimates; what each leaves unknown is independent of the others."""
    return Estimate(
        tuple(share for e in estimates for share in e.shares),
        np.sum([e.weights for e in estimates], axis=0),
        np.sum([e.controls for e in estimates], axis=0),
        np.sum([e.left for e in estimates], axis=0),
        np.sum([e.residual for e in estimates], axis=0),
        np.sum([e.bias for e in estimates], axis=0),
        float(np.sum([e.interaction for e in estimates])),
    )


def weigh(experts: Sequence[list[Estimate]], weights: np.ndarray, names: Sequence[str]) -> Estimate:
    """Weighted sum of experts, each a sum of estimates; one estimate may be in several experts."""
    factor: dict[int, float] = {}
    shares: list[Share] = []
    for parts, weight, name in zip(experts, weights, names, strict=True):
        for part in parts:
            factor[id(part)] = factor.get(id(part), 0.0) + float(weight)
            if weight:
                shares += [share.times(float(weight), name) for share in part.shares]
    once = {id(part): part for parts in experts for part in parts}
    return replace(
        total([part.times(factor[key]) for key, part in once.items()]), shares=tuple(shares)
    )


def less_sure(estimate: Estimate, kind: int, by: float) -> Estimate:
    """The estimate with residual variance of a kind."""
    residual = estimate.residual.copy()
    residual[kind] += by
    return replace(estimate, residual=residual)
