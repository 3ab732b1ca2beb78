"""Shrinkage and stacking of predictions that are weighted sums of measured effects.

The noise that a prediction and a measured effect share is the overlap of their weights on profiles:
for two effects of one context, that of the control profile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from gpjepa.splits import MIN_UNITS

from ._gain import SharedNoise, kept_share
from ._measured import Measured, blocks
from ._weighted import Terms

_NOTHING = 0.01  # a weight below this says nothing
_PSEUDO_UNITS = 3.0
"""Units, of average size, that stand for the weights before fitting."""
_MOST = 2.0
"""Largest weight: of an expert that says next to nothing, any multiple might fit."""


@dataclass(frozen=True)
class Shrunken:
    """Measured effects after shrinkage.

    Attributes
    ----------
    factor
        Share of the distance to the chosen target that is kept, shape (n,).
    target
        Index of the target chosen for all of them.
    """

    factor: np.ndarray
    target: int


def shrink(
    measured: Measured, rows: Sequence[int], targets: Sequence[Callable[[int], Terms]]
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
    measured
        The effects.
    rows
        Which of its rows to shrink.
    targets
        Candidates for *t*: what each says of the j-th of the rows.

    Returns
    -------
    Shrunken
    """
    found = [_factors(measured, rows, target) for target in targets]
    chosen = int(np.argmin([risk for _, risk in found]))
    return Shrunken(found[chosen][0], chosen)


def _factors(
    measured: Measured, rows: Sequence[int], target: Callable[[int], Terms]
) -> tuple[np.ndarray, float]:
    """Factors towards one target, shape (n,), and the estimate of their risk."""
    n_rows, totals = len(measured.values), measured.totals
    factor, whole = np.zeros(len(rows)), 0.0
    for block in blocks(len(rows)):
        mine = np.asarray(rows)[block]
        apart = measured.assemble(
            [
                [(1.0, measured.one(a)), *((-f, w) for f, w in target(j))]
                for j, a in zip(block, mine, strict=True)
            ]
        )
        # Weights on the profiles that effect and distance have in common: its own, its controls'.
        of_control = -measured.of_rows(mine)
        shared = apart.weight_of(mine) * totals[mine]
        shared += (of_control * measured.on_strata(apart)) @ totals[n_rows:]
        noise = totals[mine] + of_control**2 @ totals[n_rows:]
        square = np.maximum((measured.mean(apart) ** 2).sum(1), 1e-12)
        factor[block] = np.clip(1 - shared / square, 0, 1)
        risk = np.where(square > shared, noise - shared**2 / square, square - 2 * shared + noise)
        whole += float(risk.sum())
    return factor, whole


@dataclass(frozen=True)
class Experts:
    """Predictions of some rows by several experts, each out of fold.

    Attributes
    ----------
    rows
        Rows of the table that are predicted.
    units
        What each row counts as: rows of one unit are not independent.
    of
        What each expert says of the i-th of these rows.
    """

    rows: Sequence[int]
    units: Sequence
    of: Callable[[int], Sequence[Terms]]


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
    measured: Measured,
    experts: Experts,
    prior: np.ndarray,
    towards: np.ndarray | None = None,
    min_units: int = MIN_UNITS,
) -> Stack:
    r"""Ridge stacking with weights from 0 to 2, freed of shared noise, as far as it gains.

    Wolpert's (1992) and Breiman's (1996) stacking minimises
    :math:`\sum_a \lVert d_a - \sum_k w_k e_k(a)\rVert^2` over :math:`w \ge 0`. Of
    :math:`\langle e_k, d_a\rangle` the expected sampling noise that both share is taken off; of
    :math:`\langle e_k, e_l\rangle` nothing is: that noise is there at prediction too. Three units
    of average size stand for ``towards`` (ridge, Hoerl and Kennard 1970), and the weights go as far from ``towards`` as their gain justifies where each unit is judged by the weights of
    the others (:func:`gpjepa.effects._gain.kept_share`).

    Parameters
    ----------
    measured
        The effects.
    experts
        Predictions out of fold.
    prior
        Weights that stand in for fewer than ``min_units`` units, shape (n_experts,).
    towards
        Weights that they are shrunk towards; the prior by default.
    min_units
        Units needed.
    """
    prior = np.asarray(prior, float)
    towards = prior if towards is None else towards
    index = {unit: i for i, unit in enumerate(dict.fromkeys(experts.units))}
    n = len(index)
    if n < min_units or not n:
        return Stack(prior, n, 0.0)
    found = _normal_equations(measured, experts, len(prior))
    code = np.array([index[u] for u in experts.units])
    square, along, size = (_summed(each, code, n) for each in found)
    missed = size.sum() + towards @ (square.sum(0) @ towards - 2 * along.sum(0))
    weights, gained, changed = _ridge(square, along, towards, 0.0)
    # Fewer where the experts explain nearly everything.
    left = np.clip(1 - (2 * gained - changed) / max(missed, 1e-300), 0, 1)
    pseudo = _PSEUDO_UNITS * min(4 * left, 1.0)
    weights, gained, changed = _ridge(square, along, towards, pseudo)
    kept = 0.0
    if gained > 0:
        shared = _shared_noise(measured, experts, weights - towards, towards)
        kept = kept_share(gained, changed, shared)
    weights = towards + kept * (weights - towards)
    weights = np.where(weights < _NOTHING, 0, weights)
    return Stack(weights, n, kept)


