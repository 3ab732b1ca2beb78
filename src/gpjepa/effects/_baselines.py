"""Baselines: each is a row of the benchmark, and what the anchor is made of.

All share ``fit(effects)`` and ``predict(perturbations, contexts)``, with one effect per pair,
shape (n_pairs, n_genes). Most predictions are weighted sums of the training effects: what an estimate is
made of, which noise is in it, and which noise it shares with another, can all be read off the
weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from gpjepa.perturbations import Perturbation

from ._measured import Measured, blocks
from ._scales import Scale
from ._stack import shrink
from ._table import EffectTable
from ._weighted import NOTHING, Terms, Weights, added, once


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
        return self.fit_on(Measured(effects, self.scale))

    def fit_on(self, measured: Measured) -> Self:
        """As :meth:`fit`, where others learn from the same effects."""
        self.effects_, self.measured_ = measured.effects, measured
        self._row = measured.row
        self._in_context: dict[str, list[int]] = {}
        for i, (context, _) in enumerate(self.effects_.rows):
            self._in_context.setdefault(context, []).append(i)
        self._fit()
        return self

    def _fit(self) -> None:  # noqa: B027  # most have nothing to learn but the table itself
        pass

    @abstractmethod
    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context, shape (n_pairs, n_genes)."""

    def _elsewhere(self, perturbation: Perturbation) -> list[int]:
        contexts = self.effects_.measured_in.get(perturbation, ())
        return [self._row[c, perturbation] for c in contexts]


class WeightedBaseline(Baseline):
    """A baseline whose predictions are weighted sums of the training effects."""

    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context, shape (n_pairs, n_genes)."""
        found = np.zeros((len(perturbations), len(self.effects_.genes)))
        for block in blocks(len(perturbations)):
            at = slice(block.start, block.stop)
            sums = [[(1.0, w)] for w in self._of_pairs(perturbations[at], contexts[at])]
            found[at] = self.measured_.mean(self.measured_.assemble(sums))
        return found

    def _of_pairs(
        self, perturbations: Sequence[Perturbation], contexts: Sequence[str]
    ) -> list[Weights]:
        pairs = zip(perturbations, contexts, strict=True)
        return [NOTHING if p.is_control else self._weights(p, c) for p, c in pairs]

    @abstractmethod
    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        """Weight of each training effect, each once."""

    def _mean(self, context: str) -> Weights:
        """Mean effect of the context; of one without perturbed cells, the mean over the others."""
        chosen = [context] if context in self._in_context else list(self._in_context)
        return added(Weights.equal(self._in_context[c], 1 / len(chosen)) for c in chosen)

    def _single(self, single: Perturbation, context: str) -> Weights:
        """Measured here, or its mean over other contexts, or the mean effect (scPerturBench)."""
        if (context, single) in self._row:
            return self.measured_.one(self._row[context, single])
        elsewhere = self._elsewhere(single)
        return Weights.equal(elsewhere) if elsewhere else self._mean(context)


class NoChange(WeightedBaseline):
    """Every perturbed profile is the control profile."""

    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        return NOTHING


class MeanEffect(WeightedBaseline):
    """Every effect is the mean of the training effects of its context.

    The perturbed mean of Systema (Viñas Torné et al. 2025), one vote per perturbation; the strong
    baseline of Kernfeld et al. 2025 and Ahlmann-Eltze et al. 2025 for unseen genes.
    """

    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        return self._mean(context)


class Additive(WeightedBaseline):
    """Effects of single perturbations add up (Ahlmann-Eltze, Huber, Anders 2025).

    A single that was not measured in the context takes its mean over the other contexts, and
    one that was measured nowhere the mean effect (as in scPerturBench, Wei et al. 2025).
    """

    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        return once(added(self._single(s, context) for s in perturbation.singles))


class ShrunkenAdditive(Additive):
    """Additive over singles that are shrunk as whole vectors (James and Stein 1961).

    Each towards no change or the mean effect of its context, whichever has the smaller estimate
    of Stein's unbiased risk.
    """

    def _fit(self) -> None:
        self._shrunken: dict[int, Weights] = {}
        for rows in self.measured_.alone.values():
            mean = Weights.equal(rows)
            targets: list[Terms] = [[], [(1.0, mean)]]
            found = shrink(self.measured_, rows, [lambda j, t=t: t for t in targets])  # type: ignore[misc]
            for i, factor in zip(rows, found.factor, strict=True):
                rest = mean.times((1 - factor) * found.target)
                self._shrunken[i] = once(added([self.measured_.one(i).times(factor), rest]))

    def _single(self, single: Perturbation, context: str) -> Weights:
        raw = super()._single(single, context)
        if not len(raw.columns):
            return raw
        shrunken = [
            self._shrunken.get(int(i), self.measured_.one(int(i))).times(w)
            for i, w in zip(raw.columns, raw.values, strict=True)
        ]
        return once(added(shrunken))


class LargerSingle(Additive):
    """A combination does what the stronger of its singles does (full masking)."""

    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        singles = [self._single(s, context) for s in perturbation.singles]
        sums = self.measured_.assemble([[(1.0, w)] for w in singles])
        # Sizes without noise, or the single with the fewest cells would look strongest.
        sizes = (self.measured_.mean(sums) ** 2 - self.measured_.noise(sums)).sum(1)
        return singles[int(np.argmax(sizes))]


class MatchingMean(Additive):
    """A combination is the mean of its singles (Systema, Viñas Torné et al. 2025).

    A single that was not measured here takes its mean over other contexts, or the mean effect.
    """

    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        return super()._weights(perturbation, context).times(1 / len(perturbation.targets))
