"""How much of each network is let in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from gpjepa.effects import EffectTable, Scale, SharedNoise, kept_share
from gpjepa.splits import MIN_UNITS

_PSEUDO_UNITS = 3.0
"""Units, of average size, that stand for the prior."""


@dataclass(frozen=True)
class Gate:
    r"""Weights of the networks in one regime, and what they rest on.

    Attributes
    ----------
    weights
        :math:`g_k` of :math:`A + \sum_k g_k (N_k - A)`, from 0 to 1 and at most 1 in all, shape
        (n_networks,).
    n_units
        Units that they were judged on; with fewer than five they are the prior's.
    error_anchor, error_gated
        Squared error of the anchor, and of the gated prediction with the weights of each unit set by
        the others.
    """

    weights: np.ndarray
    n_units: int
    error_anchor: float
    error_gated: float


def fit_gate(
    networks: np.ndarray,
    anchor: np.ndarray,
    effects: EffectTable,
    rows: Sequence[int] | np.ndarray,
    scale: Scale,
    prior: np.ndarray,
) -> Gate:
    r"""Least squares of what the anchor misses on what the networks add, as far as it gains.

    Three units of average size, but in which the networks change no more than the anchor misses, stand for the prior; the weights then go from it the share of the way
    that is justified where each unit is predicted by the weights of the others
    (:func:`gpjepa.effects.kept_share`), as those of the anchor's experts do. Genes that a
    perturbation targets do not count.

    Parameters
    ----------
    networks
        What each says of rows that it has not seen, shape (n_networks, n, n_genes).
    anchor
        The same of the anchor, shape (n, n_genes).
    effects
        Their measured effects, against controls that none of them has seen.
    rows
        Which rows of the table they are, shape (n,); those of one perturbation are one unit.
    scale
        Scale of the effects.
    prior
        Weights where fewer than five units can be judged, shape (n_networks,).
    """
    rows = np.asarray(rows, int)
    units = [effects.rows[i][1].targets for i in rows]
    index = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    code, n = np.array([index[u] for u in units], int), len(index)
    scored = ~effects.targeted(rows)
    missed = np.where(scored, effects.effect[scale][rows] - anchor, 0).astype(float)
    error_anchor = float((missed**2).sum())
    added = np.where(scored, networks - anchor, 0).astype(float)
    square, along = np.zeros((n, *prior.shape * 2)), np.zeros((n, *prior.shape))
    np.add.at(square, code, np.einsum("kng,lng->nkl", added, added))
    np.add.at(along, code, np.einsum("kng,ng->nk", added, missed))
    if n < MIN_UNITS or not square.any():
        return Gate(prior, n, error_anchor, _error(error_anchor, square, along, prior))
    # Of a network that is far off, not even a little is to be kept.
    size = min(1.0, error_anchor / max(np.trace(square.sum(0)), 1e-300))
    pseudo = _PSEUDO_UNITS * size * square.mean(0)
    whole, whole_along = square.sum(0) + pseudo, along.sum(0) + pseudo @ prior
    weights = _bounded(whole, whole_along)
    others = np.array(
        [_bounded(whole - s, whole_along - a) for s, a in zip(square, along, strict=True)]
    )
    change = others - prior
    gained = float((change * (along - square @ prior)).sum())
    changed = float(np.einsum("uk,ukl,ul->", change, square, change))
    shared = SharedNoise(effects, scale)
    moved = np.tensordot(weights - prior, added, 1)
    shared.add([(-effects.compared[0][rows].toarray(), moved)])
    kept = kept_share(gained, changed, shared.variance)
    return Gate(
        prior + kept * (weights - prior),
        n,
        error_anchor,
        _error(error_anchor, square, along, prior + kept * change),
    )


def _error(anchor: float, square: np.ndarray, along: np.ndarray, weights: np.ndarray) -> float:
    """Squared error with weights, of all units or of each, from 0 networks on."""
    weights = np.broadcast_to(weights, along.shape)
    gain = 2 * (weights * along).sum() - np.einsum("uk,ukl,ul->", weights, square, weights)
    return float(anchor - gain)


def _bounded(square: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Least squares with weights of at least 0 and at most 1 in all."""
    ridge = 1e-9 * np.trace(square) / len(square) + 1e-15
    root = np.linalg.cholesky(square + ridge * np.eye(len(square)))
    target = np.linalg.solve(root, along)
    found = np.clip(lsq_linear(root.T, target, (0, 1), method="bvls").x, 0, 1)
    return found / max(found.sum(), 1.0)
