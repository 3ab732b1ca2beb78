"""A Gaussian process over perturbations, with the noise of every measured effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._denoise import Denoiser
from ._measured import blocks
from ._regression import inverse_of

_FIT_ROWS = 300
"""Rows of a context on which variances are fitted."""
_RANGE = (-12.0, 4.0)  # of the logarithm of variances, over the mean size of effects
_NOTHING = 1e-4
_MOST_KEPT = 2_000  # measured targets of which all covariances are kept


class Process:
    r"""Effects as a Gaussian process over perturbations.

    The effect of a perturbation is the sum of what its targets do, each with a part that all targets
    share, a part of its own and a part that is alike for similar targets; combinations add what they
    share, and what is special to one of them. With :math:`\Sigma` the sum of the covariances of
    these parts, times their variances, and *C* the noise of the effects, that of the controls
    included, a perturbation with covariances *k* to the measured ones is predicted by

    .. math:: k^\top (\Sigma + C)^{-1} D

    (Rasmussen and Williams 2006); callers put denoised effects in the place of *D*. Variances
    maximise the marginal likelihood over all contexts; genes count as in
    :class:`gpjepa.effects._denoise.Denoiser`.

    Parameters
    ----------
    denoiser
        Of the measured effects.
    features
        Kinds of target features.
    """

    def __init__(self, denoiser: Denoiser, features: Sequence[TargetFeatures]) -> None:
        self.denoiser, self.measured = denoiser, denoiser.measured
        self.features = tuple(features)
        self._perturbations = {
            c: [self.measured.effects.rows[i][1] for i in rows] for c, rows in denoiser.rows.items()
        }
        self._place = {c: {p: i for i, p in enumerate(ps)} for c, ps in self._perturbations.items()}
        self._special = {c: _special(p) for c, p in self._perturbations.items()}
        # What no context has cannot be fitted.
        several = any(len(p.targets) > 1 for ps in self._perturbations.values() for p in ps)
        self._combinations = several
        self.variances = self._fit()
        self._onto: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._inverses: dict[str, np.ndarray] = {}
        self._on_controls: dict[str, np.ndarray] = {}

    def _of_targets(self, targets: Sequence[str], others: Sequence[str]) -> Iterator[np.ndarray]:
        """Covariances of the parts of what targets do, shape (n_targets, n_others)."""
        shape = len(targets), len(others)
        yield np.ones(shape)
        at = {t: i for i, t in enumerate(others)}
        same = np.zeros(shape)
        for i, target in enumerate(targets):
            if target in at:
                same[i, at[target]] = 1
        yield same
        for features in self.features:
            yield features.kernel(targets, others)

    def _covariance(
        self, left: Sequence[Perturbation], right: Sequence[Perturbation]
    ) -> np.ndarray:
        """Of what different perturbations share, shape (n_left, n_right)."""
        one, targets = _incidence(left)
        other, others = _incidence(right)
        found = one @ (other @ self._kernel(targets, others).T).T
        return found + self._shared * np.outer(one.sum(1).A1 > 1, other.sum(1).A1 > 1)

    def _kernel(self, targets: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """Covariance of what targets do, shape (n_targets, n_others)."""
        kernel = np.zeros((len(targets), len(others)))
        for variance, part in zip(self.variances, self._of_targets(targets, others), strict=False):
            if variance:
                kernel += variance * part
        return kernel

    @cached_property
    def _kept(self) -> tuple[dict[str, int], np.ndarray] | None:
        """Places of the measured targets, and the covariance of what they do; of too many, none."""
        targets = sorted({t for ps in self._perturbations.values() for p in ps for t in p.targets})
        if len(targets) > _MOST_KEPT:
            return None
        return {t: i for i, t in enumerate(targets)}, self._kernel(targets, targets)

    def _of_known(
        self, perturbations: Sequence[Perturbation]
    ) -> tuple[dict[str, int], np.ndarray, list[list[int]]] | None:
        """What is kept, and places of the targets of each; None if one of them is not."""
        if self._kept is None or not all(
            t in self._kept[0] for p in perturbations for t in p.targets
        ):
            return None
        return *self._kept, [[self._kept[0][t] for t in p.targets] for p in perturbations]

    def _parts(self, context: str, rows: np.ndarray) -> list[np.ndarray]:
        """Covariances of all parts of the effects at some places of a context."""
        mine = [self._perturbations[context][i] for i in rows]
        one, targets = _incidence(mine)
        parts = [one @ (one @ part).T for part in self._of_targets(targets, targets)]
        if self._combinations:
            several = one.sum(1).A1 > 1
            parts.append(np.outer(several, several).astype(float))
        return [*parts, np.diag(self._special[context][rows])]

    def _fit(self) -> np.ndarray:
        """Variances of the parts."""
        blocks = []
        for context, rows in self.denoiser.rows.items():
            few = _some(self._perturbations[context])
            effects = self.measured.values[rows[few]]
            square = (effects * self.denoiser.of_genes(context)[0]) @ effects.T
            blocks.append((self._parts(context, few), square, self.denoiser.noise(context, few)))
        if not blocks:
            return np.zeros(0)
        size = np.mean(
            [max(np.trace(s - c) / len(s), 1e-3 * np.trace(c) / len(c)) for _, s, c in blocks]
        )

        def loss(log: np.ndarray) -> tuple[float, np.ndarray]:
            variances = size * np.exp(log)
            value, gradient = 0.0, np.zeros(len(log))
            for parts, square, noise in blocks:
                whole = noise + np.tensordot(variances, parts, 1)
                inverse = inverse_of(whole)
                value += np.linalg.slogdet(whole)[1] + (inverse * square).sum()
                slope = inverse - inverse @ square @ inverse
                gradient += variances * [(slope * part).sum() for part in parts]
            return value, gradient

        start = np.full(len(blocks[0][0]), -2.0)
        bounds = [_RANGE] * len(start)
        found = np.exp(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x)
        return size * np.where(found < _NOTHING, 0, found)

    def near(self, perturbations: Sequence[Perturbation], context: str) -> np.ndarray:
        """Covariance of perturbations that were not measured with those that were, (n, n_rows)."""
        measured = self._perturbations[context]
        known = self._of_known(perturbations)
        if known is None:
            return self._covariance(perturbations, measured)
        at, kernel, places = known
        if context not in self._onto:
            other, targets = _incidence(measured)
            onto = (other @ kernel[:, [at[t] for t in targets]].T).T
            self._onto[context] = onto, self._shared * (other.sum(1).A1 > 1)
        onto, of_combinations = self._onto[context]
        found = [onto[of].sum(0) + (len(of) > 1) * of_combinations for of in places]
        return np.reshape(found, (len(places), len(measured)))

    def _own(self, perturbations: Sequence[Perturbation]) -> np.ndarray:
        """Variance of what perturbations share with others, shape (n,)."""
        known = self._of_known(perturbations)
        if known is None:
            return np.diag(self._covariance(perturbations, perturbations))
        _, kernel, places = known
        found = [kernel[np.ix_(of, of)].sum() + (len(of) > 1) * self._shared for of in places]
        return np.array(found)

    @property
    def _shared(self) -> float:
        """Variance of what combinations share."""
        return float(self.variances[-2]) if self._combinations else 0.0

    def left(
        self, perturbations: Sequence[Perturbation], context: str, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Variance of effects before and after what is measured is known, summed over genes.

        Parameters
        ----------
        perturbations
            Not measured, or left out.
        context
            Whose measured effects.
        weights
            Theirs in the predictions, shape (n, n_rows).

        Returns
        -------
        tuple of numpy.ndarray
            Shape (n,) each, in the units of :meth:`gpjepa.effects._denoise.Denoiser.of_genes`.
        """
        whole = np.zeros(len(perturbations))
        for block in blocks(len(perturbations)):
            mine = perturbations[block.start : block.stop]
            whole[block] = self._own(mine)
        known = (weights * self.near(perturbations, context)).sum(1)
        # Effects smaller than what the noise of a measured one may hide are not seen.
        least = self.denoiser.undetectable(context)
        n_targets = np.array([len(p.targets) for p in perturbations])
        return whole, np.maximum(whole - known, n_targets * least)

    def together(self, perturbations: Sequence[Perturbation], context: str) -> np.ndarray:
        """Covariance of what is unknown of perturbations when the measured effects are known, (n, n)."""
        prior = self._covariance(perturbations, perturbations)
        place, special = self._place[context], self._special[context]
        measured = {p.targets for p in place}
        # As measured; of others, whatever else is asked about.
        can_differ = [
            special[place[p]] if p in place else len(p.targets) > 1 or p.targets in measured
            for p in perturbations
        ]
        own = self.variances[-1] * np.array(can_differ, float)
        prior[np.diag_indices_from(prior)] += own
        near = self.near(perturbations, context)
        for i, p in enumerate(perturbations):
            if p in place:
                near[i, place[p]] += own[i]
        return prior - near @ self.inverse(context) @ near.T

    def shares(self) -> np.ndarray:
        """Share of each kind of features in what similar targets, and all, have in common."""
        each = self.variances[2 : 2 + len(self.features)]
        return each / max(self.variances[0] + each.sum(), 1e-300)

    def inverse(self, context: str) -> np.ndarray:
        """(Σ + C)⁻¹ of the measured effects of a context."""
        if context not in self._inverses:
            mine = self._perturbations[context]
            whole = self.denoiser.noise(context, np.arange(len(mine)))
            whole += self._covariance(mine, mine)
            whole[np.diag_indices_from(whole)] += self.variances[-1] * self._special[context]
            self._inverses[context] = inverse_of(whole)
        return self._inverses[context]

    def weights(self, perturbations: Sequence[Perturbation], context: str) -> np.ndarray:
        """Weights of the measured effects of a context in predictions, shape (n, n_rows)."""
        return self.near(perturbations, context) @ self.inverse(context)

    def without(self, perturbation: Perturbation, context: str, out: np.ndarray) -> np.ndarray:
        """As :meth:`weights`, as if the rows at these places had not been measured, (n_rows,).

        With G = (Σ + C)⁻¹, weights *w* of all rows are w - w_o G_oo⁻¹ G_o without the rows *o*.
        """
        inverse = self.inverse(context)
        place = self._place[context].get(perturbation)
        if place is None or place not in out:
            near = self.near([perturbation], context)[0]
            near[out] = 0
            return _downdated(near @ inverse, inverse, out)
        # What is said of an effect: -G_o / G_oo; what is said of its noise is no part of that.
        own = np.linalg.solve(inverse[np.ix_(out, out)], inverse[out])
        found = -own[list(out).index(place)]
        found[out] = 0
        of_controls, variance = self.denoiser.controls(context)
        if context not in self._on_controls:
            self._on_controls[context] = of_controls.T @ inverse
        shared = of_controls[place] * variance
        noise = shared @ (self._on_controls[context] - of_controls[out].T @ inverse[out])
        return found - _downdated(noise, inverse, out)


