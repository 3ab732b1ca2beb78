"""What is wanted: goals, and what they say of effects."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.stats import chi2

from ._model import EffectModel, OfPredictor, check_genes

_CELLS_UNIT = "mean_log1p"
_LIKE_CONTROL = (
    "The goal is not significantly different from the control of the context, so that no perturbation "
    "is the best way there. Give other cells, or more of them."
)
_GENES = 30.0  # independent genes that all stand for, where a model does not say
_LEVEL = 0.01
_LEAST_ACCURACY = 0.6
SHARE = "share of the way to the goal (1 is there, 0 is no change)"


@dataclass(frozen=True)
class Objective:
    r"""A goal as a function of effects: the larger, the better.

    Attributes
    ----------
    unit
        What the score is, in words.
    threshold
        What counts as success, unless another is asked for.
    linear, metric
        Score of an effect *d*: :math:`\omega^\top d + d^\top \mathrm{diag}(m)\, d`, shape (n_genes,)
        each; without metric it is linear. No change has 0.
    function
        The score, where it is of another form: from a frame with one effect per row.
    goal
        The wanted effect, if the goal is one; NaN for genes that do not matter.
    genes
        Names of the genes.
    """

    unit: str
    threshold: float
    genes: np.ndarray
    linear: np.ndarray | None = None
    metric: np.ndarray | None = None
    function: Callable[[pd.DataFrame], Any] | None = None
    goal: np.ndarray | None = None

    def __call__(self, effects: np.ndarray) -> np.ndarray:
        """Score of each effect, shape (n,)."""
        if self.linear is None:
            assert self.function is not None
            found = np.asarray(self.function(pd.DataFrame(effects, columns=self.genes)), float)
            if found.shape != (len(effects),) or not np.isfinite(found).all():
                wrong = (
                    found.shape if found.shape != (len(effects),) else "values that are not finite"
                )
                raise ValueError(
                    f"The score of {len(effects)} effects must be as many finite numbers, but the "
                    f"function gave {wrong}."
                )
            return found
        found = effects @ self.linear
        return found if self.metric is None else found + np.square(effects) @ self.metric

    def expected(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Expected score of uncertain effects; of other than quadratic scores, that of the mean."""
        found = self(mean)
        return found if self.metric is None else found + variance @ self.metric


class Goal(ABC):
    """What is wanted of an effect."""

    @abstractmethod
    def objective(self, model: EffectModel, context: str) -> Objective:
        """The goal as a function of a model's effects in a context; refused if it makes no sense."""


@dataclass(frozen=True)
class Signature(Goal):
    """Some genes up, others down.

    The score is the weighted mean change of these genes in the wanted direction.

    Parameters
    ----------
    up, down
        Genes.
    weights
        Weight of each gene instead, negative for those that should go down.
    """

    up: Sequence[str] = ()
    down: Sequence[str] = ()
    weights: Mapping[str, float] | None = None

    def objective(self, model: EffectModel, context: str) -> Objective:
        """See :class:`Goal`."""
        if isinstance(self.up, str) or isinstance(self.down, str):
            raise TypeError("up and down are lists of genes, not one name.")
        if self.weights is not None and (self.up or self.down):
            raise ValueError("Give either weights, or up and down.")
        both = sorted({*self.up} & {*self.down})
        if both:
            raise ValueError(f"Genes that should go both up and down: {both[:5]}.")
        weights = dict(self.weights or {})
        weights |= dict.fromkeys(self.up, 1.0) | dict.fromkeys(self.down, -1.0)
        values = np.array(list(weights.values()), float)
        if not values.any() or not np.isfinite(values).all():
            raise ValueError("A signature needs at least one gene with a weight that is not 0.")
        linear = np.zeros(len(model.genes))
        linear[check_genes(model, list(weights), "the signature")] = values / np.abs(values).sum()
        unit = f"weighted mean change in the wanted direction ({model.unit})"
        return Objective(unit, 0.0, model.genes, linear)


@dataclass(frozen=True)
class TowardsEffect(Goal):
    r"""An effect like this one.

    The score is the share of the way to it, :math:`1 - \lVert d - g\rVert^2 / \lVert g\rVert^2`: 1 for
    the effect itself, 0 for no change, below 0 for what leads away from it.

    Parameters
    ----------
    effect
        The wanted effect by gene, in the model's units. Genes that it does not name do not matter.
    noise
        Sampling variance of the wanted effect, summed over genes; taken off both squares.
    """

    effect: Mapping[str, float] | pd.Series
    noise: float = 0.0

    def objective(self, model: EffectModel, context: str) -> Objective:
        """See :class:`Goal`."""
        effect = pd.Series(self.effect, dtype=float)
        if not effect.index.is_unique:
            raise ValueError("The wanted effect names a gene twice.")
        at = check_genes(model, list(effect.index), "the wanted effect")
        if not np.isfinite(effect).all():
            raise ValueError("The wanted effect has values that are not numbers.")
        goal, inside = np.zeros(len(model.genes)), np.zeros(len(model.genes))
        goal[at], inside[at] = effect, 1
        square = float(goal @ goal)
        if square <= self.noise or not square:
            raise ValueError(_LIKE_CONTROL)
        size = square - self.noise
        return Objective(
            SHARE,
            0.5,
            model.genes,
            2 * goal / size,
            -inside / size,
            goal=np.where(inside > 0, goal, np.nan),
        )


