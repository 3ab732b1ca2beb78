"""Methods: one small protocol, and everything of our own behind it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import anndata as ad
import numpy as np
import pandas as pd

from gpjepa.effects import (
    Additive,
    Baseline,
    EffectAnchor,
    EffectTable,
    KernelRidge,
    LargerSingle,
    LinearModel,
    MatchingMean,
    MeanEffect,
    NearestPerturbation,
    NoChange,
    ShrunkenAdditive,
    ShrunkenMean,
    Transfer,
    effect_table,
)
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.splits import Split

from ._peers import PEERS, peer
from ._tasks import SCALE

_read = Perturbation.parse


@runtime_checkable
class Method(Protocol):
    """What a method must be able to do. Nothing has to be inherited.

    ``fit`` gets the training cells: counts in ``X``; ``obs`` ``perturbation`` (``"A+B"``,
    ``"control"``), ``context`` and ``library_size``; and the split, whose ``test`` rows it may know
    by name.

    ``predict`` is called once per context, with the names of the perturbations and the control
    cells of that context, and returns an AnnData with the same genes (in any order),
    ``obs["perturbation"]``, and ``uns["scale"]`` saying what ``X`` is:

    ``"counts"``
        Predicted cells, as many as it likes; ``obs["library_size"]`` if it is not their sum.
    ``"log1p"``
        log1p of counts per 10,000. Several rows of a perturbation are cells; one row is its mean
        profile, and its cells are control cells moved by the effect.

    It may state more: ``uns["effect"]``, the mean effects (perturbations × genes, differences of
    mean log1p counts per 10,000 from the control) where they are not those of its cells, and
    ``uns["effect_sd"]``, their standard deviations. Several predictions of one training, such as
    with two settings, are returned as a dict of names to AnnData.

    If it has a method ``embed(cells)``, from cells with counts, ``context`` and ``library_size`` to
    an array, shape (n_cells, n_dimensions), its own space is scored as well.

    A perturbation that it cannot predict is left out: it is scored as the mean response, and the
    report says how many were.
    """

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Learn from the training cells."""

    def predict(
        self, perturbations: Sequence[str], control: ad.AnnData
    ) -> ad.AnnData | dict[str, ad.AnnData]:
        """Predict perturbations of the context of the control cells."""


# Baselines


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

    predictor: Callable[
        [EffectTable, list[Perturbation], list[str]], tuple[np.ndarray, np.ndarray | None]
    ]
    can: Callable[[EffectTable, Perturbation], bool] = lambda effects, perturbation: True

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Make the table of training effects."""
        self.effects_ = effect_table(
            train.X, train.obs["library_size"].to_numpy(float),
            [_read(p) for p in train.obs["perturbation"]], train.obs["context"].tolist(),
            train.var_names,
        )  # fmt: skip

    def predict(self, perturbations: Sequence[str], control: ad.AnnData) -> ad.AnnData:
        """Mean profiles of the perturbations."""
        context = str(control.obs["context"].iloc[0])
        perturbations = [p for p in perturbations if self.can(self.effects_, _read(p))]
        if not perturbations:
            raise ValueError("It can predict none of the perturbations.")
        wanted = [_read(p) for p in perturbations]
        effect, sd = self.predictor(self.effects_, wanted, [context] * len(wanted))
        found = pd.DataFrame(effect, list(perturbations), control.var_names)
        profile = self.effects_.control[SCALE][context] + effect
        cells = ad.AnnData(
            np.maximum(profile, 0), pd.DataFrame({"perturbation": perturbations},
                                                 index=list(perturbations)),
            control.var[[]], uns={"scale": "log1p", "effect": found},
        )  # fmt: skip
        if sd is not None:
            cells.uns["effect_sd"] = pd.DataFrame(sd, list(perturbations), control.var_names)
        return cells


def _baseline(make: Callable[[], Baseline]) -> EffectMethod:
    return EffectMethod(lambda effects, p, c: (make().fit(effects).predict(p, c), None))


def _linear(**options: Any) -> EffectMethod:
    """Ahlmann-Eltze's linear model, which knows single targets that are measured genes."""

    def can(effects: EffectTable, perturbation: Perturbation) -> bool:
        return len(perturbation.targets) == 1 and perturbation.targets[0] in effects.genes

    return replace(_baseline(lambda: LinearModel(**options)), can=can)