def _ridge(
    square: np.ndarray, along: np.ndarray, towards: np.ndarray, pseudo: float
) -> tuple[np.ndarray, float, float]:
    """Weights, and what each unit gains, and changes by, with those of the others; summed."""
    n, all_square, all_along = len(square), square.sum(0), along.sum(0)
    rest = zip(square, along, strict=True)
    change = np.array(
        [
            _solve(all_square - s, all_along - a, pseudo / max(n - 1, 1), towards) - towards
            for s, a in rest
        ]
    )
    gained = float((change * (along - square @ towards)).sum())
    changed = float(np.einsum("uk,ukl,ul->", change, square, change))
    return _solve(all_square, all_along, pseudo / n, towards), gained, changed


def _summed(values: np.ndarray, code: np.ndarray, n: int) -> np.ndarray:
    """Sums of rows with one code, shape (n, ...)."""
    found = np.zeros((n, *values.shape[1:]))
    np.add.at(found, code, values)
    return found


def _solve(square: np.ndarray, along: np.ndarray, share: float, towards: np.ndarray) -> np.ndarray:
    """Bounded least squares, with pseudo-units for which ``towards`` is exact."""
    square, along = (1 + share) * square, along + share * square @ towards
    ridge = 1e-9 * np.trace(square) / len(square) + 1e-15
    root = np.linalg.cholesky(square + ridge * np.eye(len(square)))
    target = np.linalg.solve(root, along + ridge * towards)
    return np.clip(lsq_linear(root.T, target, (0, _MOST), method="bvls").x, 0, _MOST)


def _normal_equations(
    measured: Measured, experts: Experts, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row ⟨e_k, e_l⟩, and ⟨e_k, d⟩ and ⟨d, d⟩ without noise."""
    n, n_rows = len(experts.rows), len(measured.values)
    square, along, size = np.empty((n, k, k)), np.empty((n, k)), np.empty(n)
    for block in blocks(n):
        rows = np.asarray(experts.rows)[block]
        said = [experts.of(i) for i in block]
        hidden = measured.effects.targeted(rows)
        of_control = -measured.of_rows(rows)
        # Targeted genes do not count, so neither does their noise.
        own_noise = measured.totals[rows] - (hidden * measured.variance[rows]).sum(1)
        noise = measured.totals[n_rows:] - hidden @ measured.variance[n_rows:].T
        predicted = np.empty((len(rows), k, measured.values.shape[1]))
        for j in range(k):
            sums = measured.assemble([each[j] for each in said])
            predicted[:, j] = np.where(hidden, 0, measured.mean(sums))
            overlap = of_control * measured.on_strata(sums)
            along[block, j] = -(overlap * noise).sum(1) - sums.weight_of(rows) * own_noise
        square[block] = predicted @ predicted.transpose(0, 2, 1)
        effects = np.where(hidden, 0, measured.values[rows])
        along[block] += (predicted @ effects[:, :, None])[:, :, 0]
        size[block] = (effects**2).sum(1) - own_noise - (of_control**2 * noise).sum(1)
    return square, along, size


def _shared_noise(
    measured: Measured, experts: Experts, change: np.ndarray, towards: np.ndarray
) -> float:
    """Variance of what a change of weights gains from the controls that rows share."""
    shared = SharedNoise(measured.effects, measured.scale)
    for block in blocks(len(experts.rows)):
        shared.add(control_terms(measured, experts, block, change, towards))
    return shared.variance


def control_terms(
    measured: Measured, experts: Experts, block: range, change: np.ndarray, towards: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    r"""By how much the gain of a change of weights moves with the controls.

    Derivatives of each row's :math:`\langle c_a, d_a - e_a\rangle`: controls are part of the
    measured effects *d*, of what the stack says before the change, *e*, and of the change of
    that, *c*. As terms for :class:`gpjepa.effects._gain.SharedNoise`.
    """
    rows = np.asarray(experts.rows)[block]
    said = [experts.of(i) for i in block]
    scored = ~measured.effects.targeted(rows)
    changed = measured.assemble([stacked(each, change) for each in said])
    missed = measured.assemble(
        [
            [(1.0, measured.one(a)), *stacked(each, -towards)]
            for a, each in zip(rows, said, strict=True)
        ]
    )
    return [
        (measured.on_strata(changed), measured.mean(missed) * scored),
        (measured.on_strata(missed), measured.mean(changed) * scored),
    ]


def stack_residual(measured: Measured, experts: Experts, weights: np.ndarray) -> np.ndarray | None:
    """Mean squared error of the stacked prediction per gene, without sampling noise.

    Returns
    -------
    numpy.ndarray or None
        Shape (n_genes,); None if fewer than two units show it.
    """
    if len(set(experts.units)) < 2:
        return None
    total = count = np.zeros(measured.values.shape[1])
    for block in blocks(len(experts.rows)):
        rows = np.asarray(experts.rows)[block]
        apart = measured.assemble(
            [
                [(1.0, measured.one(a)), *stacked(experts.of(i), -weights)]
                for i, a in zip(block, rows, strict=True)
            ]
        )
        scored = ~measured.effects.targeted(rows)
        error = measured.mean(apart) ** 2 - measured.noise(apart)
        total = total + (error * scored).sum(0)
        count = count + scored.sum(0)
    return np.maximum(total / np.maximum(count, 1), 0)


def stacked(said: Sequence[Terms], weights: np.ndarray) -> Terms:
    """The weighted sum of what experts say."""
    return [
        (float(w) * factor, of)
        for w, terms in zip(weights, said, strict=True)
        if w
        for factor, of in terms
    ]
