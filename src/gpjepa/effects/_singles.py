"""Targets alone: measured, at another dose, elsewhere, or never."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._measured import Measured
from ._regression import NeverPerturbed, UnseenTargets, single_units
from ._stack import Shrunken, fit_stack, shrink, stack_residual
from ._transfer import MIN_CONTEXTS, difference_of_states, transfer_experts
from ._weighted import (
    SPREAD,
    TRANSFER,
    UNSEEN,
    WITHOUT_FEATURES,
    Estimate,
    Share,
    Terms,
    Weights,
    added,
    once,
    total,
)

SURPLUS = 0.1
"""Share of the spread of effects that a residual variance never falls below."""

Single = tuple[Perturbation, str]


class Singles:
    """What is known of targets alone on one scale.

    Attributes
    ----------
    spread
        Noise-corrected mean square of the effects, shape (n_genes,).
    unseen
        Experts on targets never perturbed.
    """

    def __init__(self, measured: Measured, features: Sequence[TargetFeatures]) -> None:
        self.measured, self.effects = measured, measured.effects
        self.spread = _spread(measured)
        self.unseen = UnseenTargets(features, scale=measured.scale).fit_on(measured)
        self._elsewhere = transfer_experts(measured)
        self._transfer = fit_stack(measured, self._elsewhere, np.zeros(2), min_units=MIN_CONTEXTS)
        self._perturbed = {c for c, _ in self.effects.rows}
        self._doses: dict[tuple[str, str], list[tuple[float, int]]] = {}
        for rows in measured.alone.values():
            for i in rows:
                context, single = self.effects.rows[i]
                of_target = self._doses.setdefault((context, single.targets[0]), [])
                of_target.append((single.doses[0], i))
        self._shrunken: dict[str, Shrunken] = {}
        self._place = {i: j for rows in measured.alone.values() for j, i in enumerate(rows)}

    @cached_property
    def residuals(self) -> np.ndarray:
        """Variance of each kind that experts leave, without noise, shape (n_kinds - 1, n_genes).

        That of combinations is known elsewhere.
        """
        carried = stack_residual(self.measured, self._elsewhere, self._transfer.weights)
        of_experts = [self.unseen.residual_, self.unseen.mean_residual_, carried]
        left = [self.spread if r is None else r + SURPLUS * self.spread for r in of_experts]
        return np.stack([self.spread, *left])

    def _shrink(self, context: str) -> Shrunken:
        """Towards no change, the mean effect, or what is predicted of each without itself."""
        rows = self.measured.alone[context]
        units = single_units(self.measured, context)
        mean: Terms = [(1.0, self.unseen.mean_of(context))]
        targets: list[Callable[[int], Terms]] = [lambda j: [], lambda j: mean]
        if self.unseen.features and len(units.targets) > 1:
            targets.append(lambda j: [(1.0, self._without_itself(rows[j]))])
        return shrink(self.measured, rows, targets)

    def _without_itself(self, row: int) -> Weights:
        context, single = self.effects.rows[row]
        return self.unseen.without(single.targets[0], context, single.targets)

    def known(self, single: Perturbation, context: str) -> bool:
        """Whether its target was measured alone: here, at whatever dose, or in enough contexts."""
        here = (context, single.targets[0]) in self._doses
        return here or self.effects.regimes.can_be_carried(single, context)

    def estimates(self, singles: Iterable[Single]) -> dict[Single, Estimate]:
        """One mean effect for each target and context."""
        found: dict[Single, Estimate] = {}
        never: dict[str, list[Perturbation]] = {}
        for single, context in dict.fromkeys(singles):
            estimate = (
                self._measured(single, context)
                or self._other_dose(single, context)
                or self._carried(single, context)
            )
            if estimate is not None:
                found[single, context] = estimate
            elif context in self._perturbed:
                never.setdefault(context, []).append(single)
            else:
                found[single, context] = self._from_everywhere(single, context)
        for context, missing in never.items():
            found |= {
                (single, context): estimate
                for single, estimate in zip(missing, self._unseen(missing, context), strict=True)
            }
        return found

    def left_out(self, single: Perturbation, context: str, without: Sequence[str]) -> Estimate:
        """What would be said of a target if some had never been measured, itself among them."""
        said = self.unseen.without(single.targets[0], context, without)
        return Estimate((Share(str(single), "prediction without it", 1.0, said),))

    def carried(
        self, perturbation: Perturbation, context: str, sources: dict[str, Estimate]
    ) -> Estimate | None:
        """From the other contexts: their mean, and how their controls differ from these.

        None if no context is a source, or a single one is and this context has effects of its own.
        """
        if len(sources) < 2:
            if not sources or context in self._perturbed:
                return None
            return Estimate().less_sure(SPREAD, 1.0)
        mean, state = (float(w) for w in self._transfer.weights)
        share = 1 / len(sources)
        elsewhere = total([e.times(share) for e in sources.values()])
        name = str(perturbation)
        together = once(added(of.times(weight) for weight, of in elsewhere.terms))
        away = difference_of_states(self.measured, list(sources), context)
        shares = [
            Share(name, "mean effect elsewhere", mean, together),
            Share(name, "controls elsewhere - here", state, away),
        ]
        carried = Estimate(
            tuple(s for s in shares if s.weight),
            left=elsewhere.left.times(mean**2),
            # What was unknown of the sources does not average out: it is unknown of the target.
            residual=np.max([e.residual for e in sources.values()], axis=0),
        )
        return carried.less_sure(TRANSFER, 1.0)

    def as_measured(self, perturbation: Perturbation, context: str) -> dict[str, Estimate]:
        """What was measured of a perturbation in the other contexts."""
        name = str(perturbation)
        return {
            c: Estimate((Share(name, "measured effect", 1.0, self._one(c, perturbation)),))
            for c in self.effects.measured_in.get(perturbation, ())
            if c != context
        }

    def _one(self, context: str, perturbation: Perturbation) -> Weights:
        return self.measured.one(self.measured.row[context, perturbation])

    def _measured(self, single: Perturbation, context: str) -> Estimate | None:
        row = self.measured.row.get((context, single))
        return None if row is None else self._of_row(row)

    def _of_row(self, row: int) -> Estimate:
        context, single = self.effects.rows[row]
        if context not in self._shrunken:
            self._shrunken[context] = self._shrink(context)
        shrunken, j, name = self._shrunken[context], self._place[row], str(single)
        factor = float(shrunken.factor[j])
        shares = [Share(name, "measured effect", factor, self.measured.one(row))]
        if shrunken.target == 1:
            mean = self.unseen.mean_of(context)
            shares.append(Share(name, "mean effect of the context", 1 - factor, mean))
        if shrunken.target == 2:
            without = self._without_itself(row)
            shares.append(Share(name, "prediction without it", 1 - factor, without))
        return Estimate(tuple(shares), left=shrunken.left[j], bias=shrunken.bias[j])

    def _other_dose(self, single: Perturbation, context: str) -> Estimate | None:
        """Between measured doses of the target: linear in log1p dose, from no effect at dose 0."""
        points = sorted(self._doses.get((context, single.targets[0]), []))
        if not points:
            return None
        dose = single.doses[0]
        above = next((i for i, (d, _) in enumerate(points) if d >= dose), None)
        if above is None:  # beyond the largest dose: as the largest, less sure
            return self._of_row(points[-1][1]).less_sure(SPREAD, 0.5)
        high, beyond = points[above][0], self._of_row(points[above][1])
        low, below = points[above - 1] if above else (0.0, None)
        share = float((np.log1p(dose) - np.log1p(low)) / (np.log1p(high) - np.log1p(low)))
        between = beyond.times(share)
        if below is not None:
            between = total([self._of_row(below).times(1 - share), between])
        return between.less_sure(SPREAD, SURPLUS)

    def _carried(self, single: Perturbation, context: str) -> Estimate | None:
        return self.carried(single, context, self.as_measured(single, context))

    def _unseen(self, singles: list[Perturbation], context: str) -> list[Estimate]:
        """Targets never perturbed, from what was in their context."""
        said = self.unseen.of_targets([s.targets[0] for s in singles], context)
        return [self._of_experts(s, each) for s, each in zip(singles, said, strict=True)]

    def _of_experts(self, single: Perturbation, said: NeverPerturbed) -> Estimate:
        shares = [Share(str(single), name, weight, of) for name, weight, of in said.experts]
        kind = UNSEEN if self.unseen.covers(single.targets[0]) else WITHOUT_FEATURES
        return Estimate(tuple(shares)).less_sure(kind, said.kriging)

    def _from_everywhere(self, single: Perturbation, context: str) -> Estimate:
        """A target never perturbed, in a context where nothing was."""
        others = [c for c in self.effects.contexts if c in self._perturbed]
        sources = {c: self._unseen([single], c)[0] for c in others}
        carried = self.carried(single, context, sources)
        return carried or Estimate().less_sure(SPREAD, 1.0)


def _spread(measured: Measured) -> np.ndarray:
    """Noise-corrected mean square of the effects per gene: how large an effect may be.

    At least the noise of the controls: less than that is not significantly different from no effect.
    Where none is known, at least the error of this mean square itself.
    """
    n = len(measured.values)
    floor = np.full(measured.values.shape[1], measured.variance[n:].mean())
    if not n:
        return floor
    noise = measured.effects.noise(measured.scale)
    if not floor.any():
        floor += np.sqrt(2 / n) * noise.mean()
    square = np.mean(measured.values**2 - noise, axis=0)
    return np.maximum(np.maximum(square, 0) + max(square.mean(), 0) * SURPLUS, floor)
