"""How far a fitted change is justified by what it gains: one rule for stacks and gates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._scales import Scale
from ._table import EffectTable


class SharedNoise:
    """What the noise of the controls adds to the variance of a sum of rows because they share it.

    Parameters
    ----------
    effects, scale
        The table, and the scale of its effects.
    """

    def __init__(self, effects: EffectTable, scale: Scale) -> None:
        self.effects, self.scale = effects, scale
        self._moved: dict[int, np.ndarray] = {}
        self._own = 0.0

    def add(self, moved: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Add rows, by how much each moves with the controls.

        Parameters
        ----------
        moved
            Terms of which each is a product: weights on the control profiles, shape
            (n, n_strata), and derivatives for each gene, shape (n, n_genes).
        """
        used = np.any([np.any(on != 0, axis=0) for on, _ in moved], axis=0)
        for s in np.flatnonzero(used).tolist():
            rows = np.flatnonzero(np.any([on[:, s] != 0 for on, _ in moved], axis=0))
            by = np.sum([on[rows, s, None] * each[rows] for on, each in moved], axis=0)
            self._moved[s] = self._moved.get(s, np.zeros(by.shape[1])) + by.sum(0)
            self._own += self._variance(s, by)

    @property
    def variance(self) -> float:
        """Variance of the sum beyond that of independent rows; not less than 0."""
        whole = sum(self._variance(s, by[None]) for s, by in self._moved.items())
        return max(whole - self._own, 0.0)

    def _variance(self, stratum: int, by: np.ndarray) -> float:
        return float(self.effects.variance_on_control(self.scale, stratum, by).sum())


def kept_share(along: float, square: float, shared: float) -> float:
    r"""Share of a fitted change that is to be kept.

    A share λ of a change *c* of predictions lowers the squared error by
    :math:`2 \lambda a - \lambda^2 b`, with :math:`a = \sum_u \langle c_u, m_u\rangle` (*m* is what is
    missed without it) and :math:`b = \sum_u \lVert c_u\rVert^2`, so that :math:`a/b` is the best share,
    measured on units *u* that are each changed by what the others fitted. Noise that all units
    share, of variance *v* in *a*, moves them all in one direction: the share is the posterior mean
    under the prior N(0, 1), :math:`(a/b) / (1 + v/b^2)`, between 0 and 1. The spread between units is
    not taken off once more: in simulations that does not lower the risk.

    Parameters
    ----------
    along, square, shared
        a, b and v.
    """
    if along <= 0 or square <= 0:
        return 0.0
    return min(along * square / (square**2 + shared), 1.0)
