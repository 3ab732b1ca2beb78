"""Baselines that know something of targets besides their effects."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import lapack

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._baselines import Additive, WeightedBaseline
from ._measured import Measured
from ._scales import Scale
from ._stack import Experts, fit_stack, stack_residual
from ._table import EffectTable
from ._weighted import Terms, Weights, added, once

RIDGES = (0.1, 0.3, 1.0)
"""Noise over signal in kernel ridge regression; stacking chooses among them."""


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
    """

    targets: list[str]
    rows: np.ndarray
    unit: np.ndarray
    share: np.ndarray
    at: dict[str, int]

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
    return Units(targets, np.array(rows, int), unit, 1 / np.bincount(unit)[unit], at)


class Kernel:
    """Kernel ridge regression of the units of a context on one kind of features, at several λ.

    One factorisation per λ serves every prediction: with G = (K + λI)⁻¹, a target with similarities
    k to the units is predicted with weights k G; a unit *a* without itself with -G_ab / G_aa (Allen
    1974; K G = I - λG); and any target without some units by the inverse of a block.

    Parameters
    ----------
    features
        Features of the targets.
    units
        The units.
    ridges
        Values of λ.
    """

    def __init__(self, features: TargetFeatures, units: Units, ridges: Sequence[float]) -> None:
        self.features, self.targets, self.ridges = features, units.targets, tuple(ridges)
        self.at = units.at
        kernel = features.kernel(self.targets, self.targets)
        self.own = np.diag(kernel).copy()
        self.inverses = [_inverse(kernel, ridge) for ridge in self.ridges]

    def near(self, targets: Sequence[str]) -> np.ndarray:
        """Similarities k of targets to the units, shape (n_targets, n_units)."""
        return self.features.kernel(targets, self.targets)

    def weights(self, near: np.ndarray) -> list[np.ndarray]:
        """Weights of the units in the prediction of each target, per λ (n_targets, n_units)."""
        return [near @ inverse for inverse in self.inverses]

    def leave_one_out(self, unit: int) -> list[np.ndarray]:
        """Weights of the units in the prediction of one of them without it, per λ (n_units,)."""
        found = []
        for inverse in self.inverses:
            weights = inverse[unit] / -inverse[unit, unit]
            weights[unit] = 0
            found.append(weights)
        return found

    def without(self, target: str, units: Sequence[int]) -> list[np.ndarray]:
        """Weights of the units in the prediction of a target as if some were not there, per λ."""
        out = list(units)
        if [self.at.get(target)] == out:
            return self.leave_one_out(out[0])
        near = self.near([target])[0]
        found = []
        for ridge, inverse in zip(self.ridges, self.inverses, strict=True):
            if (unit := self.at.get(target)) is None:
                weights = near @ inverse
            else:
                weights = -ridge * inverse[unit]
                weights[unit] += 1
            weights = weights - near[out] @ inverse[out]
            weights -= np.linalg.solve(inverse[np.ix_(out, out)], weights[out]) @ inverse[out]
            weights[out] = 0
            found.append(weights)
        return found

    def left_out(self) -> np.ndarray:
        """Variance that is left of each unit by the others, 1 - k G k, shape (n_ridges, n_units).

        The similarity of a unit to itself may be 0.
        """
        return np.array(
            [
                1 / np.diag(inverse) - ridge + 1 - self.own
                for ridge, inverse in zip(self.ridges, self.inverses, strict=True)
            ]
        )


def _inverse(kernel: np.ndarray, ridge: float) -> np.ndarray:
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
        self._kernels = {c: Kernel(self.features, u, [self.ridge]) for c, u in self._units.items()}

    def _of_units(self, target: str, context: str) -> np.ndarray:
        kernel = self._kernels[context]
        return kernel.weights(kernel.near([target]))[0][0]


class NearestPerturbation(_OfTargets):
    """The effect of the training target that is most alike by its features."""

    def _of_units(self, target: str, context: str) -> np.ndarray:
        alike = self.features.kernel([target], self._units[context].targets)[0]
        return np.eye(1, len(alike), int(np.argmax(alike)))[0]


