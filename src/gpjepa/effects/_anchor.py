"""The closed-form prediction of a mean effect, on which the network may only improve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from gpjepa.perturbations import Perturbation

from ._scales import Scale, check_scale
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
        Regime of each pair: ``control``, ``seen``, ``seen2``/``seen1``/``seen0`` (a combination
        with that many targets measured alone), ``unseen`` (a target not measured alone),
        ``new dose`` or ``new context``.
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
    only in other contexts takes their mean times the same kind of slope over contexts, unless its
    singles were measured in this one; from a single other context nothing is carried over.

    Attributes
    ----------
    effects_
        The table it was fitted on.
    """

    def fit(self, effects: EffectTable) -> Self:
        """Fit on measured effects; each scale when it is first asked for."""
        self.effects_ = effects
        self._fits: dict[Scale, _ScaleFit] = {}
        self._rows = set(effects.rows)
        self._measured = {p for _, p in effects.rows}
        self._contexts = {c for c, _ in effects.rows}
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
        if scale not in self._fits:
            self._fits[scale] = _ScaleFit(self.effects_, check_scale(scale))
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
        if perturbation.is_control:
            return "control"
        if (context, perturbation) in self._rows:
            return "seen"
        alone = {p.targets[0] for p in self._measured if len(p.targets) == 1}
        here = {p.targets[0] for c, p in self._rows if c == context and len(p.targets) == 1}
        if not here.issuperset(perturbation.targets) and (
            perturbation in self._measured or context not in self._contexts
        ):
            return "new context"
        if len(perturbation.targets) == 1:
            return "new dose" if perturbation.targets[0] in alone else "unseen"
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
        if len({p.targets for p in perturbations}) < MIN_ROWS:
            contexts = sorted({c for c, _ in rows})
            return [np.array([c == out for c, _ in rows]) for out in contexts]
        folds = []
        for family in ("singles", "combinations"):
            # All doses of the same targets leave together.
            members = [p for p in perturbations if (len(p.targets) == 1) == (family == "singles")]
            units = sorted({p.targets for p in members})
            k = min(n_folds, len(units))
            fold = {targets: i % k for i, targets in enumerate(units)}
            folds += [np.array([fold.get(p.targets) == i for _, p in rows]) for i in range(k)]
        return folds


