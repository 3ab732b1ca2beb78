"""How far the network may move a prediction away from the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpjepa.splits import MIN_UNITS

from ._gain import SharedNoise, kept_share
from ._scales import Scale
from ._table import EffectTable

_PSEUDO_UNITS = 3.0
"""Units that stand for the prior."""


@dataclass(frozen=True)
class Gate:
    """The gate of one regime, and what it rests on.

    Attributes
    ----------
    gate
        g of d = A + g (N - A), from 0 (anchor) to 1 (network).
    n_units
        Held-out units, of which fewer than five leave the gate at its prior.
    error_anchor, error_network, error_gated
        Squared error of each on the held-out rows; of the gated prediction, with the gate of each
        unit set by the others, before their gain decides how much of it is kept.
    """

    gate: float
    n_units: int
    error_anchor: float
    error_network: float
    error_gated: float


def fit_gate(
    network: np.ndarray,
    anchor: np.ndarray,
    effects: EffectTable,
    rows: Sequence[int] | np.ndarray,
    scale: Scale = "mean_log1p",
    prior: float = 0.0,
) -> Gate:
    r"""Least squares of what the anchor misses on what the network adds, as far as it gains.

    .. math:: g = \frac{\sum_a \langle N_a - A_a,\, d_a - A_a\rangle}
       {\sum_a \lVert N_a - A_a\rVert^2}

    between 0 and 1, times the share that its gain justifies where each unit is predicted by the gate
    of the others (:func:`gpjepa.effects._gain.kept_share`). Where there is a prior, three further
    units of average size say that it is right, unless what the network adds is larger than all that
    the anchor misses. Units are targets; genes that a perturbation targets do not count.

    Parameters
    ----------
    network, anchor
        N and A of held-out rows, shape (n, n_genes).
    effects
        Their measured effects d, against control cells that neither N nor A has seen.
    rows
        Which rows of the table they are, shape (n,).
    scale
        Scale of the effects.
    prior
        The gate where there are fewer than five units.
    """
    rows = np.asarray(rows, int)
    units = [effects.rows[i][1].targets for i in rows]
    index = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    code, n = np.array([index[u] for u in units], int), len(index)
    scored = ~effects.targeted(rows)
    added = np.where(scored, network - anchor, 0).astype(float)
    missed = np.where(scored, effects.effect[scale][rows] - anchor, 0).astype(float)
    along = np.bincount(code, (added * missed).sum(1), n)
    square = np.bincount(code, (added**2).sum(1), n)
    error_anchor = float((missed**2).sum())
    error_network = float(((missed - added) ** 2).sum())

    def gated(gates: float | np.ndarray) -> float:
        return error_anchor - float(np.sum(gates * (2 * along - gates * square)))

    if n < MIN_UNITS or square.sum() == 0:
        return Gate(prior, n, error_anchor, error_network, gated(prior))
    # Of a network that is far off, not even a little is to be kept.
    pseudo = _PSEUDO_UNITS / n * min(square.sum(), error_anchor) if prior else 0.0
    all_along, all_square = along.sum() + pseudo * prior, square.sum() + pseudo
    gate = _slope(all_along, all_square)
    others = np.array(
        [_slope(all_along - a, all_square - s) for a, s in zip(along, square, strict=True)]
    )
    shared = SharedNoise(effects, scale)
    shared.add([(-effects.compared[0][rows].toarray(), gate * added)])
    gained, changed = float(others @ along), float(others**2 @ square)
    if pseudo:  # which are right about the prior
        gained, changed = gained + pseudo * prior * gate, changed + pseudo * gate**2
    kept = kept_share(gained, changed, shared.variance)
    return Gate(float(kept * gate), n, error_anchor, error_network, gated(others))


def _slope(along: float, square: float) -> float:
    return float(np.clip(along / square, 0, 1)) if square > 0 else 0.0
