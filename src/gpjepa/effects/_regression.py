"""Baselines that know something of targets besides their effects."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._baselines import Additive, Baseline, WeightedBaseline
from ._scales import Scale
from ._stack import Experts, Stack, fit_stack, stack_residual
from ._table import EffectTable

RIDGES = (0.1, 0.3, 1.0)
"""Noise over signal in kernel ridge regression; stacking chooses among them."""


@dataclass(frozen=True)
class Units:
    """What was perturbed alone in a context; all doses of a target are one unit.

    Attributes
    ----------
    targets
        Their names.
    mean
        Weights of measured effects in the mean effect of each, shape (n_units, n_rows).
    rows
        Rows of the units in the table.
    unit
        Unit of each of these rows.
    """

    targets: list[str]
    mean: np.ndarray
    rows: list[int]
    unit: np.ndarray


def single_units(effects: EffectTable, context: str) -> Units:
    """The targets perturbed alone in a context; all perturbations if there are only combinations."""
    mine = [i for i, (c, _) in enumerate(effects.rows) if c == context]
    rows = [i for i in mine if len(effects.rows[i][1].targets) == 1] or mine
    names = ["+".join(effects.rows[i][1].targets) for i in rows]
    targets = sorted(set(names))
    unit = np.array([targets.index(t) for t in names], int)
    mean = np.zeros((len(targets), len(effects.rows)))
    mean[unit, rows] = 1
    return Units(targets, mean / np.maximum(mean.sum(1, keepdims=True), 1), rows, unit)


def kernel_weights(kernel: np.ndarray, to_units: np.ndarray, ridge: float) -> np.ndarray:
    """Weights of the units in kernel ridge predictions k (K + λI)⁻¹, shape (n, n_units)."""
    gram = kernel + ridge * np.eye(len(kernel))
    return np.linalg.solve(gram, to_units.T).T


def kernel_leave_one_out(kernel: np.ndarray, ridge: float) -> np.ndarray:
    """Weights of the units in the prediction of each without itself, shape (n_units, n_units).

    With the hat matrix H of kernel ridge the prediction of *a* without *a* is
    (H d - H_aa d_a) / (1 - H_aa) (Allen 1974), so that nothing is refitted.
    """
    hat = kernel_weights(kernel, kernel, ridge)
    own = np.diag(hat)
    return (hat - np.diag(own)) / (1 - own)[:, None]


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
        self._units = {c: single_units(self.effects_, c) for c in self._in_context}

    def _single(self, single: Perturbation, context: str) -> np.ndarray:
        if context not in self._units:
            raise ValueError(f"No perturbation was measured in context {context!r}.")
        if not self.features.covers(single.targets[0]):
            raise ValueError(
                f"{self.features.name}: nothing is known of {single.targets[0]!r}, so it cannot be "
                "predicted from these features."
            )
        units = self._units[context]
        return self._of_units(single.targets[0], units) @ units.mean

    @abstractmethod
    def _of_units(self, target: str, units: Units) -> np.ndarray:
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

    def _of_units(self, target: str, units: Units) -> np.ndarray:
        kernel = self.features.kernel(units.targets, units.targets)
        return kernel_weights(kernel, self.features.kernel([target], units.targets), self.ridge)[0]


class UnseenTargets(WeightedBaseline):
    """Targets never perturbed: the mean effect and kernel ridge over target features, stacked.

    The experts are the mean effect of the context's targets and, for each kind of features, kernel
    ridge at several λ; :func:`gpjepa.effects.fit_stack` weighs them on targets left out.

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
        self._units = {c: single_units(self.effects_, c) for c in self._in_context}
        self._kernels = {
            c: [f.kernel(u.targets, u.targets) for f in self.features]
            for c, u in self._units.items()
        }
        self.out_of_fold_ = {c: self._leave_one_out(c) for c in self._units}
        prior = np.zeros(len(self.experts))
        prior[0] = self._prior()
        self.mean_stack_, self.mean_residual_ = self._stack(prior[:1], np.zeros(1), lambda t: True)
        # Features must earn their weight over the mean effect alone.
        mean_alone = np.append(self.mean_stack_.weights, np.zeros(len(self.experts) - 1))
        self.stack_, self.residual_ = self._stack(mean_alone, mean_alone, self.covers)
        known = [k for c in self._units for k in self._left_out_kriging(c)]
        self._kriging_mean = float(np.mean(known)) if known else 1.0

    def covers(self, target: str) -> bool:
        """Whether any of the features knows the target."""
        return any(f.covers(target) for f in self.features)

    def _prior(self) -> float:
        """Half of what is left of the mean effect when its noise is taken off."""
        if not self._units:
            return 0.0
        weights = np.stack([u.mean.mean(0) for u in self._units.values()])
        square = ((weights @ self.effects_.effect[self.scale]) ** 2).sum()
        variance = self.effects_.profile_variance(self.scale).sum(1)
        noise = (self.effects_.on_profiles(weights) ** 2 @ variance).sum()
        return 0.5 * max(0.0, 1 - noise / square) if square > 0 else 0.0

    def _leave_one_out(self, context: str) -> np.ndarray:
        """Weights of the effects in each expert's prediction of each unit without it.

        Shape (n_experts, n_units, n_rows).
        """
        units = self._units[context]
        n = len(units.targets)
        if n < 2:
            return np.zeros((len(self.experts), n, len(self._row)))
        found = [(1 - np.eye(n)) / (n - 1)]
        for kernel in self._kernels[context]:
            found += [kernel_leave_one_out(kernel, ridge) for ridge in self.ridges]
        return np.stack(found) @ units.mean

    def _stack(
        self, prior: np.ndarray, towards: np.ndarray, counts: Callable[[str], bool]
    ) -> tuple[Stack, np.ndarray | None]:
        k = len(prior)
        rows, names, weights = [], [], [np.zeros((k, 0, len(self._row)))]
        for context, units in self._units.items():
            if len(units.targets) < 2:
                continue
            chosen = [j for j, u in enumerate(units.unit) if counts(units.targets[u])]
            rows += [units.rows[j] for j in chosen]
            names += [units.targets[units.unit[j]] for j in chosen]
            weights.append(self.out_of_fold_[context][:k, units.unit[chosen]])
        experts = Experts(rows, np.concatenate(weights, 1), names)
        stack = fit_stack(self.effects_, self.scale, experts, prior, towards)
        return stack, stack_residual(self.effects_, self.scale, experts, stack.weights)

    def of_target(
        self, target: str, context: str, without: Sequence[str] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the effects in each expert's prediction, and the experts' weights.

        Parameters
        ----------
        target
            What to predict.
        context
            Where.
        without
            Targets to predict without.

        Returns
        -------
        tuple of numpy.ndarray
            Shapes (n_experts, n_rows) and (n_experts,).
        """
        units = self._units[context]
        keep = np.array([t not in without for t in units.targets])
        found = [np.ones(keep.sum()) / max(keep.sum(), 1)]
        stack = self.mean_stack_
        if self.covers(target):
            stack = self.stack_
            for features, kernel in zip(self.features, self._kernels[context], strict=True):
                near = features.kernel([target], units.targets)[:, keep]
                gram = kernel[np.ix_(keep, keep)]
                found += [kernel_weights(gram, near, ridge)[0] for ridge in self.ridges]
        return np.stack(found) @ units.mean[keep], stack.weights

    def left_out(self, context: str) -> np.ndarray:
        """Weights of the effects in the stacked prediction of each single row without its target.

        Shape (n_single_rows, n_rows), rows as in :func:`single_units`.
        """
        units = self._units[context]
        out = self.out_of_fold_[context]
        full = np.tensordot(self.stack_.weights, out, 1)
        mean = self.mean_stack_.weights[0] * out[0]
        covered = np.array([self.covers(t) for t in units.targets], bool)
        return np.where(covered[:, None], full, mean)[units.unit]

    def _weights(self, perturbation: Perturbation, context: str) -> np.ndarray:
        contexts = [context] if context in self._units else list(self._units)
        total = self._zeros()
        for single in perturbation.singles:
            for c in contexts:
                found, weights = self.of_target(single.targets[0], c)
                total += weights @ found / len(contexts)
        return total

    def kriging(self, target: str, context: str) -> float:
        """Variance left by the kernels over what they leave on average (kriging, or GP, variance).

        1 where no kernel has a weight; smaller near measured targets.
        """
        if not self.covers(target) or not self.stack_.weights[1:].any():
            return 1.0
        units = self._units[context]
        share = []
        for features, kernel in zip(self.features, self._kernels[context], strict=True):
            near = features.kernel([target], units.targets)
            for ridge in self.ridges:
                share.append(1 - float((kernel_weights(kernel, near, ridge) * near).sum()))
        return float(np.average([1.0, *share], weights=self.stack_.weights)) / self._kriging_mean

    def _left_out_kriging(self, context: str) -> list[float]:
        weights = self.stack_.weights
        if not weights[1:].any():
            return []
        share = [np.ones(len(self._units[context].targets))]
        for kernel in self._kernels[context]:
            for ridge in self.ridges:
                inverse = np.linalg.inv(kernel + ridge * np.eye(len(kernel)))
                # 1 - k (K + λI)⁻¹ k of each unit from the others; its own similarity may be 0.
                share.append(1 / np.diag(inverse) - ridge + 1 - np.diag(kernel))
        mean = np.average(share, axis=0, weights=weights)
        covered = [self.covers(t) for t in self._units[context].targets]
        return list(mean[covered])


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


class NearestPerturbation(_OfTargets):
    """The effect of the training target that is most alike by its features."""

    def _of_units(self, target: str, units: Units) -> np.ndarray:
        alike = self.features.kernel([target], units.targets)[0]
        return np.eye(len(alike))[int(np.argmax(alike))]


class LinearModel(Baseline):
    r"""The linear model of Ahlmann-Eltze, Huber and Anders (2025), for single perturbations.

    .. math:: Y \approx G W P^\top + b, \qquad
       W = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P\,(P^\top P + \lambda I)^{-1},

    with effects :math:`Y` (genes × perturbations, the control with effect 0 and embedding 0 among
    them), their row means :math:`b`, the scores :math:`G` of the genes on the first principal
    components of the training profiles, and :math:`P` the rows of :math:`G` of the perturbed
    genes, or an embedding that is given. Each context is fitted apart.

    Parameters
    ----------
    embedding
        Embedding of the targets, one row each; or the effects of another screen, whose first
        principal components are taken. None trains it on the effects themselves: then targets
        must be among the genes.
    n_components
        K, principal components.
    ridge
        λ.
    scale
        Scale of the effects.
    """

    def __init__(
        self,
        embedding: pd.DataFrame | EffectTable | None = None,
        n_components: int = 10,
        ridge: float = 0.1,
        scale: Scale = "mean_log1p",
    ) -> None:
        super().__init__(scale)
        self.embedding, self.n_components, self.ridge = embedding, n_components, ridge

    def _fit(self) -> None:
        given = self.embedding
        if isinstance(given, EffectTable):
            check_no_leak("The embedding", given.cells, self.effects_)
            scale = self.scale if self.scale in given.scales else given.scales[0]
            given = _screen_embedding(given, self.n_components, scale)
        self._models = {
            c: self._fit_context(c, single_units(self.effects_, c), given) for c in self._in_context
        }

    def _fit_context(
        self, context: str, units: Units, given: pd.DataFrame | None
    ) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
        effect = units.mean @ self.effects_.effect[self.scale].astype(float)
        control = self.effects_.control[self.scale][context].astype(float)
        genes = _principal_scores(np.vstack([effect + control, control]).T, self.n_components)
        table = given if given is not None else pd.DataFrame(genes, list(self.effects_.genes))
        known = [i for i, t in enumerate(units.targets) if t in table.index]
        if len(known) < 2:
            raise ValueError(
                f"The linear model needs at least 2 training targets with an embedding in context "
                f"{context!r}; it has {len(known)}."
            )
        p = table.loc[[units.targets[i] for i in known]].to_numpy(float)
        p = np.vstack([p, np.zeros(p.shape[1])])
        y = np.vstack([effect[known], np.zeros(effect.shape[1])]).T
        b = y.mean(1)
        left = np.linalg.solve(genes.T @ genes + self.ridge * np.eye(genes.shape[1]), genes.T)
        right = np.linalg.solve(p.T @ p + self.ridge * np.eye(p.shape[1]), p.T)
        return genes @ (left @ (y - b[:, None]) @ right.T), b, table

    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context, shape (n_pairs, n_genes).

        Raises
        ------
        ValueError
            For a combination, a target without an embedding or a context without perturbed cells.
        """
        pairs = zip(perturbations, contexts, strict=True)
        return np.stack([self._predict(p, c) for p, c in pairs])

    def _predict(self, perturbation: Perturbation, context: str) -> np.ndarray:
        if perturbation.is_control:
            return np.zeros(len(self.effects_.genes))
        if context not in self._models:
            raise ValueError(f"No perturbation was measured in context {context!r}.")
        gw, b, table = self._models[context]
        if len(perturbation.targets) > 1:
            raise ValueError(f"The linear model predicts single perturbations, not {perturbation}.")
        if perturbation.targets[0] not in table.index:
            raise ValueError(f"The linear model has no embedding of {perturbation.targets[0]!r}.")
        return gw @ table.loc[perturbation.targets[0]].to_numpy(float) + b


def _principal_scores(values: np.ndarray, k: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    k = min(k, *values.shape)
    return PCA(k, svd_solver="full").fit_transform(values)


def _screen_embedding(effects: EffectTable, k: int, scale: Scale) -> pd.DataFrame:
    """First principal components of the mean effects of the targets of a screen."""
    singles = [i for i, (_, p) in enumerate(effects.rows) if len(p.targets) == 1]
    frame = pd.DataFrame(
        effects.effect[scale][singles].astype(float),
        [effects.rows[i][1].targets[0] for i in singles],
    )
    frame = frame.groupby(level=0).mean()
    return pd.DataFrame(_principal_scores(frame.to_numpy(), k), frame.index)
