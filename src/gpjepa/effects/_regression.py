"""Baselines that know something of targets besides their effects."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._baselines import Additive
from ._measured import Measured
from ._scales import Scale
from ._table import EffectTable
from ._weighted import Weights


@dataclass(frozen=True)
class Units:
    """What was perturbed alone in a context; all doses of a target are one unit.

    Attributes
    ----------
    targets
        Their names.
    rows
        Rows of the units in the table.
    unit
        Unit of each of these rows.
    share
        What each row counts for in the mean of its unit.
    at
        Unit of each name.
    perturbations
        One perturbation of each unit.
    """

    targets: list[str]
    rows: np.ndarray
    unit: np.ndarray
    share: np.ndarray
    at: dict[str, int]
    perturbations: list[Perturbation]

    def weights(self, of_units: np.ndarray) -> Weights:
        """Weights of measured effects from weights of units."""
        return Weights(self.rows, of_units[self.unit] * self.share)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean over the rows of each unit, shape (n_units, n_genes)."""
        found = np.zeros((len(self.targets), values.shape[1]))
        np.add.at(found, self.unit, self.share[:, None] * values[self.rows])
        return found


def single_units(measured: Measured, context: str) -> Units:
    """The targets perturbed alone in a context; all perturbations if there are only combinations."""
    rows = measured.alone.get(context) or measured.combined.get(context, [])
    names = ["+".join(measured.effects.rows[i][1].targets) for i in rows]
    targets = sorted(set(names))
    at = {t: i for i, t in enumerate(targets)}
    unit = np.array([at[t] for t in names], int)
    share = 1 / np.bincount(unit)[unit]
    one = {names[j]: measured.effects.rows[i][1] for j, i in enumerate(rows)}
    return Units(targets, np.array(rows, int), unit, share, at, [one[t] for t in targets])


def inverse_of(kernel: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """(K + λI)⁻¹, by Cholesky."""
    gram = np.array(kernel, order="F")
    gram[np.diag_indices_from(gram)] += ridge
    root, failed = lapack.dpotrf(gram, lower=1, overwrite_a=1)
    inverse, failed_too = lapack.dpotri(root, lower=1, overwrite_c=1)
    if failed or failed_too:
        raise np.linalg.LinAlgError("The kernel of the target features is not positive definite.")
    for i in range(len(inverse)):  # the upper half, which dpotri leaves
        inverse[i, i + 1 :] = inverse[i + 1 :, i]
    return inverse


def check_no_leak(name: str, source: np.ndarray, effects: EffectTable) -> None:
    """Refuse what was made of the cells whose effects it is to predict.

    Raises
    ------
    ValueError
        If source and table share cells: targets that are held out would be known by their own
        effects.
    """
    # Features in models of older versions name no cells.
    if isinstance(source, np.ndarray) and effects.shares_cells(source):
        raise ValueError(
            f"{name}: made from effects of the same cells as the training effects, so that "
            "held-out targets are known by their own effects. Take another data set."
        )


class _OfTargets(Additive):
    """Singles from features, each predicted by the units of its context; combinations add up."""

    def __init__(self, features: TargetFeatures, scale: Scale = "mean_log1p") -> None:
        super().__init__(scale)
        self.features = features

    def _fit(self) -> None:
        check_no_leak(self.features.name, self.features.source, self.effects_)
        self._units = {c: single_units(self.measured_, c) for c in self._in_context}

    def _single(self, single: Perturbation, context: str) -> Weights:
        if context not in self._units:
            raise ValueError(f"No perturbation was measured in context {context!r}.")
        if not self.features.covers(single.targets[0]):
            raise ValueError(
                f"{self.features.name}: nothing is known of {single.targets[0]!r}, so it cannot be "
                "predicted from these features."
            )
        return self._units[context].weights(self._of_units(single.targets[0], context))

    @abstractmethod
    def _of_units(self, target: str, context: str) -> np.ndarray:
        """Weight of each unit in the prediction of a target, shape (n_units,)."""


class KernelRidge(_OfTargets):
    """Kernel ridge regression of effects on target features (a Gaussian process's mean).

    Parameters
    ----------
    features
        Features of the targets; targets are alike by their cosine.
    ridge
        Noise variance over signal variance, λ in k (K + λI)⁻¹.
    scale
        Scale of the effects.
    """

    def __init__(
        self, features: TargetFeatures, ridge: float = 0.3, scale: Scale = "mean_log1p"
    ) -> None:
        super().__init__(features, scale)
        self.ridge = ridge

    def _fit(self) -> None:
        super()._fit()
        self._inverses = {
            c: inverse_of(self.features.kernel(u.targets, u.targets), self.ridge)
            for c, u in self._units.items()
        }

    def _of_units(self, target: str, context: str) -> np.ndarray:
        near = self.features.kernel([target], self._units[context].targets)[0]
        return near @ self._inverses[context]


class NearestPerturbation(_OfTargets):
    """The effect of the training target that is most alike by its features."""

    def _of_units(self, target: str, context: str) -> np.ndarray:
        alike = self.features.kernel([target], self._units[context].targets)[0]
        return np.eye(1, len(alike), int(np.argmax(alike)))[0]
