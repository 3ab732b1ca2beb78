"""Shrinkage and stacking of predictions that are weighted sums of measured effects.

An effect is a difference of two profiles, so every such prediction is a weighted sum of profiles,
whose sampling errors are independent of each other. The noise that a prediction and a measured
effect share is then the overlap of their weights: for two effects of one context, that of the
control profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from gpjepa.splits import MIN_UNITS

from ._scales import Scale
from ._table import EffectTable

_BLOCK = 64  # rows predicted at a time
_NOTHING = 1e-4  # a weight below this says nothing


def targeted(effects: EffectTable, rows: Sequence[int]) -> np.ndarray:
    """Mask of the genes that each row's perturbation targets, shape (n_rows, n_genes)."""
    where = {gene: g for g, gene in enumerate(effects.genes)}
    mask = np.zeros((len(rows), len(effects.genes)), bool)
    for i, row in enumerate(rows):
        mask[i, [where[t] for t in effects.rows[row][1].targets if t in where]] = True
    return mask


@dataclass(frozen=True)
class Shrunken:
    """Measured effects after shrinkage, one row per effect.

    Attributes
    ----------
    weights
        Weight of each measured effect in the estimate, shape (n, n_rows).
    factor
        Share of the distance to the chosen target that is kept, shape (n,).
    target
        Index of the target chosen for all of them.
    left
        Weights on the profiles' variances of what the factor leaves unknown, shape (n, n_profiles).
    """

    weights: np.ndarray
    factor: np.ndarray
    target: int
    left: np.ndarray


def shrink(
    effects: EffectTable, rows: Sequence[int], targets: Sequence[np.ndarray], scale: Scale
) -> Shrunken:
    r"""Shrink measured effects as whole vectors by the positive-part James–Stein factor.

    An effect *d* with error ε is moved towards *t*, a weighted sum of measured effects:
    :math:`t + f\,(d - t)` with

    .. math:: f = \Bigl(1 - \frac{c}{\lVert d - t\rVert^2}\Bigr)_+, \qquad
       c = \sum_g \mathrm{Cov}(\varepsilon_g,\, \varepsilon_g - t_g),

    which is the factor with the least expected error; the control's noise is part of *c* for
    *t* = 0 and cancels for a mean over the same controls. Stein's unbiased risk estimate
    :math:`v - c^2/\lVert d-t\rVert^2` (:math:`\lVert d-t\rVert^2 - 2c + v` at *f* = 0, *v* the
    variance of *d*), summed over the rows, chooses among the targets (James and Stein 1961; Stein
    1981; Efron and Morris 1973).

    Parameters
    ----------
    effects
        The table.
    rows
        Which of its rows to shrink.
    targets
        Candidates for *t*: weights of measured effects, each of shape (n, n_rows).
    scale
        Scale of the effects.

    Returns
    -------
    Shrunken
    """
    own = np.eye(len(effects.rows))[list(rows)]
    on_profiles = effects.on_profiles(own)
    variance = effects.profile_variance(scale)
    total = variance.sum(1)
    values = effects.effect[scale].astype(float)
    noise = on_profiles**2 @ total
    results, risks = [], []
    for index, target in enumerate(targets):
        apart = on_profiles * (on_profiles - effects.on_profiles(target))
        shared = apart @ total
        square = np.maximum((((own - target) @ values) ** 2).sum(1), 1e-12)
        factor = np.clip(1 - shared / square, 0, 1)
        risk = np.where(square > shared, noise - shared**2 / square, square - 2 * shared + noise)
        # A factor whose truth is 0 still comes out as large as its own sampling error.
        least = np.sqrt(2 * ((np.maximum(apart, 0) @ variance) ** 2).sum(1))
        known = np.minimum(least / np.maximum(shared, 1e-12), 1)
        left = (np.maximum(factor, known) - factor**2)[:, None] * np.maximum(apart, 0)
        weights = target + factor[:, None] * (own - target)
        results.append(Shrunken(weights, factor, index, left))
        risks.append(risk.sum())
    return results[int(np.argmin(risks))]


@dataclass(frozen=True)
class Experts:
    """Predictions of some rows by several experts, each out of fold.

    Attributes
    ----------
    rows
        Rows of the table that are predicted.
    weights
        Weight of each measured effect, shape (n_experts, n, n_rows).
    controls
        Weight of each control profile, shape (n_experts, n, n_contexts); zeros if None.
    units
        What each row counts as: rows of one unit are not independent.
    """

    rows: Sequence[int]
    weights: np.ndarray
    units: Sequence
    controls: np.ndarray | None = None


@dataclass(frozen=True)
class Stack:
    """Weights of experts.

    Attributes
    ----------
    weights
        Shape (n_experts,).
    n_units
        Independent rows that the weights rest on.
    kept
        Share of the way to the fitted weights that is gone.
    """

    weights: np.ndarray
    n_units: int
    kept: float


