"""Baselines: each is a row of the benchmark, and what the anchor is made of.

All share ``fit(effects)`` and ``predict(perturbations, contexts)``, with one effect per pair,
shape (n_pairs, n_genes). Most predictions are weighted sums of the training effects, and show their
``weights``: what an estimate is made of, which noise is in it, and which noise it shares with
another, can all be read off them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from gpjepa.perturbations import Perturbation

from ._scales import Scale
from ._stack import shrink
from ._table import EffectTable


class Baseline(ABC):
    """A predictor of mean effects on one scale.

    Parameters
    ----------
    scale
        ``"mean_log1p"`` or ``"log1p_mean"``, or the unit of a table without cells.
    """

    def __init__(self, scale: Scale = "mean_log1p") -> None:
        self.scale = scale

    def fit(self, effects: EffectTable) -> Self:
        """Learn from the effects of the training perturbations."""
        effects.check_scale(self.scale)
        self.effects_ = effects
        self._row = {row: i for i, row in enumerate(effects.rows)}
        self._in_context: dict[str, list[int]] = {}
        for i, (context, _) in enumerate(effects.rows):
            self._in_context.setdefault(context, []).append(i)
        self._fit()
        return self

    def _fit(self) -> None:  # noqa: B027  # most have nothing to learn but the table itself
        pass

    @abstractmethod
    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context, shape (n_pairs, n_genes)."""

    def _elsewhere(self, perturbation: Perturbation) -> list[int]:
        return [i for (_, p), i in self._row.items() if p == perturbation]


class WeightedBaseline(Baseline):
    """A baseline whose predictions are weighted sums of the training effects."""

    def weights(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Weight of each training effect in each prediction, shape (n_pairs, n_rows)."""
        pairs = list(zip(perturbations, contexts, strict=True))
        found = [self._zeros() if p.is_control else self._weights(p, c) for p, c in pairs]
        return np.array(found).reshape(len(pairs), len(self._row))

    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context, shape (n_pairs, n_genes)."""
        return self.weights(perturbations, contexts) @ self.effects_.effect[self.scale]

    @abstractmethod
    def _weights(self, perturbation: Perturbation, context: str) -> np.ndarray:
        """Weight of each training effect, shape (n_rows,)."""

    def _zeros(self) -> np.ndarray:
        return np.zeros(len(self._row))

    def _one(self, row: tuple[str, Perturbation]) -> np.ndarray:
        weights = self._zeros()
        weights[self._row[row]] = 1
        return weights

    def _mean(self, context: str) -> np.ndarray:
        """Mean effect of the context; of one without perturbed cells, the mean over the others."""
        chosen = [context] if context in self._in_context else list(self._in_context)
        weights = self._zeros()
        for c in chosen:
            weights[self._in_context[c]] = 1 / len(self._in_context[c]) / len(chosen)
        return weights

    def _single(self, single: Perturbation, context: str) -> np.ndarray:
        """Measured here, or its mean over other contexts, or the mean effect (scPerturBench)."""
        if (context, single) in self._row:
            return self._one((context, single))
        elsewhere = self._elsewhere(single)
        if not elsewhere:
            return self._mean(context)
        weights = self._zeros()
        weights[elsewhere] = 1 / len(elsewhere)
        return weights


class NoChange(WeightedBaseline):
    """Every perturbed profile is the control profile."""

    def _weights(self, perturbation: Perturbation, context: str) -> np.ndarray:
        return self._zeros()


class MeanEffect(WeightedBaseline):
    """Every effect is the mean of the training effects of its context.

    The perturbed mean of Systema (Viñas Torné et al. 2025), one vote per perturbation; the strong
    baseline of Kernfeld et al. 2025 and Ahlmann-Eltze et al. 2025 for unseen genes.
    """

    def _weights(self, perturbation: Perturbation, context: str) -> np.ndarray:
        return self._mean(context)


class Additive(WeightedBaseline):
    """Effects of single perturbations add up (Ahlmann-Eltze, Huber, Anders 2025).

    A single that was not measured in the context takes its mean over the other contexts, and
    one that was measured nowhere the mean effect (as in scPerturBench, Wei et al. 2025).
    """

    def _weights(self, perturbation: Perturbation, context: str) -> np.ndarray:
        return np.sum([self._single(s, context) for s in perturbation.singles], axis=0)


class ShrunkenAdditive(Additive):
    """Additive over singles that are shrunk as whole vectors (James and Stein 1961).

    Each towards no change or the mean effect of its context, whichever has the smaller estimated
    risk: :func:`gpjepa.effects.shrink`.
    """

    def _fit(self) -> None:
        self._shrunken: dict[int, np.ndarray] = {}
        for rows in self._in_context.values():
            singles = [i for i in rows if len(self.effects_.rows[i][1].targets) == 1]
            if not singles:
                continue
            mean = np.zeros((len(singles), len(self._row)))
            mean[:, singles] = 1 / len(singles)
            result = shrink(self.effects_, singles, [np.zeros_like(mean), mean], self.scale)
            self._shrunken |= dict(zip(singles, result.weights, strict=True))

    def _single(self, single: Perturbation, context: str) -> np.ndarray:
        raw = super()._single(single, context)
        used = [int(i) for i in np.flatnonzero(raw)]
        shrunken = [raw[i] * self._shrunken.get(i, self._one(self.effects_.rows[i])) for i in used]
        return np.sum(shrunken, axis=0) if used else raw


class LargerSingle(Additive):
    """A combination does what the stronger of its singles does (full masking)."""

    def _weights(self, perturbation: Perturbation, context: str) -> np.ndarray:
        singles = np.stack([self._single(s, context) for s in perturbation.singles])
        effects = singles @ self.effects_.effect[self.scale]
        # Sizes without noise, or the single with the fewest cells would look strongest.
        variance = self.effects_.profile_variance(self.scale).sum(1)
        noise = self.effects_.on_profiles(singles) ** 2 @ variance
        return singles[int(np.argmax((effects**2).sum(1) - noise))]


class MatchingMean(Additive):
    """A combination is the mean of its singles (Systema, Viñas Torné et al. 2025).

    A single that was not measured here takes its mean over other contexts, or the mean effect.
    """

    def _weights(self, perturbation: Perturbation, context: str) -> np.ndarray:
        return super()._weights(perturbation, context) / len(perturbation.targets)