@dataclass(frozen=True)
class TowardsCells(Goal):
    """Cells like these, by their mean profile.

    Compared with the model's control cells of the context: :class:`TowardsEffect` with the difference.
    How far predicted cells agree with them as populations: :func:`gpjepa.planning.latent_energy`.

    Parameters
    ----------
    cells
        AnnData of the wanted cells, with raw counts, laid out as the model's training data.
    """

    cells: AnnData

    def objective(self, model: EffectModel, context: str) -> Objective:
        """See :class:`Goal`."""
        control = control_profile(model, context)
        mean, variance = self.profile(model)
        if not _differs(model, context, mean - control, variance):
            raise ValueError(_LIKE_CONTROL)
        return TowardsEffect(
            pd.Series(mean - control, model.genes), float(variance.sum())
        ).objective(model, context)

    def profile(self, model: EffectModel) -> tuple[np.ndarray, np.ndarray]:
        """Mean log1p counts per 10,000 of the cells, and its sampling variance."""
        rates = model.log1p_counts(self.cells)
        if rates.shape[0] < 2:
            raise ValueError(f"{rates.shape[0]} cells are too few to be a goal; give at least 2.")
        return mean_and_variance(rates)


class CellState(Goal):
    """A state of cells, by a linear classifier that is fitted to labelled cells.

    The score is the change of the mean log odds of the state.

    Parameters
    ----------
    cells
        AnnData with raw counts and labels.
    label_key
        Column of ``obs`` with the labels.
    wanted
        Label of the wanted state.
    unwanted
        Labels of the other states; all others by default.

    Attributes
    ----------
    accuracy_
        Balanced accuracy on cells left out, in five folds, once the goal has been used.
    """

    def __init__(
        self,
        cells: AnnData,
        label_key: str,
        wanted: str,
        unwanted: str | Sequence[str] | None = None,
    ) -> None:
        if label_key not in cells.obs:
            raise ValueError(f"obs has no column {label_key!r}; it has {list(cells.obs.columns)}.")
        labelled = cells.obs[label_key].notna().to_numpy()
        labels = cells.obs[label_key].astype(str).to_numpy()
        known = sorted(set(labels[labelled]))
        others = [unwanted] if isinstance(unwanted, str) else unwanted
        chosen = [x for x in known if x != wanted] if others is None else list(others)
        missing = [x for x in (wanted, *chosen) if x not in known]
        if missing or not chosen or wanted in chosen:
            raise ValueError(
                f"wanted={wanted!r} and unwanted={chosen} must be different labels of "
                f"obs[{label_key!r}], which has {known[:10]}."
            )
        keep = labelled & np.isin(labels, [wanted, *chosen])
        least = min((labels == wanted).sum(), np.isin(labels, chosen).sum())
        if least < 10:
            raise ValueError(f"A state needs 10 cells to be learned; one side has {least}.")
        self._cells, self._is_wanted = cells[keep], labels[keep] == wanted
        self.wanted = wanted

    def objective(self, model: EffectModel, context: str) -> Objective:
        """See :class:`Goal`."""
        control_profile(model, context)  # or effects are not in the units of cells
        unit = f"change of the mean log odds of {self.wanted}"
        return Objective(unit, 0.0, model.genes, self._fit(model))

    def _fit(self, model: EffectModel) -> np.ndarray:
        """Weights of the genes."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import MaxAbsScaler

        rates = model.log1p_counts(self._cells)
        classifier = make_pipeline(
            MaxAbsScaler(), LogisticRegression(class_weight="balanced", max_iter=1_000)
        )
        scores = cross_val_score(
            classifier, rates, self._is_wanted, cv=5, scoring="balanced_accuracy"
        )
        self.accuracy_ = float(scores.mean())
        if self.accuracy_ < _LEAST_ACCURACY:
            warnings.warn(
                f"The state {self.wanted!r} is hardly recognised: balanced accuracy "
                f"{self.accuracy_:.2f} on cells left out, where 0.5 is a guess.",
                UserWarning,
                stacklevel=2,
            )
        scale, regression = classifier.fit(rates, self._is_wanted)
        return regression.coef_[0] / scale.scale_


@dataclass(frozen=True)
class Score(Goal):
    """Any function of predicted effects.

    Parameters
    ----------
    function
        Called with a DataFrame of one effect per row and genes as columns; gives a number for each.
        The larger, the better.
    unit
        What it is, in words.
    threshold
        What counts as success.
    """

    function: Callable[[pd.DataFrame], Any]
    unit: str
    threshold: float = 0.0

    def objective(self, model: EffectModel, context: str) -> Objective:
        """See :class:`Goal`."""
        return Objective(self.unit, self.threshold, model.genes, function=self.function)


def _differs(model: EffectModel, context: str, apart: np.ndarray, variance: np.ndarray) -> bool:
    """Whether cells differ from the control: the squared distance against that of noise alone.

    Noise of genes goes together; they count as so many independent ones (Satterthwaite 1946).
    """
    n = _GENES
    if isinstance(model, OfPredictor):
        variance = variance + model.effects.control_variance[model.unit][context]
        n = model.effects.effective_genes(model.unit, context, variance)
    total = max(float(variance.sum()), 1e-300)
    return bool(chi2.sf(float(apart @ apart) / total * n, n) < _LEVEL)


def mean_and_variance(rates: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean profile of cells, and its sampling variance, shape (n_genes,) each."""
    mean = np.asarray(rates.mean(0)).ravel().astype(float)
    square = np.asarray(rates.power(2).mean(0)).ravel()
    return mean, np.maximum(square - mean**2, 0) / max(rates.shape[0] - 1, 1)


def control_profile(model: EffectModel, context: str) -> np.ndarray:
    control = model.control(context)
    if control is None or model.unit != _CELLS_UNIT:
        raise ValueError(
            f"Cells can be a goal of a model whose effects are in {_CELLS_UNIT} and whose control "
            f"profiles are known; this one's are in {model.unit}. Give the wanted effect in these "
            "units: TowardsEffect(...)."
        )
    return control
