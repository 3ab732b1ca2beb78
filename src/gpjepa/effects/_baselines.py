"""Baselines: each is a row of the benchmark, and what the anchor is made of.

All share ``fit(effects)`` and ``predict(perturbations, contexts)``, with one effect per pair,
shape (n_pairs, n_genes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from gpjepa.perturbations import Perturbation

from ._scales import Scale, check_scale
from ._table import EffectTable


class _Baseline:
    """A predictor of mean effects on one scale."""

    def __init__(self, scale: Scale = "mean_log1p") -> None:
        self.scale = check_scale(scale)

    def fit(self, effects: EffectTable) -> Self:
        """Learn from the effects of the training perturbations."""
        self.n_genes_ = len(effects.genes)
        self.effect_ = dict(zip(effects.rows, effects.effect[self.scale], strict=True))
        self.mean_ = {}
        for context in effects.contexts:
            mine = [e for (c, _), e in self.effect_.items() if c == context]
            if mine:
                self.mean_[context] = np.mean(mine, axis=0)
        return self

    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context."""
        pairs = zip(perturbations, contexts, strict=True)
        return np.stack([self._predict(p, c) for p, c in pairs])

    def _predict(self, perturbation: Perturbation, context: str) -> np.ndarray:
        raise AssertionError("each baseline says how it predicts")

    def _mean(self, context: str) -> np.ndarray:
        if context in self.mean_:
            return self.mean_[context]
        if self.mean_:  # a context without perturbed cells: the mean over the others
            return np.mean(list(self.mean_.values()), axis=0)
        return np.zeros(self.n_genes_)


class NoChange(_Baseline):
    """Every perturbed profile is the control profile."""

    def _predict(self, perturbation: Perturbation, context: str) -> np.ndarray:
        return np.zeros(self.n_genes_)


class MeanEffect(_Baseline):
    """Every effect is the mean of the training effects of its context."""

    def _predict(self, perturbation: Perturbation, context: str) -> np.ndarray:
        return self._mean(context) if not perturbation.is_control else np.zeros(self.n_genes_)


class Additive(_Baseline):
    """Effects of single perturbations add up (Ahlmann-Eltze, Huber, Anders 2025).

    A single that was not measured in the context takes its mean over the other contexts, and
    one that was measured nowhere the mean effect (as in scPerturBench).
    """

    def _predict(self, perturbation: Perturbation, context: str) -> np.ndarray:
        total = np.zeros(self.n_genes_)
        for single in perturbation.singles:
            elsewhere = [e for (_, p), e in self.effect_.items() if p == single]
            if (context, single) in self.effect_:
                total += self.effect_[context, single]
            elif elsewhere:
                total += np.mean(elsewhere, axis=0)
            else:
                total += self._mean(context)
        return total
