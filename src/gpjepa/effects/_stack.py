"""Shrinkage and stacking of predictions that are weighted sums of measured effects.

The noise that a prediction and a measured effect share is the overlap of their weights on profiles:
for two effects of one context, that of the control profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from gpjepa.splits import MIN_UNITS

from ._gain import SharedNoise, kept_share
from ._measured import Measured, blocks
from ._weighted import Terms, Weights, added

_NOTHING = 1e-4  # a weight below this says nothing
_STANDS_OUT = 2.0  # standard deviations


@dataclass(frozen=True)
class Shrunken:
    """Measured effects after shrinkage, one row per effect.

    Attributes
    ----------
    factor
        Share of the distance to the chosen target that is kept, shape (n,).
    target
        Index of the target chosen for all of them.
    left
        Weights on the profiles' variances of what the factor leaves unknown, of each.
    bias
        What the factor is seen to take off each effect, gene by gene, beyond what its noise
        explains, squared.
    """

    factor: np.ndarray
    target: int
    left: list[Weights]
    bias: list[Weights]


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
    chosen = 0
    if len(targets) > 1:
        risks = [sum(s.risk for s in _steps(measured, rows, target)) for target in targets]
        chosen = int(np.argmin(risks))
    steps = list(_steps(measured, rows, targets[chosen], finish=True))
    return Shrunken(
        np.concatenate([s.factor for s in steps]) if steps else np.zeros(0),
        chosen,
        [w for s in steps for w in s.left],
        [w for s in steps for w in s.bias],
    )


@dataclass(frozen=True)
class _Step:
    """A block of effects, shrunk towards one target; its last two parts only where asked for."""

    factor: np.ndarray
    risk: float
    left: list[Weights]
    bias: list[Weights]


def _steps(
    measured: Measured, rows: Sequence[int], target: Callable[[int], Terms], finish: bool = False
) -> Iterator[_Step]:
    n_rows = len(measured.values)
    variance, totals = measured.variance, measured.totals
    for block in blocks(len(rows)):
        mine = np.asarray(rows)[block]
        apart = measured.assemble(
            [
                [(1.0, measured.one(a)), *((-f, w) for f, w in target(j))]
                for j, a in zip(block, mine, strict=True)
            ]
        )
        distance = measured.mean(apart)
        # Weights on the profiles that effect and distance have in common: its own, its controls'.
        of_control = -measured.of_rows(mine)
        own = apart.weight_of(mine)
        controls = of_control * measured.on_strata(apart)
        shared = own * totals[mine] + controls @ totals[n_rows:]
        noise = totals[mine] + of_control**2 @ totals[n_rows:]
        square = np.maximum((distance**2).sum(1), 1e-12)
        factor = np.clip(1 - shared / square, 0, 1)
        risk = np.where(square > shared, noise - shared**2 / square, square - 2 * shared + noise)
        if not finish:
            yield _Step(factor, float(risk.sum()), [], [])
            continue
        own, controls = np.maximum(own, 0), np.maximum(controls, 0)
        common = own[:, None] * variance[mine] + controls @ variance[n_rows:]
        # A factor whose truth is 0 still comes out as large as its own sampling error.
        least = np.sqrt(2 * (common**2).sum(1))
        known = np.minimum(least / np.maximum(shared, 1e-12), 1)
        open_ = np.maximum(factor, known) - factor**2
        taken = (1 - factor[:, None]) ** 2
        explained = taken * measured.noise(apart) + open_[:, None] * common
        # Only what stands out: the positive part of noise would add up to a bias everywhere.
        strong = taken * distance**2 > _STANDS_OUT**2 * explained
        bias = np.where(strong, taken * distance**2 - explained, 0)
        left = [
            added([Weights(np.array([a]), np.array([o])), Weights.of(c, n_rows)]).times(float(u))
            for a, o, c, u in zip(mine, own, controls, open_, strict=True)
        ]
        yield _Step(factor, float(risk.sum()), left, [Weights.of(b) for b in bias])


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
    r"""Non-negative stacking, freed of shared noise, as far as it gains.

    Wolpert's (1992) and Breiman's (1996) stacking minimises
    :math:`\sum_a \lVert d_a - \sum_k w_k e_k(a)\rVert^2` over :math:`w \ge 0`. Of
    :math:`\langle e_k, d_a\rangle` the expected sampling noise that both share is taken off; of
    :math:`\langle e_k, e_l\rangle` nothing is: that noise is there at prediction too. The weights
    go as far from ``towards`` as their gain justifies where each unit is judged by the weights of
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
    square, along = _normal_equations(measured, experts, len(prior))
    code = np.array([index[u] for u in experts.units])
    square, along = _summed(square, code, n), _summed(along, code, n)
    all_square, all_along = square.sum(0), along.sum(0)
    weights = _solve(all_square, all_along)
    change = np.array(
        [
            _solve(all_square - unit_square, all_along - unit_along) - towards
            for unit_square, unit_along in zip(square, along, strict=True)
        ]
    )
    gained = float((change * (along - square @ towards)).sum())
    kept = 0.0
    if gained > 0:
        changed = float(np.einsum("uk,ukl,ul->", change, square, change))
        shared = _shared_noise(measured, experts, weights - towards, towards)
        kept = kept_share(gained, changed, shared)
    weights = towards + kept * (weights - towards)
    weights = np.where(weights < _NOTHING, 0, weights)
    return Stack(weights, n, kept)


def _summed(values: np.ndarray, code: np.ndarray, n: int) -> np.ndarray:
    """Sums of rows with one code, shape (n, ...)."""
    found = np.zeros((n, *values.shape[1:]))
    np.add.at(found, code, values)
    return found


def _solve(square: np.ndarray, along: np.ndarray) -> np.ndarray:
    """Non-negative least squares from its normal equations."""
    ridge = 1e-9 * np.trace(square) / len(square) + 1e-15
    root = np.linalg.cholesky(square + ridge * np.eye(len(square)))
    return nnls(root.T, np.linalg.solve(root, along))[0]


def _normal_equations(
    measured: Measured, experts: Experts, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per row ⟨e_k, e_l⟩, and ⟨e_k, d⟩ without shared noise."""
    n, n_rows = len(experts.rows), len(measured.values)
    square, along = np.empty((n, k, k)), np.empty((n, k))
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
        along[block] += (predicted @ measured.values[rows][:, :, None])[:, :, 0]
    return square, along


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
