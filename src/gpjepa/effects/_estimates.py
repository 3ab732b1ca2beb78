"""What the anchor says of one scale: estimates as weighted sums of measured effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.splits import MIN_UNITS

from ._regression import UnseenTargets, single_units
from ._scales import Scale
from ._stack import Experts, Stack, fit_stack, shrink
from ._table import EffectTable
from ._transfer import Transfer, transfer_experts

_PRIOR_INTERACTION = 0.1
"""Squared interaction over squared effect where too few combinations were measured. On Norman's
doubles (``published`` L2 of Ahlmann-Eltze 2025: additive 2.42, no change 5.82, sampling noise
taken off) it is 0.08."""

_SPREAD, _UNSEEN, _WITHOUT_FEATURES, _TRANSFER = range(4)  # kinds of residual variance
# Experts on combinations, by how many of their targets were measured alone.
_OTHERS = "mean of the combinations"
_BOTH = ("sum of the singles", "larger single", _OTHERS)
_PARTLY = ("measured targets", "targets never measured", _OTHERS)
_NEITHER = ("sum of the targets", _OTHERS)
_SURPLUS = 0.1  # share of the spread of effects that a residual variance never falls below


@dataclass(frozen=True)
class Share:
    """What one expert contributes to a prediction.

    Attributes
    ----------
    part
        The perturbation that the expert speaks of.
    expert
        Name of the expert.
    weight
        Its weight.
    weights, controls
        The weighted sum of measured effects, shape (n_rows,), and of control profiles, shape
        (n_contexts,), that it contributes, its weight included.
    """

    part: str
    expert: str
    weight: float
    weights: np.ndarray
    controls: np.ndarray

    def times(self, factor: float, role: str = "") -> Share:
        """The same share of a prediction that enters another with a factor, in some role."""
        return replace(
            self, weight=factor * self.weight, weights=factor * self.weights,
            controls=factor * self.controls,
            expert=f"{role}, {self.expert}" if role and self.part else self.expert,
        )  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """One mean effect as a weighted sum, and what remains unknown of it.

    Attributes
    ----------
    shares
        What each expert contributes.
    weights, controls
        Sums over the shares.
    left
        Weights on the variances of the profiles of what shrinkage leaves unknown.
    residual
        Weights on the kinds of residual variance.
    interaction
        Weight on the variance of interactions.
    """

    shares: tuple[Share, ...]
    weights: np.ndarray
    controls: np.ndarray
    left: np.ndarray
    residual: np.ndarray
    interaction: float = 0.0

    def times(self, factor: float) -> Estimate:
        """The estimate times a factor."""
        return Estimate(
            tuple(s.times(factor) for s in self.shares), factor * self.weights,
            factor * self.controls, factor**2 * self.left, factor**2 * self.residual,
            factor**2 * self.interaction,
        )  # fmt: skip


def total(estimates: Sequence[Estimate]) -> Estimate:
    """Sum of estimates; what each leaves unknown is independent of the others."""
    return Estimate(
        tuple(share for e in estimates for share in e.shares),
        np.sum([e.weights for e in estimates], axis=0),
        np.sum([e.controls for e in estimates], axis=0),
        np.sum([e.left for e in estimates], axis=0),
        np.sum([e.residual for e in estimates], axis=0),
        float(np.sum([e.interaction for e in estimates])),
    )


_Row = tuple[Any, ...]  # a row of the table, then per expert the estimates that it adds up


class ScaleFit:
    """The anchor on one scale."""

    def __init__(
        self, effects: EffectTable, scale: Scale, features: Sequence[TargetFeatures] = ()
    ) -> None:
        self.effects, self.scale = effects, scale
        self.row = {row: i for i, row in enumerate(effects.rows)}
        self.values = effects.effect[scale].astype(float)
        self.controls = effects.control_profiles(scale)
        self.variance = effects.profile_variance(scale)
        self.inner = self.values @ self.values.T
        self.spread = self._spread()
        self.unseen = UnseenTargets(features, scale=scale).fit(effects)
        self.transfer = Transfer("mean", scale).fit(effects)
        # From a single other context nothing is carried over. Two weights rest on all genes of all
        # rows, so that a few contexts are enough to fit them.
        self.transfer_stack = fit_stack(
            effects, scale, transfer_experts(self.transfer), np.zeros(2), min_units=2
        )
        self.alone = {p.targets[0] for _, p in effects.rows if len(p.targets) == 1}
        self.combinations: dict[str, list[int]] = {}
        for i, (context, perturbation) in enumerate(effects.rows):
            if len(perturbation.targets) > 1:
                self.combinations.setdefault(context, []).append(i)
        self._cache: dict[tuple[str, Perturbation], Estimate] = {}
        self._shrink_singles()
        self._fit_combinations()

    # Fitting

    def _spread(self) -> np.ndarray:
        """Noise-corrected mean square of the effects per gene: how large an effect may be."""
        if not len(self.values):
            return np.zeros(self.values.shape[1])
        square = np.mean(self.values**2 - self.effects.noise(self.scale), axis=0)
        return np.maximum(square, 0) + max(square.mean(), 0) * _SURPLUS

    def _shrink_singles(self) -> None:
        """Towards no change, the mean effect, or what is predicted of each without itself."""
        names = ("no change", "mean effect of the context", "prediction without it")
        for context in sorted({c for c, _ in self.effects.rows}):
            units = single_units(self.effects, context)
            rows = [i for i in units.rows if len(self.effects.rows[i][1].targets) == 1]
            if not rows:
                continue
            mean = np.tile(units.mean.mean(0), (len(rows), 1))
            targets = [np.zeros_like(mean), mean]
            if self.unseen.features and len(units.targets) > 1:
                targets.append(self.unseen.left_out(context))
            found = shrink(self.effects, rows, targets, self.scale)
            towards = targets[found.target]
            for j, i in enumerate(rows):
                perturbation, factor = self.effects.rows[i][1], float(found.factor[j])
                shares = [self._share(perturbation, "measured effect", factor, self._one(i))]
                if found.target:
                    other = names[found.target]
                    shares.append(self._share(perturbation, other, 1 - factor, towards[j]))
                self._cache[context, perturbation] = self._estimate(shares, left=found.left[j])

    def _fit_combinations(self) -> None:
        """Weights of experts for combinations, by how many of their targets were measured."""
        both: list[_Row] = []
        partly: list[_Row] = []
        neither: list[_Row] = []
        for i in sorted(i for rows in self.combinations.values() for i in rows):
            context, perturbation = self.effects.rows[i]
            singles = perturbation.singles
            parts = [self.single(s, context) for s in singles]
            known = [s.targets[0] in self.alone for s in singles]
            others = self._mean_combination(context, without=i)
            if all((context, s) in self.row for s in singles):
                both.append((i, parts, [self._larger(parts)], [others]))
                # As if one, or all, of them had never been measured alone.
                for j, single in enumerate(singles):
                    rest = parts[:j] + parts[j + 1 :]
                    out = [self._left_out(single, context, single.targets)]
                    partly.append((i, rest, out, [self._without(context, single.targets)]))
                out = [self._left_out(s, context, perturbation.targets) for s in singles]
                neither.append((i, out, [self._without(context, perturbation.targets)]))
            elif not any(known):
                neither.append((i, parts, [others]))
            else:
                partly.append((i, *_divide(parts, known), [others]))
        self.both = self._fit_parts(both, np.array([1.0, 0.0, 0.0]))
        self.partly = self._fit_parts(partly, np.array([1.0, 1.0, 0.0]))
        self.neither = self._fit_parts(neither, np.array([1.0, 0.0]))
        self.misfit = self._misfit(both)

    def _mean_combination(self, context: str, without: int | None = None) -> Estimate:
        """Mean effect of the measured combinations of a context, but for one row."""
        return self._mean_of([i for i in self.combinations.get(context, []) if i != without])

    def _without(self, context: str, targets: Sequence[str]) -> Estimate:
        """Mean effect of the combinations that have none of the targets."""
        rows = self.effects.rows
        mine = self.combinations.get(context, [])
        return self._mean_of([i for i in mine if not set(rows[i][1].targets) & set(targets)])

    def _mean_of(self, rows: list[int]) -> Estimate:
        weights = np.zeros(len(self.row))
        weights[rows] = 1 / max(len(rows), 1)
        share = Share("", _OTHERS, 1.0, weights, np.zeros(len(self.controls)))
        return self._estimate([share])

    def _fit_parts(self, found: list[_Row], prior: np.ndarray) -> Stack:
        """Stack sums of parts: each item is a row and, per expert, the estimates it adds up."""
        k, n = len(prior), len(found)
        weights = np.zeros((k, n, len(self.row)))
        controls = np.zeros((k, n, len(self.controls)))
        for i, (_, *experts) in enumerate(found):
            for j, parts in enumerate(experts):
                for part in parts:
                    weights[j, i] += part.weights
                    controls[j, i] += part.controls
        rows = [item[0] for item in found]
        units = [self.effects.rows[i][1].targets for i in rows]
        return fit_stack(self.effects, self.scale, Experts(rows, weights, units, controls), prior)

    def _misfit(self, both: list[_Row]) -> float:
        """Squared interaction over squared predicted effect, freed of sampling noise."""
        if self.both.n_units < MIN_UNITS:
            return _PRIOR_INTERACTION
        apart = size = 0.0
        for i, *experts in both:
            estimate = _weigh(experts, self.both.weights, _BOTH)
            mean = self.mean([estimate])[0]
            noise = (self._on_profiles(self._one(i)) - self._on_profiles(estimate.weights)) ** 2
            apart += ((self.values[i] - mean) ** 2).sum()
            apart -= ((noise + estimate.left) @ self.variance).sum()
            size += (mean**2).sum()
        return max(apart / size, 0.0) if size > 0 else _PRIOR_INTERACTION

    # Estimates

    def estimate(self, perturbation: Perturbation, context: str) -> Estimate:
        """One mean effect."""
        if perturbation.is_control:
            return self._estimate([])
        if len(perturbation.targets) == 1:
            return self.single(perturbation, context)
        return self._combination(perturbation, context)

    def mean(self, estimates: Sequence[Estimate]) -> np.ndarray:
        """Predicted mean effects, shape (n_estimates, n_genes)."""
        weights = np.array([e.weights for e in estimates])
        controls = np.array([e.controls for e in estimates])
        mean = weights @ self.values
        return mean + controls @ self.controls if controls.any() else mean

    def variances(
        self, estimates: Sequence[Estimate], mean: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sampling noise of the predictions, and what the priors leave; each as ``mean``."""
        weights = np.array([e.weights for e in estimates])
        controls = np.array([e.controls for e in estimates])
        noise = self.effects.on_profiles(weights, controls) ** 2 @ self.variance
        left = np.array([e.left for e in estimates]) @ self.variance
        left += np.array([e.residual for e in estimates]) @ self._residuals
        interaction = np.array([e.interaction for e in estimates])[:, None]
        square = mean**2
        left += interaction * 0.5 * (square + square.mean(1, keepdims=True))
        return noise, left

    @property
    def _residuals(self) -> np.ndarray:
        """Residual variances of each kind, shape (4, n_genes)."""
        kinds = (None, self.unseen.stack_, self.unseen.mean_stack_, self.transfer_stack)
        return np.stack(
            [
                self.spread if kind is None or kind.residual is None
                else kind.residual + _SURPLUS * self.spread
                for kind in kinds
            ]
        )  # fmt: skip

    def single(self, single: Perturbation, context: str) -> Estimate:
        """A target alone: measured here, at another dose, elsewhere, or never."""
        key = context, single
        if key not in self._cache:
            self._cache[key] = (
                self._other_dose(single, context)
                or self._carried(single, context, lambda c: self._measured(single, c))
                or self._never_measured(single, context)
            )
        return self._cache[key]

    def _combination(self, perturbation: Perturbation, context: str) -> Estimate:
        singles = perturbation.singles
        measured = self.row.get((context, perturbation))
        if measured is None and not all((context, s) in self.row for s in singles):
            carried = self._carried(
                perturbation, context, lambda c: self._measured(perturbation, c)
            )
            if carried is not None:
                return carried
        expected = self._expected(perturbation, context)
        if measured is None:
            return replace(expected, interaction=self.misfit)
        return self._towards(measured, expected)

    def _expected(self, perturbation: Perturbation, context: str) -> Estimate:
        """A combination from its singles alone."""
        parts = [self.single(s, context) for s in perturbation.singles]
        known = [s.targets[0] in self.alone for s in perturbation.singles]
        others = self._mean_combination(context, self.row.get((context, perturbation)))
        if all(known):
            return _weigh([parts, [self._larger(parts)], [others]], self.both.weights, _BOTH)
        if not any(known):
            return _weigh([parts, [others]], self.neither.weights, _NEITHER)
        return _weigh([*_divide(parts, known), [others]], self.partly.weights, _PARTLY)

    def _towards(self, row: int, expected: Estimate) -> Estimate:
        """A measured combination, shrunk towards what its singles say."""
        if expected.controls.any():  # a sum that rests on controls elsewhere is no target
            expected = self._estimate([])
        found = shrink(self.effects, [row], [expected.weights[None]], self.scale)
        factor = float(found.factor[0])
        own = self._share(self.effects.rows[row][1], "measured effect", factor, self._one(row))
        rest = expected.times(1 - factor)
        return self._estimate([own, *rest.shares], left=found.left[0])

    def _other_dose(self, single: Perturbation, context: str) -> Estimate | None:
        """Between measured doses of the target: linear in log1p dose, from no effect at dose 0."""
        points = sorted(
            (p.doses[0], self._cache[c, p])
            for c, p in self.row
            if c == context and p.targets == single.targets
        )
        if not points:
            return None
        points = [(0.0, self._estimate([])), *points]
        dose = single.doses[0]
        above = next((i for i, (d, _) in enumerate(points) if d >= dose), None)
        if above is None:  # beyond the largest dose: as the largest, less sure
            return _less_sure(points[-1][1], _SPREAD, 0.5)
        (low, below), (high, beyond) = points[above - 1], points[above]
        share = float((np.log1p(dose) - np.log1p(low)) / (np.log1p(high) - np.log1p(low)))
        between = total([below.times(1 - share), beyond.times(share)])
        return _less_sure(between, _SPREAD, _SURPLUS)

    def _never_measured(self, single: Perturbation, context: str) -> Estimate:
        target = single.targets[0]
        if any(c == context for c, _ in self.row):
            found, weights = self.unseen.of_target(target, context)
            shares = [
                self._share(single, name, float(w), rows)
                for name, w, rows in zip(self.unseen.experts, weights, found, strict=False)
                if w
            ]
            covered = self.unseen.covers(target)
            kind = _UNSEEN if covered else _WITHOUT_FEATURES
            kriging = self.unseen.kriging(target, context) if covered else 1.0
            return _less_sure(self._estimate(shares), kind, kriging)
        contexts = {c for c, _ in self.row}
        carried = self._carried(
            single, context, lambda c: self._never_measured(single, c) if c in contexts else None
        )
        return carried or _less_sure(self._estimate([]), _SPREAD, 1.0)

    def _measured(self, perturbation: Perturbation, context: str) -> Estimate | None:
        row = self.row.get((context, perturbation))
        if row is None:
            return None
        return self._estimate([self._share(perturbation, "measured effect", 1.0, self._one(row))])

    def _carried(
        self, perturbation: Perturbation, context: str,
        source: Callable[[str], Estimate | None],
    ) -> Estimate | None:  # fmt: skip
        """From the other contexts: their mean, and how their controls differ from these."""
        found = {c: source(c) for c in self.effects.contexts if c != context}
        sources = {c: e for c, e in found.items() if e is not None}
        if not sources:
            return None
        if len(sources) == 1:
            return _less_sure(self._estimate([]), _SPREAD, 1.0)
        mean, state = self.transfer_stack.weights
        away = np.array([(c in sources) / len(sources) for c in self.effects.contexts])
        away[self.effects.contexts.index(context)] = -1
        elsewhere = total([e.times(1 / len(sources)) for e in sources.values()])
        shares = [
            self._share(
                perturbation, "mean effect elsewhere", float(mean), elsewhere.weights
            ),
            self._share(
                perturbation, "controls elsewhere - controls here", float(state),
                np.zeros(len(self.row)), away,
            ),
        ]  # fmt: skip
        return _less_sure(self._estimate([s for s in shares if s.weight]), _TRANSFER, 1.0)

    def _larger(self, parts: Sequence[Estimate]) -> Estimate:
        """The part whose effect is largest."""
        return parts[int(np.argmax([p.weights @ self.inner @ p.weights for p in parts]))]

    def _left_out(self, single: Perturbation, context: str, without: Sequence[str]) -> Estimate:
        """What would be said of a target if some had never been measured, itself among them."""
        found, weights = self.unseen.of_target(single.targets[0], context, without)
        return self._estimate([self._share(single, "prediction without it", 1.0, weights @ found)])

    # Pieces

    def _one(self, row: int) -> np.ndarray:
        weights = np.zeros(len(self.row))
        weights[row] = 1
        return weights

    def _share(
        self, perturbation: Perturbation, expert: str, weight: float, weights: np.ndarray,
        controls: np.ndarray | None = None,
    ) -> Share:  # fmt: skip
        if controls is None:
            controls = np.zeros(len(self.controls))
        return Share(perturbation.label(), expert, weight, weight * weights, weight * controls)

    def _on_profiles(self, weights: np.ndarray) -> np.ndarray:
        return self.effects.on_profiles(weights[None])[0]

    def _estimate(self, shares: Sequence[Share], left: np.ndarray | None = None) -> Estimate:
        n = len(self.row) + len(self.controls)
        return Estimate(
            tuple(shares),
            np.sum([s.weights for s in shares], axis=0) if shares else np.zeros(len(self.row)),
            np.sum([s.controls for s in shares], axis=0) if shares else np.zeros(len(self.controls)),
            np.zeros(n) if left is None else left,
            np.zeros(4),
        )  # fmt: skip


def _divide(parts: list[Estimate], known: list[bool]) -> tuple[list[Estimate], list[Estimate]]:
    """The parts that were measured, and those that were not."""
    first = [p for p, k in zip(parts, known, strict=True) if k]
    return first, [p for p, k in zip(parts, known, strict=True) if not k]


def _weigh(
    experts: Sequence[list[Estimate]], weights: np.ndarray, names: Sequence[str]
) -> Estimate:
    """Weighted sum of experts, each a sum of estimates; one estimate may be in several experts."""
    factor: dict[int, float] = {}
    shares: list[Share] = []
    for parts, weight, name in zip(experts, weights, names, strict=True):
        for part in parts:
            factor[id(part)] = factor.get(id(part), 0.0) + float(weight)
            if weight:
                shares += [share.times(float(weight), name) for share in part.shares]
    once = {id(part): part for parts in experts for part in parts}
    return replace(
        total([part.times(factor[key]) for key, part in once.items()]), shares=tuple(shares)
    )


def _less_sure(estimate: Estimate, kind: int, by: float) -> Estimate:
    """The estimate with residual variance of a kind."""
    residual = estimate.residual.copy()
    residual[kind] += by
    return replace(estimate, residual=residual)
