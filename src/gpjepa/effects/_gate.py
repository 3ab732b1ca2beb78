"""How far the network may move a prediction away from the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpjepa.splits import MIN_UNITS


@dataclass(frozen=True)
class Gate:
    """The gate of one regime, and what it rests on.

    Attributes
    ----------
    gate
        g of d = A + g (N - A), from 0 (anchor) to 1 (network).
    n_units
        Held-out units, of which fewer than five leave the gate at 0.
    error_anchor, error_network, error_gated
        Squared error of each on the held-out rows; of the gated prediction, with the gate of each
        unit set by the others.
    """

    gate: float
    n_units: int
    error_anchor: float
    error_network: float
    error_gated: float


def fit_gate(
    network: np.ndarray, anchor: np.ndarray, measured: np.ndarray, control_variance: np.ndarray,
    units: Sequence, contexts: Sequence[str], scored: np.ndarray,
) -> Gate:  # fmt: skip
    r"""Least squares of what the anchor misses on what the network adds, shrunk by its own gain.

    .. math:: g = \frac{\sum_a \langle N_a - A_a,\, d_a - A_a\rangle}
       {\sum_a \lVert N_a - A_a\rVert^2}

    between 0 and 1, times :math:`(1 - (s/T)^2)_+`, where *T* is the gain over the anchor with each
    unit predicted by the gate of the others, and *s* its standard error: the spread between units
    (with a t statistic's allowance for few of them), and the noise of the controls, which is in
    every measured effect alike.

    Parameters
    ----------
    network, anchor, measured
        N, A and d of held-out rows, shape (n_rows, n_genes); d against control cells that neither
        N nor A has seen.
    control_variance
        Sampling variance of the control profile behind each measured effect, shape
        (n_rows, n_genes).
    units, contexts
        What each row counts as, and its context.
    scored
        Mask of the genes that count, shape (n_rows, n_genes).

    Returns
    -------
    Gate
    """
    names = list(dict.fromkeys(units))
    member = np.array([[u == name for u in units] for name in names], float)
    added = np.where(scored, network - anchor, 0).astype(float)
    missed = np.where(scored, measured - anchor, 0).astype(float)
    along = member @ (added * missed).sum(1)
    square = member @ (added**2).sum(1)
    error_anchor = float((missed**2).sum())
    error_network = float(((missed - added) ** 2).sum())
    if len(names) < MIN_UNITS or square.sum() == 0:
        return Gate(0.0, len(names), error_anchor, error_network, error_anchor)
    gate = _slope(along.sum(), square.sum())
    others = np.array([_slope(along.sum() - a, square.sum() - s)
                       for a, s in zip(along, square, strict=True)])  # fmt: skip
    gains = 2 * others * along - others**2 * square
    n = len(names)
    # The variance of a t statistic: with few units, the spread between them is itself uncertain.
    between = n * gains.var(ddof=1) * (n - 1) / (n - 3)
    shared = 0.0
    for context in set(contexts):
        mine = np.array([c == context for c in contexts])
        noise = control_variance[mine][0]
        shared += float((2 * gate) ** 2 * (added[mine].sum(0) ** 2 * noise).sum())
    gain = float(gains.sum())
    kept = max(0.0, 1 - (between + shared) / gain**2) if gain > 0 else 0.0
    return Gate(kept * gate, len(names), error_anchor, error_network, error_anchor - gain)


def _slope(along: float, square: float) -> float:
    return float(np.clip(along / square, 0, 1)) if square > 0 else 0.0