@dataclass(frozen=True)
class _Estimate:
    """Mean and variance of one effect, shape (n_genes,).

    ``shared`` says how much of the noise of the context's control profile is in the mean: errors of
    several estimates in one context move together by it.
    """

    mean: np.ndarray
    variance: np.ndarray
    shared: float = 0.0


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
        self.single: dict[tuple[str, Perturbation], _Estimate] = {}
        self.unseen: dict[str, _Estimate] = {}
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
        self.unseen[context] = self._fit_unseen(
            *_by_target([r[1].targets for r in rows], effect, own), control
        )
        if not singles:
            return
        # Towards the mean, the control noise cancels in d - t but stays in t.
        n, mean = len(rows), effect.mean(0)
        options = []
        for target, noise, left in (
            (np.zeros_like(mean), own + control, np.zeros_like(control)),
            (mean, own * (1 - 1 / n), control + own.mean(0) / n),
        ):
            total = noise.sum(1)
            square = np.maximum(((effect - target) ** 2).sum(1), 1e-12)
            # Stein's risk of the positive part, up to its small positive-part correction.
            risk = np.where(square > total, total - total**2 / square, square - total)
            options.append((risk.sum() + n * left.sum(), target, noise, left))
        _, target, noise, left = min(options, key=lambda option: option[0])
        for row, d, v in zip(rows, effect, noise, strict=True):
            factor = _james_stein(d - target, v)
            shared = 1.0 if left.any() else factor
            self.single[row] = _Estimate(
                target + factor * (d - target), max(factor, _least_factor(v)) * v + left, shared
            )

    def _fit_unseen(self, effect: np.ndarray, own: np.ndarray, control: np.ndarray) -> _Estimate:
        """Mean effect times the slope of each effect on the mean of the others.

        ⟨d_a, mean of the others⟩ carries the control variance that both share,
        E⟨d_a, m⟩ = ⟨δ_a, μ⟩ + Σ_g v_ctrl,g, so it is taken off. The residual d_a - s m carries it
        (1 - s)² times, the error of a prediction s² times.
        """
        n = len(effect)
        if n < MIN_ROWS:  # prior: the mean, shrunk by its own noise, and halved
            mean = effect.mean(0)
            factor = 0.5 * _james_stein(mean, own.mean(0) / n + control)
            return _Estimate(factor * mean, self.spread, factor)
        others = (effect.sum(0) - effect) / (n - 1)
        along = (effect * others).sum() - n * control.sum()
        slope = float(np.clip(along / max((others**2).sum(), 1e-12), 0, 1))
        residual = np.mean((effect - slope * others) ** 2 - own, axis=0)
        variance = np.maximum(residual - (1 - 2 * slope) * control, 0) + 0.1 * self.spread
        return _Estimate(slope * effect.mean(0), variance, slope)

    def _fit_transfer(self) -> float:
        """Slope of an effect on the mean of the same perturbation's effects in other contexts."""
        along = square = 0.0
        for perturbation in {p for _, p in self.effect}:
            mine = np.stack([e for (_, p), e in self.effect.items() if p == perturbation])
            if len(mine) < 2:
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
            parts = [self.single.get((context, s)) for s in perturbation.singles]
            known = [part for part in parts if part is not None]
            if len(parts) < 2 or len(known) < len(parts):
                continue
            added = np.sum([part.mean for part in known], axis=0)
            noise = self._distance_noise(context, perturbation, sum(p.shared for p in known))
            control = self.control_variance[context]
            own = [np.maximum(p.variance - p.shared**2 * control, 0) for p in known]
            misfit += ((effect - added) ** 2).sum() - noise.sum() - np.sum(own)
            size += (added**2).sum()
            n += 1
        if n < MIN_ROWS or size == 0:
            return _PRIOR_INTERACTION
        return max(misfit / size, 0.0)

    def _distance_noise(
        self, context: str, perturbation: Perturbation, shared: float
    ) -> np.ndarray:
        """Noise of a measured effect's distance to an estimate with a share of the control's."""
        own = self.own_variance[context, perturbation]
        return own + (1 - shared) ** 2 * self.control_variance[context]

    def predict(self, perturbation: Perturbation, context: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of one effect."""
        if perturbation.is_control:
            return np.zeros(self.n_genes), np.zeros(self.n_genes)
        if len(perturbation.targets) == 1:
            estimate = self._predict_single(perturbation, context)
        else:
            estimate = self._predict_combination(perturbation, context)
        return estimate.mean, estimate.variance

    def _predict_combination(self, perturbation: Perturbation, context: str) -> _Estimate:
        measured = (context, perturbation) in self.effect
        alone = all((context, s) in self.single for s in perturbation.singles)
        if not measured and not alone:
            carried = self._carried(context, lambda c: self.effect.get((c, perturbation)))
            if carried is not None:
                return carried
        parts = [self._predict_single(s, context) for s in perturbation.singles]
        mean = np.sum([part.mean for part in parts], axis=0)
        shares = np.array([part.shared for part in parts])
        together = max(shares.sum() ** 2 - (shares**2).sum(), 0)
        variance = np.sum([part.variance for part in parts], axis=0)
        variance += together * self.control_variance[context]
        variance += self.misfit * 0.5 * (mean**2 + (mean**2).mean())  # interaction
        if not measured:
            return _Estimate(mean, variance, float(shares.sum()))
        distance = self.effect[context, perturbation] - mean
        noise = self._distance_noise(context, perturbation, shares.sum())
        factor = _james_stein(distance, noise)
        direct = self.noise[context, perturbation]
        return _Estimate(
            mean + factor * distance,
            factor * direct + (1 - factor) * np.minimum(variance, direct),
            float(factor + (1 - factor) * shares.sum()),
        )

    def _predict_single(self, single: Perturbation, context: str) -> _Estimate:
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
        carried = self._carried(
            context, lambda c: self.unseen[c].mean if c in self.unseen else None
        )
        return carried or _Estimate(np.zeros(self.n_genes), self.spread)

    def _other_dose(self, single: Perturbation, context: str) -> _Estimate | None:
        """Between measured doses of the target: linear in log1p dose, from no effect at dose 0."""
        measured = {
            p.doses[0]: value
            for (c, p), value in self.single.items()
            if c == context and p.targets == single.targets
        }
        if not measured:
            return None
        zero = np.zeros(self.n_genes)
        points = [(0.0, _Estimate(zero, zero)), *sorted(measured.items(), key=lambda x: x[0])]
        dose = single.doses[0]
        above = next((i for i, (d, _) in enumerate(points) if d >= dose), None)
        if above is None:  # beyond the largest dose: as the largest, less sure
            last = points[-1][1]
            return _Estimate(last.mean, last.variance + 0.5 * self.spread, last.shared)
        (low, below), (high, beyond) = points[above - 1], points[above]
        share = (np.log1p(dose) - np.log1p(low)) / (np.log1p(high) - np.log1p(low))
        return _Estimate(
            (1 - share) * below.mean + share * beyond.mean,
            (1 - share) * below.variance + share * beyond.variance + 0.1 * self.spread,
            float((1 - share) * below.shared + share * beyond.shared),
        )

    def _carried(self, context: str, value: Callable[[str], np.ndarray | None]) -> _Estimate | None:
        """Mean over the other contexts times the transfer slope; from one context, nothing."""
        found = [value(c) for c in self.control_variance if c != context]
        elsewhere = [v for v in found if v is not None]
        if not elsewhere:
            return None
        if len(elsewhere) == 1:
            return _Estimate(np.zeros(self.n_genes), self.spread)
        mean = np.mean(elsewhere, axis=0)
        between = np.var(elsewhere, axis=0, ddof=1) * (1 + 1 / len(elsewhere))
        slope = self.transfer_slope
        return _Estimate(slope * mean, between + (1 - slope) * mean**2)


def _by_target(
    targets: list[tuple[str, ...]], effect: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Doses of one target are no independent rows: their mean, and its variance."""
    names = sorted(set(targets))
    code = np.array([names.index(t) for t in targets])
    member = (code == np.arange(len(names))[:, None]) / np.bincount(code)[:, None]
    return member @ effect, member**2 @ own


def _james_stein(distance: np.ndarray, variance: np.ndarray) -> float:
    """Positive-part factor by which a vector is kept; the rest is sampling noise."""
    square = float((distance**2).sum())
    return max(0.0, 1 - float(variance.sum()) / square) if square > 0 else 0.0


def _least_factor(variance: np.ndarray) -> float:
    """Sampling error of a James–Stein factor whose truth is 0: nothing is known more surely."""
    total = float(variance.sum())
    return (
        min(1.0, float(np.sqrt(2 * (variance.astype(float) ** 2).sum())) / total) if total else 0.0
    )