def fit_stack(
    effects: EffectTable,
    scale: Scale,
    experts: Experts,
    prior: np.ndarray,
    towards: np.ndarray | None = None,
    min_units: int = MIN_UNITS,
) -> Stack:
    r"""Non-negative stacking, freed of shared noise and shrunk by its own gain.

    Wolpert's (1992) and Breiman's (1996) stacking minimises
    :math:`\sum_a \lVert d_a - \sum_k w_k e_k(a)\rVert^2` over :math:`w \ge 0`. Of
    :math:`\langle e_k, d_a\rangle` the expected sampling noise that both share is taken off; of
    :math:`\langle e_k, e_l\rangle` nothing is: that noise is there at prediction too. The weights
    go the share :math:`(1 - (s/T)^2)_+` of the way from ``towards``, where *T* is their gain over it
    when each unit is judged by the weights of the others, and *s* the standard error that shared
    noise gives to *T*.

    Parameters
    ----------
    effects, scale
        The table, and the scale of the effects.
    experts
        Predictions out of fold.
    prior
        Weights that stand in for fewer than ``min_units`` units, shape (n_experts,).
    towards
        Weights that they are shrunk towards; the prior by default.
    min_units
        Units needed.

    Returns
    -------
    Stack
    """
    prior = np.asarray(prior, float)
    towards = prior if towards is None else towards
    names = list(dict.fromkeys(experts.units))
    if len(names) < min_units or not names:
        return Stack(prior, len(names), 0.0)
    square, along, shared = _normal_equations(effects, scale, experts)
    code = np.array([names.index(u) for u in experts.units])
    member = (code == np.arange(len(names))[:, None]).astype(float)
    square = np.einsum("ui,ikl->ukl", member, square)
    along = member @ along
    all_square, all_along = square.sum(0), along.sum(0)
    weights = _solve(all_square, all_along)
    gain = 0.0
    for unit_square, unit_along in zip(square, along, strict=True):
        left_out = _solve(all_square - unit_square, all_along - unit_along)
        gain += _gain(left_out, unit_square, unit_along) - _gain(towards, unit_square, unit_along)
    spread = np.sqrt(2 * (effects.profile_variance(scale)[len(effects.rows) :] ** 2).sum(1))
    error = float(np.linalg.norm(2 * (shared @ (weights - towards)) * spread))
    kept = max(0.0, 1 - (error / gain) ** 2) if gain > 0 else 0.0
    weights = towards + kept * (weights - towards)
    weights = np.where(weights < _NOTHING, 0, weights)
    return Stack(weights, len(names), kept)


def _gain(weights: np.ndarray, square: np.ndarray, along: np.ndarray) -> float:
    """By how much weighted experts reduce the squared error of no change."""
    return float(2 * weights @ along - weights @ square @ weights)


def _solve(square: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Non-negative least squares from its normal equations."""
    ridge = 1e-9 * np.trace(square) / len(square) + 1e-15
    root = np.linalg.cholesky(square + ridge * np.eye(len(square)))
    return nnls(root.T, np.linalg.solve(root, along))[0]


def _blocks(experts: Experts) -> list[np.ndarray]:
    n = len(experts.rows)
    return [np.arange(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK)]


def _predict(effects: EffectTable, scale: Scale, experts: Experts, block: np.ndarray) -> np.ndarray:
    """Predictions of a block of rows, shape (n_experts, n_block, n_genes)."""
    predicted = experts.weights[:, block] @ effects.effect[scale].astype(float)
    if experts.controls is not None:
        predicted += experts.controls[:, block] @ effects.control_profiles(scale)
    return predicted


def _normal_equations(
    effects: EffectTable, scale: Scale, experts: Experts
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row ⟨e_k, e_l⟩ and ⟨e_k, d⟩ without shared noise; shared weights on the controls."""
    k, n = experts.weights.shape[:2]
    variance = effects.profile_variance(scale)
    square, along = np.empty((n, k, k)), np.empty((n, k))
    n_rows = len(effects.rows)
    shared = np.zeros((len(variance) - n_rows, k))
    for block in _blocks(experts):
        rows = np.asarray(experts.rows)[block]
        hidden = targeted(effects, rows)
        predicted = np.where(hidden, 0, _predict(effects, scale, experts, block))
        measured = effects.effect[scale][rows]
        square[block] = np.einsum("kig,lig->ikl", predicted, predicted)
        along[block] = np.einsum("kig,ig->ik", predicted, measured)
        own = effects.on_profiles(np.eye(n_rows)[rows])
        overlap = np.stack([own * _on_profiles(effects, experts, j, block) for j in range(k)])
        noise = variance.sum(1) - np.where(hidden, 1.0, 0.0) @ variance.T
        along[block] -= np.einsum("kip,ip->ik", overlap, noise)
        shared += overlap[:, :, n_rows:].sum(1).T
    return square, along, shared


def _on_profiles(effects: EffectTable, experts: Experts, k: int, block: np.ndarray) -> np.ndarray:
    controls = None if experts.controls is None else experts.controls[k, block]
    return effects.on_profiles(experts.weights[k, block], controls)


def stack_residual(
    effects: EffectTable, scale: Scale, experts: Experts, weights: np.ndarray
) -> np.ndarray | None:
    """Mean squared error of the stacked prediction per gene, without sampling noise.

    Returns
    -------
    numpy.ndarray or None
        Shape (n_genes,); None if fewer than two units show it.
    """
    if len(set(experts.units)) < 2:
        return None
    variance = effects.profile_variance(scale)
    total = count = np.zeros(len(effects.genes))
    for block in _blocks(experts):
        rows = np.asarray(experts.rows)[block]
        scored = ~targeted(effects, rows)
        predicted = np.tensordot(weights, _predict(effects, scale, experts, block), 1)
        apart = effects.on_profiles(np.eye(len(effects.rows))[rows])
        for j, w in enumerate(weights):
            apart = apart - w * _on_profiles(effects, experts, j, block)
        error = (effects.effect[scale][rows] - predicted) ** 2 - apart**2 @ variance
        total = total + (error * scored).sum(0)
        count = count + scored.sum(0)
    return np.maximum(total / np.maximum(count, 1), 0)