@dataclass(frozen=True)
class NeverPerturbed:
    """What experts say of a target never perturbed in a context.

    Attributes
    ----------
    experts
        Names, weights, and what each says, of the experts that have a weight.
    kriging
        Variance left by the kernels over what they leave on average (kriging, or GP, variance): 1
        where no kernel has a weight, smaller near measured targets.
    """

    experts: list[tuple[str, float, Weights]]
    kriging: float

    @property
    def weights(self) -> Weights:
        """The weighted sum, each effect once."""
        return once(added(of.times(w) for _, w, of in self.experts))


class UnseenTargets(WeightedBaseline):
    """Targets never perturbed: the mean effect and kernel ridge over target features, stacked.

    The experts are the mean effect of the context's targets and, for each kind of features, kernel
    ridge at several λ, weighed on targets left out.

    Parameters
    ----------
    features
        Kinds of target features; none leaves the mean effect times its slope.
    ridges
        Values of λ.
    scale
        Scale of the effects.
    """

    def __init__(
        self,
        features: Sequence[TargetFeatures] = (),
        ridges: Sequence[float] = RIDGES,
        scale: Scale = "mean_log1p",
    ) -> None:
        super().__init__(scale)
        self.features, self.ridges = tuple(features), tuple(ridges)
        self.experts = ["mean effect"] + [
            f"{f.name}, kernel ridge λ={r:g}" for f in self.features for r in self.ridges
        ]

    def _fit(self) -> None:
        for features in self.features:
            check_no_leak(features.name, features.source, self.effects_)
        self._units = {c: single_units(self.measured_, c) for c in self._in_context}
        self._kernels = {
            c: [Kernel(f, u, self.ridges) for f in self.features] for c, u in self._units.items()
        }
        prior = np.zeros(len(self.experts))
        prior[0] = self._prior()
        self._of_mean = self._left_out(1, lambda target: True)
        self.mean_stack_ = fit_stack(self.measured_, self._of_mean, prior[:1], np.zeros(1))
        # Features must earn their weight over the mean effect alone.
        mean_alone = np.append(self.mean_stack_.weights, np.zeros(len(self.experts) - 1))
        self._of_all = self._left_out(len(prior), self.covers)
        self.stack_ = fit_stack(self.measured_, self._of_all, mean_alone, mean_alone)

    @cached_property
    def residual_(self) -> np.ndarray | None:
        """Mean squared error of targets with features, without noise, shape (n_genes,)."""
        return stack_residual(self.measured_, self._of_all, self.stack_.weights)

    @cached_property
    def mean_residual_(self) -> np.ndarray | None:
        """As ``residual_``, of the mean effect alone."""
        return stack_residual(self.measured_, self._of_mean, self.mean_stack_.weights)

    @cached_property
    def _kriging_mean(self) -> float:
        known = [k for c in self._units for k in self._left_out_kriging(c)]
        return float(np.mean(known)) if known else 1.0

    def covers(self, target: str) -> bool:
        """Whether any of the features knows the target."""
        return any(f.covers(target) for f in self.features)

    def _prior(self) -> float:
        """Half of what is left of the mean effect when its noise is taken off."""
        if not self._units:
            return 0.0
        means = [[(1.0, self.mean_of(c))] for c in self._units]
        sums = self.measured_.assemble(means)
        square = (self.measured_.mean(sums) ** 2).sum()
        noise = self.measured_.noise(sums).sum()
        return 0.5 * max(0.0, 1 - noise / square) if square > 0 else 0.0

    def mean_of(self, context: str) -> Weights:
        """The mean effect of the units of a context."""
        return self._units[context].weights(self._mean_without(context, []))

    def _mean_without(self, context: str, out: Sequence[int]) -> np.ndarray:
        weights = np.ones(len(self._units[context].targets))
        weights[out] = 0
        return weights / max(weights.sum(), 1)

    def leave_one_out(self, context: str, unit: int) -> list[Weights]:
        """What each expert says of a unit without it."""
        found = [self._mean_without(context, [unit])]
        for kernel in self._kernels[context]:
            found += kernel.leave_one_out(unit)
        return [self._units[context].weights(w) for w in found]

    def _left_out(self, n_experts: int, counts: Callable[[str], bool]) -> Experts:
        """What the first experts say of each target that counts, without it."""
        rows, names, unit = [], [], []
        for context, units in self._units.items():
            if len(units.targets) < 2:
                continue
            chosen = [j for j, u in enumerate(units.unit) if counts(units.targets[u])]
            rows += units.rows[chosen].tolist()
            names += [units.targets[units.unit[j]] for j in chosen]
            unit += [(context, int(units.unit[j])) for j in chosen]

        def of(i: int) -> list[Terms]:
            if n_experts == 1:
                context, out = unit[i]
                mean = self._mean_without(context, [out])
                return [[(1.0, self._units[context].weights(mean))]]
            return [[(1.0, w)] for w in self.leave_one_out(*unit[i])]

        return Experts(rows, names, of)

    def of_targets(self, targets: Sequence[str], context: str) -> list[NeverPerturbed]:
        """What the experts say of targets in a context where something was measured."""
        units = self._units[context]
        per_expert = [np.ones((len(targets), len(units.targets))) / max(len(units.targets), 1)]
        left = [np.ones((1, len(targets)))]
        used = bool(self.stack_.weights[1:].any())
        for kernel in self._kernels[context] if used else ():
            near = kernel.near(targets)
            weights = kernel.weights(near)
            per_expert += weights
            left.append(np.array([1 - (w * near).sum(1) for w in weights]))
        kriging = np.average(
            np.concatenate(left), axis=0, weights=self.stack_.weights if used else [1.0]
        )
        found = []
        for i, target in enumerate(targets):
            covered = self.covers(target)
            stack = self.stack_.weights if covered else self.mean_stack_.weights
            experts = [
                (name, float(w), units.weights(each[i]))
                for name, w, each in zip(self.experts, stack, per_expert, strict=False)
                if w
            ]
            open_ = float(kriging[i]) / self._kriging_mean if covered and used else 1.0
            found.append(NeverPerturbed(experts, open_))
        return found

    def without(self, target: str, context: str, out: Sequence[str]) -> Weights:
        """What is said of a target if some, itself among them, had never been measured."""
        units = self._units[context]
        hidden = [units.at[t] for t in out if t in units.at]
        if not hidden:
            return self.of_targets([target], context)[0].weights
        stack = self.stack_.weights if self.covers(target) else self.mean_stack_.weights
        whole = stack[0] * self._mean_without(context, hidden)
        if stack[1:].any():
            found = [w for k in self._kernels[context] for w in k.without(target, hidden)]
            whole = whole + stack[1:] @ np.array(found)
        return units.weights(whole)

    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        contexts = [context] if context in self._units else list(self._units)
        found = [
            each.weights.times(1 / len(contexts))
            for c in contexts
            for each in self.of_targets([s.targets[0] for s in perturbation.singles], c)
        ]
        return once(added(found))

    def _left_out_kriging(self, context: str) -> list[float]:
        weights = self.stack_.weights
        if not weights[1:].any():
            return []
        units = self._units[context]
        left = [np.ones((1, len(units.targets))), *(k.left_out() for k in self._kernels[context])]
        mean = np.average(np.concatenate(left), axis=0, weights=weights)
        return list(mean[[self.covers(t) for t in units.targets]])


class ShrunkenMean(UnseenTargets):
    """The mean effect of the targets of a context times a slope, that of each on the others' mean.

    Without the noise of the controls, which all effects of a context share; or the slope would be
    near 1 where nothing but that noise is common to them.

    Parameters
    ----------
    scale
        Scale of the effects.
    """

    def __init__(self, scale: Scale = "mean_log1p") -> None:
        super().__init__((), scale=scale)