def _downdated(weights: np.ndarray, inverse: np.ndarray, out: np.ndarray) -> np.ndarray:
    if len(out):
        weights = weights - np.linalg.solve(inverse[np.ix_(out, out)], weights[out]) @ inverse[out]
        weights[out] = 0
    return weights


def _incidence(perturbations: Sequence[Perturbation]) -> tuple[sp.csr_matrix, list[str]]:
    """Which targets each perturbation has, shape (n, n_targets), and the targets."""
    targets = sorted({t for p in perturbations for t in p.targets})
    at = {t: i for i, t in enumerate(targets)}
    pairs = [(i, at[t]) for i, p in enumerate(perturbations) for t in p.targets]
    rows, columns = np.array(pairs, int).reshape(-1, 2).T
    shape = (len(perturbations), len(targets))
    return sp.csr_matrix((np.ones(len(pairs)), (rows, columns)), shape=shape), targets


def _special(perturbations: Sequence[Perturbation]) -> np.ndarray:
    """Whether a perturbation can differ from what its targets do: combinations, and doses."""
    doses: dict[tuple[str, ...], int] = {}
    for p in perturbations:
        doses[p.targets] = doses.get(p.targets, 0) + 1
    return np.array([float(len(p.targets) > 1 or doses[p.targets] > 1) for p in perturbations])


def _some(perturbations: Sequence[Perturbation]) -> np.ndarray:
    """Places of enough perturbations to fit on: combinations, with their singles, and others."""
    n = len(perturbations)
    if n <= _FIT_ROWS:
        return np.arange(n)

    def spread(places: list[int], k: int) -> list[int]:
        return [places[i] for i in np.linspace(0, len(places) - 1, min(k, len(places))).astype(int)]

    place = {p: i for i, p in enumerate(perturbations)}
    combined = [i for i, p in enumerate(perturbations) if len(p.targets) > 1]
    chosen = set(spread(combined, _FIT_ROWS // 3))
    chosen |= {place[s] for i in list(chosen) for s in perturbations[i].singles if s in place}
    rest = [i for i in range(n) if i not in chosen]
    return np.array(sorted(chosen | set(spread(rest, max(_FIT_ROWS - len(chosen), 0)))))