def _anchor(features: Sequence[TargetFeatures]) -> EffectMethod:
    def predict(
        effects: EffectTable, wanted: list[Perturbation], contexts: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        found = EffectAnchor(features, "mean").fit(effects).predict(wanted, contexts, SCALE)
        return found.mean, np.sqrt(found.variance)

    return EffectMethod(predict)


# Negative controls


def _permuted_labels(features: Sequence[TargetFeatures], seed: int) -> EffectMethod:
    """The anchor, of effects that were dealt out to other perturbations."""
    anchor = _anchor(features)

    def predict(
        effects: EffectTable, wanted: list[Perturbation], contexts: list[str]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        order = np.arange(len(effects.rows))
        rng = np.random.default_rng(seed)
        for context in effects.contexts:
            mine = np.flatnonzero([c == context for c, _ in effects.rows])
            order[mine] = rng.permutation(mine)
        dealt = replace(effects.subset(order), rows=effects.rows)
        return anchor.predictor(dealt, wanted, contexts)

    return EffectMethod(predict)


def _random_features(seed: int) -> EffectMethod:
    """The anchor, with features of targets that say nothing."""

    def predict(
        effects: EffectTable, wanted: list[Perturbation], contexts: list[str]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        targets = sorted({t for p in (*effects.perturbations, *wanted) for t in p.targets})
        values = np.random.default_rng(seed).normal(size=(len(targets), 16))
        return _anchor([TargetFeatures(targets, values, "random")]).predictor(
            effects, wanted, contexts
        )

    return EffectMethod(predict)


def _noisy_mean(seed: int) -> EffectMethod:
    """The mean effect, with noise of the size of a measured effect's, another for each row."""

    def predict(
        effects: EffectTable, wanted: list[Perturbation], contexts: list[str]
    ) -> tuple[np.ndarray, None]:
        mean = MeanEffect().fit(effects).predict(wanted, contexts)
        sd = np.sqrt(np.median(effects.noise(SCALE), axis=0))
        return mean + np.random.default_rng(seed).normal(size=mean.shape) * sd, None

    return EffectMethod(predict)


# GP-JEPA


@dataclass
class GPJEPAMethod:
    """GP-JEPA, predicted with each of several gates after one training.

    Parameters
    ----------
    features
        Features of targets that were never perturbed.
    seed
        Seed of training and of the predicted cells.
    gates
        Gates to predict with: ``"auto"``, 0, 1.
    permute_features
        Deal the features out to other targets: what they say must matter.
    model, train
        Arguments of :class:`gpjepa.GPJEPA` and of its ``train``.
    """

    features: Sequence[TargetFeatures] = ()
    seed: int = 0
    gates: Sequence[Any] = ("auto", 0, 1)
    permute_features: bool = False
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Train on the cells."""
        import scvi

        from gpjepa.model import GPJEPA

        scvi.settings.seed = self.seed
        cells, features = train.copy(), self.features
        if self.permute_features:
            features = [f.permuted(self.seed) for f in features]
        # Values, not labels to be read again: names may hold anything.
        cells.obs["perturbation"] = [_read(p) for p in cells.obs["perturbation"]]
        GPJEPA.setup_anndata(cells, context_key="context", library_size_key="library_size")
        self.model_ = GPJEPA(
            cells, target_features=features, missing_features="mean",
            **({"targets": sorted({t for _, p in split.test for t in p.targets})}
               | dict(self.model or {})),
        )  # fmt: skip
        self.model_.train(**{"enable_progress_bar": False, **(self.train or {})})
        self.n_parameters_ = sum(p.numel() for p in self.model_.module.parameters())

    def predict(self, perturbations: Sequence[str], control: ad.AnnData) -> dict[str, ad.AnnData]:
        """Cells with each gate, and their mean effects."""
        context = str(control.obs["context"].iloc[0])
        wanted = [_read(p) for p in perturbations]
        found = {}
        for gate in self.gates:
            cells = self.model_.predict_perturbation(
                control, wanted, context=context, seed=self.seed, gate=gate
            )
            tidy = self.model_.predict_effects(wanted, context, gate=gate)
            wide = {column: tidy.pivot(index="perturbation", columns="gene", values=column)
                    for column in ("effect", "sd")}  # fmt: skip
            cells.uns = {"scale": "counts", "effect": wide["effect"], "effect_sd": wide["sd"]}
            found["" if gate == "auto" else f"gate {gate}"] = cells
        return found

    def embed(self, cells: ad.AnnData) -> np.ndarray:
        """States of cells."""
        # Sampled counts can add up to more than the library size that they were sampled with.
        total = np.asarray(cells.X.sum(1)).ravel()
        cells.obs["library_size"] = np.maximum(cells.obs["library_size"], total)
        return self.model_.get_latent_representation(cells)


# By name


def _need(features: Sequence[TargetFeatures], name: str) -> TargetFeatures:
    if not features:
        raise ValueError(
            f"Method {name!r} needs features of the targets: give the data `features`."
        )
    return features[0]


Factory = Callable[[Sequence[TargetFeatures], int, dict[str, Any]], Method]

METHODS: dict[str, Factory] = {
    "no change": lambda f, s, o: _baseline(NoChange),
    "mean": lambda f, s, o: _baseline(MeanEffect),
    "shrunken mean": lambda f, s, o: _baseline(ShrunkenMean),
    "matching mean": lambda f, s, o: _baseline(MatchingMean),
    "additive": lambda f, s, o: _baseline(Additive),
    "shrunken additive": lambda f, s, o: _baseline(ShrunkenAdditive),
    "larger single": lambda f, s, o: _baseline(LargerSingle),
    "linear": lambda f, s, o: _linear(**o),
    "kernel ridge": lambda f, s, o: _baseline(lambda: KernelRidge(_need(f, "kernel ridge"), **o)),
    "nearest": lambda f, s, o: _baseline(lambda: NearestPerturbation(_need(f, "nearest"))),
    "transfer": lambda f, s, o: _baseline(lambda: Transfer(**o)),
    "anchor": lambda f, s, o: _anchor(f),
    "permuted labels": lambda f, s, o: _permuted_labels(f, s),
    "random features": lambda f, s, o: _random_features(s),
    "mean plus noise": lambda f, s, o: _noisy_mean(s),
    "GP-JEPA": lambda f, s, o: GPJEPAMethod(f, s, **o),
}
"""Methods by name: from features of the targets, a seed and options of the method."""


def make_method(
    name: str, features: Sequence[TargetFeatures], seed: int, options: Mapping[str, Any],
    python: Path | None = None,
) -> Method:  # fmt: skip
    """A method by name, or by where it can be imported from.

    A class of others gets its options, and ``features`` and ``seed`` if it has such parameters;
    a published method the interpreter of its environment.
    """
    if name in PEERS:
        return peer(name, python, seed, options)
    if name in METHODS:
        return METHODS[name](features, seed, dict(options))
    kind = imported(name)
    offered = {"features": features, "seed": seed}
    taken = inspect.signature(kind).parameters
    return kind(**{k: v for k, v in offered.items() if k in taken}, **options)


def imported(name: str) -> type:
    """The class that ``"package.module:Class"`` names.

    Raises
    ------
    ValueError
        If it cannot be imported or is no method.
    """
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    lacking = [f for f in ("fit", "predict") if not callable(getattr(kind, f, None))]
    if lacking:
        raise ValueError(f"{name!r} is no method: it has no {' and no '.join(lacking)}")
    return kind


def is_seeded(name: str) -> bool:
    """Whether another seed changes a method."""
    if name in METHODS or name in ORACLES or name in PEERS:
        return name in SEEDED or name in PEERS
    return "seed" in inspect.signature(imported(name)).parameters


SEEDED = ("permuted labels", "random features", "mean plus noise", "GP-JEPA")
"""Methods that another seed changes."""

NEGATIVE = ("no change", "mean", "matching mean", "permuted labels", "random features",
            "mean plus noise")  # fmt: skip
"""Negative controls: a metric or a split on which one of them wins says nothing."""

ORACLES = ("replicate", "interpolated duplicate", "truth")
"""Positive controls: they see the truth."""
