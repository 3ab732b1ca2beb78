"""What the anchor says of one scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.splits import MIN_UNITS

from ._regression import UnseenTargets, single_units
from ._scales import Scale
from ._stack import Experts, Stack, fit_stack, shrink, stack_residual
from ._table import EffectTable
from ._transfer import MIN_CONTEXTS, Transfer, transfer_experts
from ._weighted import Estimate, Share, less_sure, total, weigh

_PRIOR_INTERACTION = 0.1
"""Squared interaction over squared effect where too few combinations were measured. On Norman's
doubles (``published`` L2 of Ahlmann-Eltze 2025: additive 2.42, no change 5.82, sampling noise
taken off) it is 0.08."""

# Kinds of residual variance.
_SPREAD, _UNSEEN, _WITHOUT_FEATURES, _TRANSFER, _COMBINATIONS = range(5)
# Experts on combinations, by how many of their targets were measured alone.
_OTHERS = "mean of the combinations"
_BOTH = ("sum of the singles", "larger single", _OTHERS)
_PARTLY = ("measured targets", "targets never measured", _OTHERS)
_NEITHER = ("sum of the targets", _OTHERS)
_STANDS_OUT = 3.0  # standard deviations
_SURPLUS = 0.1  # share of the spread of effects that a residual variance never falls below


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
        elsewhere = transfer_experts(self.transfer)
        self.transfer_stack = fit_stack(
            effects, scale, elsewhere, np.zeros(2), min_units=MIN_CONTEXTS
        )
        transfer_residual = stack_residual(effects, scale, elsewhere, self.transfer_stack.weights)
        kinds = (None, self.unseen.residual_, self.unseen.mean_residual_, transfer_residual)
        self.alone = {(c, p.targets[0]) for c, p in effects.rows if len(p.targets) == 1}
        self.combinations: dict[str, list[int]] = {}
        for i, (context, perturbation) in enumerate(effects.rows):
            if len(perturbation.targets) > 1:
                self.combinations.setdefault(context, []).append(i)
        # Residual variances of each kind, shape (5, n_genes).
        self.residuals = np.stack(
            [
                self.spread if r is None else r + _SURPLUS * self.spread
                for r in (*kinds, self._apart_from_mean())
            ]
        )
        self._cache: dict[tuple[str, Perturbation], Estimate] = {}
        self.bias = np.zeros_like(self.values)
        self._shrink_singles()
        self._fit_combinations()

    # Fitting

    def _spread(self) -> np.ndarray:
        """Noise-corrected mean square of the effects per gene: how large an effect may be.

        At least the noise of the controls: less than that is not significantly different from no effect.
        """
        floor = np.full(self.values.shape[1], self.variance[len(self.row) :].mean())
        if not len(self.values):
            return floor
        square = np.mean(self.values**2 - self.effects.noise(self.scale), axis=0)
        return np.maximum(np.maximum(square, 0) + max(square.mean(), 0) * _SURPLUS, floor)

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
                estimate = self._estimate(shares, left=found.left[j])
                self._cache[context, perturbation] = self._seen_bias(estimate, i)

    def _seen_bias(self, estimate: Estimate, row: int) -> Estimate:
        """What shrinkage took off a measured effect, gene by gene, beyond what its noise explains.

        One factor serves all genes, so that it takes too much off the few that respond strongly.
        """
        apart = self.values[row] - self.mean([estimate])[0]
        taken = self._on_profiles(self._one(row)) - self._on_profiles(estimate.weights)
        explained = (taken**2 + estimate.left) @ self.variance
        # Only what stands out: the positive part of noise would add up to a bias everywhere.
        strong = apart**2 > _STANDS_OUT**2 * explained
        self.bias[row] = np.where(strong, apart**2 - explained, 0)
        return replace(estimate, bias=self._one(row))

    def _fit_combinations(self) -> None:
        """Weights of experts for combinations, by how many of their targets were measured."""
        both: list[_Row] = []
        partly: list[_Row] = []
        neither: list[_Row] = []
        for i in sorted(i for rows in self.combinations.values() for i in rows):
            context, perturbation = self.effects.rows[i]
            singles = perturbation.singles
            known = [self._known(s, context) for s in singles]
            # Where nothing was perturbed alone, combinations predict each other: not themselves.
            own = ["+".join(perturbation.targets)]
            parts = [
                self.single(s, context) if k else self._left_out(s, context, own)
                for s, k in zip(singles, known, strict=True)
            ]
            others = self._mean_combination(context, without=i)
            if not all(known):
                experts = _divide(parts, known) if any(known) else (parts,)
                (partly if any(known) else neither).append((i, *experts, [others]))
                continue
            both.append((i, parts, [self._larger(parts)], [others]))
            if not all((context, s) in self.row for s in singles):
                continue
            # As if one, or all, of them had never been measured alone.
            for j, single in enumerate(singles):
                one = [self._left_out(single, context, single.targets)]
                rest = parts[:j] + parts[j + 1 :]
                partly.append((i, rest, one, [self._without(context, single.targets)]))
            all_out = [self._left_out(s, context, perturbation.targets) for s in singles]
            neither.append((i, all_out, [self._without(context, perturbation.targets)]))
        self.both = self._fit_parts(both, np.array([1.0, 0.0, 0.0]))
        self.partly = self._fit_parts(partly, np.array([1.0, 1.0, 0.0]))
        self.neither = self._fit_parts(neither, self._prior_of_neither())
        if self.combinations:  # what is not taken of their mean is unknown of another one
            means = [self.values[rows].mean(0) ** 2 for rows in self.combinations.values()]
            untaken = (1 - min(self.neither.weights[1], 1)) ** 2
            self.residuals[_COMBINATIONS] += untaken * np.mean(means, 0)
        self.misfit = self._misfit(both)

    def _known(self, single: Perturbation, context: str) -> bool:
        """Whether its target was measured alone: here, at whatever dose, or in enough contexts."""
        here = (context, single.targets[0]) in self.alone
        return here or self.effects.can_be_carried(single, context)

    def _mean_combination(self, context: str, without: int | None = None) -> Estimate:
        """Mean effect of the measured combinations, but for one row; else of other contexts."""
        mine = [i for i in self.combinations.get(context, []) if i != without]
        if mine or without is not None:
            return self._mean_of([mine])
        return self._mean_of(list(self.combinations.values()))

    def _without(self, context: str, targets: Sequence[str]) -> Estimate:
        """Mean effect of the combinations that have none of the targets."""
        rows = self.effects.rows
        mine = self.combinations.get(context, [])
        return self._mean_of([[i for i in mine if not set(rows[i][1].targets) & set(targets)]])

    def _mean_of(self, groups: list[list[int]]) -> Estimate:
        """Mean over groups of rows of the mean in each."""
        weights = np.zeros(len(self.row))
        for rows in groups:
            weights[rows] = 1 / max(len(rows), 1) / len(groups)
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

    def _prior_of_neither(self) -> np.ndarray:
        """The mean of the combinations, as far as it says something of another one.

        The sum of the targets if fewer than two combinations of a context show it.
        """
        several = [rows for rows in self.combinations.values() if len(rows) > 1]
        if not several:
            return np.array([1.0, 0.0])
        square = left = 0.0
        for rows in several:
            mean = self.values[rows].mean(0)
            square += (mean**2).sum()
            # How far combinations lie apart, and the noise of the controls that they share.
            left += ((self.values[rows] - mean) ** 2).sum() / (len(rows) - 1) / len(rows)
            on_profiles = self._on_profiles(self._mean_of([rows]).weights)
            left += (on_profiles[len(self.row) :] ** 2 @ self.variance[len(self.row) :]).sum()
        return np.array([0.0, max(1 - left / square, 0.0) if square > 0 else 0.0])

    def _apart_from_mean(self) -> np.ndarray | None:
        """Variance of combinations around their mean, without noise, shape (n_genes,)."""
        several = [rows for rows in self.combinations.values() if len(rows) > 1]
        if not several:
            return None
        found = [self.values[r].var(0, ddof=1) - self.variance[r].mean(0) for r in several]
        return np.maximum(np.mean(found, 0), 0)

    def _misfit(self, both: list[_Row]) -> float:
        """Squared interaction over squared predicted effect, freed of sampling noise."""
        if self.both.n_units < MIN_UNITS:
            return _PRIOR_INTERACTION
        apart = size = 0.0
        for i, *experts in both:
            estimate = weigh(experts, self.both.weights, _BOTH)
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
        self, estimates: Sequence[Estimate], size: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sampling noise of the predictions, and what shrinkage and priors leave.

        ``size`` are the effects that interactions are in proportion to. Each of shape
        (n_estimates, n_genes).
        """
        weights = np.array([e.weights for e in estimates])
        controls = np.array([e.controls for e in estimates])
        variance = self.effects.interval_variance(self.scale)
        noise = self.effects.on_profiles(weights, controls) ** 2 @ variance
        left = np.array([e.left for e in estimates]) @ variance
        left += np.array([e.residual for e in estimates]) @ self.residuals
        left += np.array([e.bias for e in estimates]) @ self.bias
        interaction = np.array([e.interaction for e in estimates])[:, None]
        square = size**2
        left += interaction * 0.5 * (square + square.mean(1, keepdims=True))
        return noise, left

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
        known = [self._known(s, context) for s in perturbation.singles]
        others = self._mean_combination(context, self.row.get((context, perturbation)))
        if all(known):
            larger = self._larger(parts)
            whole, alone, _ = self.both.weights
            expected = weigh([parts, [larger], [others]], self.both.weights, _BOTH)
            singles = [whole + alone * (part is larger) for part in parts]
        elif any(known):
            expected = weigh([*_divide(parts, known), [others]], self.partly.weights, _PARTLY)
            singles = [self.partly.weights[0 if k else 1] for k in known]
        else:
            expected = weigh([parts, [others]], self.neither.weights, _NEITHER)
            if not self.neither.weights[0]:  # nothing of the targets, whose doubt would be in it
                expected = less_sure(expected, _COMBINATIONS, 1.0)
            singles = [self.neither.weights[0]] * len(parts)
        return replace(expected, singles=tuple(map(float, singles)))

    def interaction(self, perturbation: Perturbation, context: str) -> Estimate:
        """A combination minus the sum of its singles.

        What is unknown of a single is in both, as far as the combination is made of it.
        """
        whole = self.estimate(perturbation, context)
        parts = [self.single(s, context) for s in perturbation.singles]
        taken = whole.singles or (0.0,) * len(parts)
        summed = total([whole, *(part.times(-1) for part in parts)])
        measured = (context, perturbation) in self.row
        doubts = {name: getattr(whole, name).copy() for name in ("left", "residual", "bias")}
        for part, share in zip(parts, taken, strict=True):
            # A measured combination's own doubt is that of its distance from what was expected.
            of_single = (share - 1) ** 2 - (0 if measured else share**2)
            for name, doubt in doubts.items():
                doubt += of_single * getattr(part, name)
        doubts = {name: np.maximum(doubt, 0) for name, doubt in doubts.items()}
        return replace(summed, **doubts, interaction=whole.interaction)

    def _towards(self, row: int, expected: Estimate) -> Estimate:
        """A measured combination, shrunk towards what its singles say."""
        if expected.controls.any():  # a sum that rests on controls elsewhere is no target
            expected = self._estimate([])
        found = shrink(self.effects, [row], [expected.weights[None]], self.scale)
        factor = float(found.factor[0])
        own = self._share(self.effects.rows[row][1], "measured effect", factor, self._one(row))
        rest = expected.times(1 - factor)
        whole = self._estimate([own, *rest.shares], left=found.left[0])
        return replace(self._seen_bias(whole, row), singles=rest.singles)

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
            return less_sure(points[-1][1], _SPREAD, 0.5)
        (low, below), (high, beyond) = points[above - 1], points[above]
        share = float((np.log1p(dose) - np.log1p(low)) / (np.log1p(high) - np.log1p(low)))
        between = total([below.times(1 - share), beyond.times(share)])
        return less_sure(between, _SPREAD, _SURPLUS)

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
            return less_sure(self._estimate(shares), kind, kriging)
        contexts = {c for c, _ in self.row}
        carried = self._carried(
            single, context, lambda c: self._never_measured(single, c) if c in contexts else None
        )
        return carried or less_sure(self._estimate([]), _SPREAD, 1.0)

    def _measured(self, perturbation: Perturbation, context: str) -> Estimate | None:
        row = self.row.get((context, perturbation))
        if row is None:
            return None
        return self._estimate([self._share(perturbation, "measured effect", 1.0, self._one(row))])

    def _carried(
        self,
        perturbation: Perturbation,
        context: str,
        source: Callable[[str], Estimate | None],
    ) -> Estimate | None:
        """From the other contexts: their mean, and how their controls differ from these.

        None if no context is a source, or a single one is and this context has effects of its own.
        """
        found = {c: source(c) for c in self.effects.contexts if c != context}
        sources = {c: e for c, e in found.items() if e is not None}
        if len(sources) < 2:
            has_own = any(c == context for c, _ in self.row)
            if not sources or has_own:
                return None
            return less_sure(self._estimate([]), _SPREAD, 1.0)
        mean, state = self.transfer_stack.weights
        away = np.array([(c in sources) / len(sources) for c in self.effects.contexts])
        away[self.effects.contexts.index(context)] = -1
        elsewhere = total([e.times(1 / len(sources)) for e in sources.values()])
        nothing = np.zeros(len(self.row))
        shares = [
            self._share(perturbation, "mean effect elsewhere", float(mean), elsewhere.weights),
            self._share(perturbation, "controls elsewhere - here", float(state), nothing, away),
        ]
        carried = self._estimate([s for s in shares if s.weight], left=mean**2 * elsewhere.left)
        # What was unknown of the sources does not average out: it is unknown of the target.
        unknown = np.max([e.residual for e in sources.values()], axis=0)
        carried = replace(carried, residual=unknown)
        return less_sure(carried, _TRANSFER, 1.0)

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
        self,
        perturbation: Perturbation,
        expert: str,
        weight: float,
        weights: np.ndarray,
        controls: np.ndarray | None = None,
    ) -> Share:
        if controls is None:
            controls = np.zeros(len(self.controls))
        return Share(str(perturbation), expert, weight, weight * weights, weight * controls)

    def _on_profiles(self, weights: np.ndarray) -> np.ndarray:
        return self.effects.on_profiles(weights[None])[0]

    def _estimate(self, shares: Sequence[Share], left: np.ndarray | None = None) -> Estimate:
        n = len(self.variance)
        return Estimate(
            tuple(shares),
            np.sum([s.weights for s in shares], axis=0) if shares else np.zeros(len(self.row)),
            np.sum([s.controls for s in shares], axis=0)
            if shares
            else np.zeros(len(self.controls)),
            np.zeros(n) if left is None else left,
            np.zeros(len(self.residuals)),
            np.zeros(len(self.row)),
        )


def _divide(parts: list[Estimate], known: list[bool]) -> tuple[list[Estimate], list[Estimate]]:
    """The parts that were measured, and those that were not."""
    first = [p for p, k in zip(parts, known, strict=True) if k]
    return first, [p for p, k in zip(parts, known, strict=True) if not k]
