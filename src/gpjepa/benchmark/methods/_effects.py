"""Methods that predict mean effects: the baselines, the anchor and negative controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.benchmark.tasks import SCALE, effects_of
from gpjepa.effects import (
    Baseline,
    EffectAnchor,
    EffectTable,
    LinearModel,
    MeanEffect,
)
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.splits import Split

Predicted = tuple[np.ndarray, np.ndarray | None]
Predictor = Callable[[EffectTable, list[Perturbation], list[str]], Predicted]


@dataclass
class EffectMethod:
    """A method that predicts mean effects from the table of training effects.

    Parameters
    ----------
    predictor
        From the effects of the training cells, perturbations and contexts to mean effects, and
        their standard deviations or None.
    can
        Whether it predicts a perturbation; others are left out. All of them by default.
    """

    predictor: Predictor
    can: Callable[[EffectTable, Perturbation], bool] = lambda effects, perturbation: True

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Make the table of training effects."""
        self.effects_, self.of_cells_ = effects_of(train), "unit" not in train.uns

    def predict(self, perturbations: Sequence[str], control: ad.AnnData) -> ad.AnnData:
        """Mean profiles of the perturbations."""
        context = str(control.obs["context"].iloc[0])
        wanted = {p: Perturbation.parse(p) for p in perturbations}
        wanted = {p: read for p, read in wanted.items() if self.can(self.effects_, read)}
        if not wanted:
            raise ValueError("It can predict none of the perturbations.")
        names = list(wanted)
        effect, sd = self.predictor(self.effects_, list(wanted.values()), [context] * len(wanted))
        obs = pd.DataFrame({"perturbation": names}, index=names)
        if self.of_cells_:
            profile = np.maximum(self.effects_.control[SCALE][context] + effect, 0)
            cells = ad.AnnData(profile, obs, control.var[[]], uns={"scale": "log1p"})
        else:
            cells = ad.AnnData(effect, obs, control.var[[]], uns={"scale": "effect"})
        cells.uns["effect"] = pd.DataFrame(effect, names, control.var_names)
        if sd is not None:
            cells.uns["effect_sd"] = pd.DataFrame(sd, names, control.var_names)
        return cells


def baseline(make: Callable[[], Baseline]) -> EffectMethod:
    """A baseline of :mod:`gpjepa.effects`."""

    def predict(effects: EffectTable, wanted: list[Perturbation], contexts: list[str]) -> Predicted:
        model = make()
        if model.scale not in effects.scales:
            model.scale = effects.scales[0]
        return model.fit(effects).predict(wanted, contexts), None

    return EffectMethod(predict)


def linear(**options: Any) -> EffectMethod:
    """Ahlmann-Eltze's linear model, which knows single targets that are measured genes."""

    def can(effects: EffectTable, perturbation: Perturbation) -> bool:
        return len(perturbation.targets) == 1 and perturbation.targets[0] in effects.genes

    return replace(baseline(lambda: LinearModel(**options)), can=can)


def of_features(
    kind: Callable[..., Baseline], features: Sequence[TargetFeatures], **options: Any
) -> EffectMethod:
    """A baseline that takes one kind of features: all of them, side by side.

    A perturbation is left out if nothing is known of one of its targets.

    Raises
    ------
    ValueError
        If the data have no features.
    """
    if not features:
        raise ValueError("It needs features of the targets: give the data `features`.")
    one = features[0]
    if len(features) > 1:
        names = sorted({t for f in features for t in f.targets})
        one = TargetFeatures(names, sp.hstack([f.take(names) for f in features]), "all features")

    def can(effects: EffectTable, perturbation: Perturbation) -> bool:
        return all(one.covers(t) for t in perturbation.targets)

    return replace(baseline(lambda: kind(one, **options)), can=can)


def anchor(features: Sequence[TargetFeatures]) -> EffectMethod:
    """The closed-form anchor of GP-JEPA."""

    def predict(effects: EffectTable, wanted: list[Perturbation], contexts: list[str]) -> Predicted:
        fitted = EffectAnchor(features, "mean").fit(effects)
        found = fitted.predict(wanted, contexts, effects.scales[0])
        return found.mean, np.sqrt(found.variance)

    return EffectMethod(predict)


# Negative controls


def permuted_labels(features: Sequence[TargetFeatures], seed: int) -> EffectMethod:
    """The anchor, of effects that were dealt out to other perturbations."""
    inner = anchor(features)

    def predict(effects: EffectTable, wanted: list[Perturbation], contexts: list[str]) -> Predicted:
        order = np.arange(len(effects.rows))
        rng = np.random.default_rng(seed)
        for context in effects.contexts:
            mine = np.flatnonzero([c == context for c, _ in effects.rows])
            order[mine] = rng.permutation(mine)
        dealt = replace(effects.subset(order), rows=effects.rows)
        return inner.predictor(dealt, wanted, contexts)

    return EffectMethod(predict)


def random_features(seed: int) -> EffectMethod:
    """The anchor, with features of targets that say nothing."""

    def predict(effects: EffectTable, wanted: list[Perturbation], contexts: list[str]) -> Predicted:
        targets = sorted({t for p in (*effects.perturbations, *wanted) for t in p.targets})
        values = np.random.default_rng(seed).normal(size=(len(targets), 16))
        features = [TargetFeatures(targets, values, "random")]
        return anchor(features).predictor(effects, wanted, contexts)

    return EffectMethod(predict)


def noisy_mean(seed: int) -> EffectMethod:
    """The mean effect, with noise of the size of a measured effect's, another for each row."""

    def predict(effects: EffectTable, wanted: list[Perturbation], contexts: list[str]) -> Predicted:
        scale = effects.scales[0]
        mean = MeanEffect(scale).fit(effects).predict(wanted, contexts)
        sd = np.sqrt(np.median(effects.noise(scale), axis=0))
        return mean + np.random.default_rng(seed).normal(size=mean.shape) * sd, None

    return EffectMethod(predict)
