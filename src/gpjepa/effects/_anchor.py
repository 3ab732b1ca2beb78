"""The closed-form prediction of a mean effect, on which the network may only improve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from gpjepa.perturbations import Perturbation

from ._scales import SCALES, Scale
from ._table import EffectTable

MIN_ROWS = 5
"""Fewer independent rows than this do not fit a quantity; a documented prior stands in."""

_PRIOR_INTERACTION = 0.1
"""Squared interaction over squared effect where too few combinations were measured. On Norman's
doubles (``published`` L2 of Ahlmann-Eltze 2025: additive 2.42, no change 5.82, sampling noise
taken off) it is 0.08."""


@dataclass(frozen=True)
class AnchorPrediction:
    """Predicted mean effects.

    Attributes
    ----------
    mean, variance
        Shape (n_pairs, n_genes).
    regime
        Regime of each pair: ``control``, ``seen``, ``seen2``/``seen1``/``seen0``, ``unseen`` or
        ``new context``.
    """

    mean: np.ndarray
    variance: np.ndarray
    regime: list[str]


class EffectAnchor:
    r"""Closed-form prediction of mean effects: shrunken additive, shrunken mean, mean transfer.

    A measured single is shrunk as a whole vector towards *t*, no change or the mean effect of the
    context, by the positive-part James–Stein factor
    :math:`1 - \sum_g \mathrm{Var}(d_g - t_g) / \lVert d - t\rVert^2` (James and Stein 1961; Efron
    and Morris 1973); Stein's unbiased risk estimate, summed over the context, chooses *t*.
    Combinations are sums of their shrunken singles, or, when measured, shrunk towards that sum. A
    target that was never perturbed takes the mean effect times its own out-of-fold regression
    slope, freed of the control noise that all effects of a context share. A perturbation measured
    only in other contexts takes their mean times the same kind of slope over contexts; from a
    single other context nothing is carried over.

    Attributes
    ----------
    effects_
        The table it was fitted on.
    """

    def fit(self, effects: EffectTable) -> Self:
        """Fit on measured effects, on both scales."""
        self.effects_ = effects
        self._fits = {scale: _ScaleFit(effects, scale) for scale in SCALES}
        return self

    def predict(
        self, perturbations: Sequence[Perturbation], contexts: Sequence[str], scale: Scale
    ) -> AnchorPrediction:
        """Predict the mean effect of each pair of perturbation and context.

        Raises
        ------
        KeyError
            If a context has no control cells in the table.
        """
        fit = self._fits[scale]
        unknown = sorted(set(contexts) - set(self.effects_.contexts))
        if unknown:
            raise KeyError(f"Contexts without control cells in training: {unknown}.")
        pairs = list(zip(perturbations, contexts, strict=True))
        predicted = [fit.predict(p, c) for p, c in pairs]
        shape = (len(pairs), len(self.effects_.genes))
        return AnchorPrediction(
            np.array([m for m, _ in predicted], np.float32).reshape(shape),
            np.array([v for _, v in predicted], np.float32).reshape(shape),
            [self.regime(p, c) for p, c in pairs],
        )

    def regime(self, perturbation: Perturbation, context: str) -> str:
        """What training knew of the perturbation in the context."""
        rows = set(self.effects_.rows)
        measured = {p for _, p in rows}
        if perturbation.is_control:
            return "control"
        if (context, perturbation) in rows:
            return "seen"
        if perturbation in measured or context not in {c for c, _ in rows}:
            return "new context"
        if len(perturbation.targets) == 1:
            return "unseen"
        alone = {p.targets[0] for p in measured if len(p.targets) == 1}
        return f"seen{sum(t in alone for t in perturbation.targets)}"

    def out_of_fold(self, scale: Scale, n_folds: int = 10) -> np.ndarray:
        """Predict every training row without it, shape (n_rows, n_genes).

        Singles are left out of all contexts at once and become unseen; combinations are left out
        while their singles stay. With fewer than five perturbations the rows of one context are
        left out instead.
        """
        rows = self.effects_.rows
        result = np.zeros((len(rows), len(self.effects_.genes)), np.float32)
        for out in self._folds(n_folds):
            rest = EffectAnchor().fit(self.effects_.subset(~out))
            where = np.flatnonzero(out)
            part = rest.predict([rows[i][1] for i in where], [rows[i][0] for i in where], scale)
            result[where] = part.mean
        return result

    def _folds(self, n_folds: int) -> list[np.ndarray]:
        rows, perturbations = self.effects_.rows, self.effects_.perturbations
        if len(perturbations) < MIN_ROWS:
            contexts = sorted({c for c, _ in rows})
            return [np.array([c == out for c, _ in rows]) for out in contexts]
        folds = []
        for family in ("singles", "combinations"):
            members = [p for p in perturbations if (len(p.targets) == 1) == (family == "singles")]
            k = min(n_folds, len(members))
            fold = {p: i % k for i, p in enumerate(members)}
            folds += [np.array([fold.get(p) == i for _, p in rows]) for i in range(k)]
        return folds


class _ScaleFit:
    """The anchor on one scale."""

    def __init__(self, effects: EffectTable, scale: Scale) -> None:
        self.n_genes = len(effects.genes)
        self.control_variance = effects.control_variance[scale]
        self.effect = dict(zip(effects.rows, effects.effect[scale].astype(float), strict=True))
        self.own_variance = dict(zip(effects.rows, effects.variance[scale], strict=True))
        noise = effects.noise(scale)
        self.noise = dict(zip(effects.rows, noise, strict=True))
        self.spread = self._spread()
        self.single: dict[tuple[str, Perturbation], tuple[np.ndarray, np.ndarray]] = {}
        self.unseen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for context in sorted({c for c, _ in effects.rows}):
            self._fit_context(context)
        self.transfer_slope = self._fit_transfer()
        self.misfit = self._fit_misfit()

    def _spread(self) -> np.ndarray:
        """Noise-corrected mean square of the effects per gene: how large an effect may be."""
        if not self.effect:
            return np.zeros(self.n_genes)
        square = np.mean([e**2 - self.noise[row] for row, e in self.effect.items()], axis=0)
        return np.maximum(square, 0) + max(square.mean(), 0) * 0.1

    def _fit_context(self, context: str) -> None:
        singles = [r for r in self.effect if r[0] == context and len(r[1].targets) == 1]
        rows = singles or [r for r in self.effect if r[0] == context]
        effect = np.stack([self.effect[r] for r in rows])
        own = np.stack([self.own_variance[r] for r in rows])
        control = self.control_variance[context]
        self.unseen[context] = self._fit_unseen(effect, own, control)
        if not singles:
            return
        # Towards the mean, the control noise cancels in d - t but stays in t.
        mean = effect.mean(0)
        options = []
        for target, noise, left in (
            (np.zeros_like(mean), own + control, np.zeros_like(control)),
            (mean, own, control),
        ):
            total = noise.sum(1)
            square = np.maximum(((effect - target) ** 2).sum(1), 1e-12)
            # Stein's risk of the positive part, up to its small positive-part correction.
            risk = np.where(square > total, total - total**2 / square, square - total)
            options.append((risk.sum() + len(rows) * left.sum(), target, noise, left))
        _, target, noise, left = min(options, key=lambda option: option[0])
        for row, d, v in zip(rows, effect, noise, strict=True):
            factor = _james_stein(d - target, v)
            self.single[row] = (target + factor * (d - target), factor * v + left)

    def _fit_unseen(
        self, effect: np.ndarray, own: np.ndarray, control: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean effect times the slope of each effect on the mean of the others.

        ⟨d_a, mean of the others⟩ carries the control variance that both share,
        E⟨d_a, m⟩ = ⟨δ_a, μ⟩ + Σ_g v_ctrl,g, so it is taken off.
        """
        n = len(effect)
        if n < MIN_ROWS:  # prior: the mean, shrunk by its own noise, and halved
            mean = effect.mean(0)
            factor = 0.5 * _james_stein(mean, own.mean(0) / n + control)
            return factor * mean, self.spread
        others = (effect.sum(0) - effect) / (n - 1)
        along = (effect * others).sum() - n * control.sum()
        slope = float(np.clip(along / max((others**2).sum(), 1e-12), 0, 1))
        mean = slope * effect.mean(0)
        variance = np.mean((effect - slope * others) ** 2 - own - control, axis=0)
        return mean, np.maximum(variance, 0) + 0.1 * self.spread

    def _fit_transfer(self) -> float:
        """Slope of an effect on the mean of the same perturbation's effects in other contexts."""
        along = square = 0.0
        for perturbation in {p for _, p in self.effect}:
            mine = np.stack([e for (_, p), e in self.effect.items() if p == perturbation])
            if len(mine) < 3:
                continue
            others = (mine.sum(0) - mine) / (len(mine) - 1)
            along += (mine * others).sum()
            square += (others**2).sum()
        return float(np.clip(along / square, 0, 1)) if square else 0.0

    def _fit_misfit(self) -> float:
        """Squared interaction over squared additive effect, freed of sampling noise."""
        misfit = size = 0.0
        n = 0
        for (context, perturbation), effect in self.effect.items():
            parts = [(context, s) for s in perturbation.singles]
            if len(parts) < 2 or not all(part in self.single for part in parts):
                continue
            added = np.sum([self.single[part][0] for part in parts], axis=0)
            noise = self.noise[context, perturbation].sum()
            noise += sum(self.single[part][1].sum() for part in parts)
            misfit += ((effect - added) ** 2).sum() - noise
            size += (added**2).sum()
            n += 1
        if n < MIN_ROWS or size == 0:
            return _PRIOR_INTERACTION
        return max(misfit / size, 0.0)

    def predict(self, perturbation: Perturbation, context: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of one effect."""
        if perturbation.is_control:
            return np.zeros(self.n_genes), np.zeros(self.n_genes)
        if len(perturbation.targets) == 1:
            return self._predict_single(perturbation, context)
        carried = self._carried(context, lambda c: self.effect.get((c, perturbation)))
        if carried is not None and (context, perturbation) not in self.effect:
            return carried
        parts = [self._predict_single(s, context) for s in perturbation.singles]
        mean = np.sum([m for m, _ in parts], axis=0)
        interaction = self.misfit * 0.5 * (mean**2 + (mean**2).mean())
        variance = np.sum([v for _, v in parts], axis=0) + interaction
        if (context, perturbation) in self.effect:
            distance = self.effect[context, perturbation] - mean
            factor = _james_stein(distance, self.noise[context, perturbation])
            return mean + factor * distance, factor * self.noise[context, perturbation] + (
                1 - factor
            ) * np.minimum(variance, self.noise[context, perturbation])
        return mean, variance

    def _predict_single(self, single: Perturbation, context: str) -> tuple[np.ndarray, np.ndarray]:
        if (context, single) in self.single:
            return self.single[context, single]
        other_dose = self._other_dose(single, context)
        if other_dose is not None:
            return other_dose
        carried = self._carried(context, lambda c: self.effect.get((c, single)))
        if carried is not None:
            return carried
        if context in self.unseen:
            return self.unseen[context]
        carried = self._carried(context, lambda c: self.unseen[c][0] if c in self.unseen else None)
        return carried if carried is not None else (np.zeros(self.n_genes), self.spread)

    def _other_dose(
        self, single: Perturbation, context: str
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Between measured doses of the target: linear in log1p dose, from no effect at dose 0."""
        measured = {
            p.doses[0]: value
            for (c, p), value in self.single.items()
            if c == context and p.targets == single.targets
        }
        if not measured:
            return None
        zero = np.zeros(self.n_genes)
        points = [(0.0, (zero, zero)), *sorted(measured.items())]
        dose = single.doses[0]
        above = next((i for i, (d, _) in enumerate(points) if d >= dose), None)
        if above is None:  # beyond the largest dose: as the largest, less sure
            mean, variance = points[-1][1]
            return mean, variance + 0.5 * self.spread
        (low, (m0, v0)), (high, (m1, v1)) = points[above - 1], points[above]
        share = np.log1p(dose - low) / np.log1p(high - low)
        return (1 - share) * m0 + share * m1, (1 - share) * v0 + share * v1 + 0.1 * self.spread

    def _carried(
        self, context: str, value: Callable[[str], np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean over the other contexts times the transfer slope; from one context, nothing."""
        found = [value(c) for c in self.control_variance if c != context]
        elsewhere = [v for v in found if v is not None]
        if not elsewhere:
            return None
        if len(elsewhere) == 1:
            return np.zeros(self.n_genes), self.spread
        mean = np.mean(elsewhere, axis=0)
        between = np.var(elsewhere, axis=0, ddof=1) * (1 + 1 / len(elsewhere))
        slope = self.transfer_slope
        return slope * mean, between + (1 - slope) * mean**2


def _james_stein(distance: np.ndarray, variance: np.ndarray) -> float:
    """Positive-part factor by which a vector is kept; the rest is sampling noise."""
    square = float((distance**2).sum())
    return max(0.0, 1 - float(variance.sum()) / square) if square > 0 else 0.0
