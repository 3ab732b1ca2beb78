"""Targets that were never perturbed, from those that were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._baselines import WeightedBaseline
from ._denoise import Denoiser
from ._measured import blocks, thinned
from ._process import Process
from ._regression import check_no_leak, single_units
from ._scales import Scale
from ._stack import Experts, fit_stack, stack_residual
from ._weighted import NOTHING, Terms, Weights, added, once

_ENOUGH = 1_000
"""Rows that weights are fitted on."""
MEAN, PROCESS = "mean effect", "Gaussian process"


@dataclass(frozen=True)
class NeverPerturbed:
    """What experts say of a target never perturbed in a context.

    Attributes
    ----------
    experts
        Names, weights, and what each says, of the experts that have a weight.
    kriging
        Variance left by the features over what they leave on average (kriging, or GP, variance): 1
        where they have no weight, smaller near measured targets.
    """

    experts: list[tuple[str, float, Weights]]
    kriging: float

    @property
    def weights(self) -> Weights:
        """The weighted sum, each effect once."""
        return once(added(of.times(w) for _, w, of in self.experts))


class UnseenTargets(WeightedBaseline):
    """Targets never perturbed: what those perturbed have in common, and what features say.

    The experts are the mean effect of the context's targets and, with features, a Gaussian process
    over all perturbations, weighted by how well they predict targets left out. Both read denoised
    effects.

    Parameters
    ----------
    features
        Kinds of target features; none leaves the mean effect times its slope.
    scale
        Scale of the effects.
    """

    def __init__(
        self, features: Sequence[TargetFeatures] = (), scale: Scale = "mean_log1p"
    ) -> None:
        super().__init__(scale)
        self.features = tuple(features)
        names = self.features[0].name if len(self.features) == 1 else "target features"
        self.experts = [MEAN, f"{PROCESS} on {names}"] if self.features else [MEAN]

    def _fit(self) -> None:
        for features in self.features:
            check_no_leak(features.name, features.source, self.effects_)
        self.denoiser = Denoiser(self.measured_)
        self._units = {c: single_units(self.measured_, c) for c in self._in_context}
        prior = np.zeros(len(self.experts))
        prior[0] = self._prior()
        self._of_mean = self._left_out(1, lambda target: True)
        self.mean_stack_ = fit_stack(self.measured_, self._of_mean, prior[:1], np.zeros(1))
        # Features must earn their weight over the mean effect alone.
        mean_alone = np.append(self.mean_stack_.weights, np.zeros(len(self.experts) - 1))
        self._of_all = self._left_out(len(prior), self.covers)
        self.stack_ = fit_stack(self.measured_, self._of_all, mean_alone, mean_alone)

    @cached_property
    def process(self) -> Process:
        """Over all perturbations; fitted when it is first needed."""
        return Process(self.denoiser, self.features)

    @cached_property
    def _of_combinations(self) -> Process:
        """That of combinations: with features only if these earned a weight."""
        earned = not self.features or self.stack_.weights[1:].any()
        return self.process if earned else Process(self.denoiser, ())

    @cached_property
    def residual_(self) -> np.ndarray | None:
        """Mean squared error of targets with features, without noise, shape (n_genes,)."""
        return stack_residual(self.measured_, self._of_all, self.stack_.weights)

    @cached_property
    def mean_residual_(self) -> np.ndarray | None:
        """As ``residual_``, of the mean effect alone."""
        return stack_residual(self.measured_, self._of_mean, self.mean_stack_.weights)

    def feature_weights(self) -> list[float]:
        """Weight of each kind of features in predictions of targets that they cover."""
        if not self.stack_.weights[1:].any():
            return [0.0] * len(self.features)
        return [float(self.stack_.weights[1] * share) for share in self.process.shares()]

    def covers(self, target: str) -> bool:
        """Whether any of the features knows the target."""
        return any(f.covers(target) for f in self.features)

    def _prior(self) -> float:
        """Half of what is left of the mean effect when its noise is taken off."""
        if not self._units:
            return 0.0
        means = [[(1.0, self._mean_of(c))] for c in self._units]
        sums = self.measured_.assemble(means)
        square = (self.measured_.mean(sums) ** 2).sum()
        noise = self.measured_.noise(sums).sum()
        return 0.5 * max(0.0, 1 - noise / square) if square > 0 else 0.0

    # Weights

    def _mean_but(self, context: str, hidden: Sequence[str] = ()) -> np.ndarray:
        """Weights of the effects of a context in the mean of its units, but for some, (n_rows,)."""
        units = self._units[context]
        weights = np.ones(len(units.targets))
        weights[[units.at[t] for t in hidden if t in units.at]] = 0
        found = np.zeros(len(self.denoiser.rows[context]))
        found[self._places(context, units.rows)] = (
            weights[units.unit] * units.share / max(weights.sum(), 1)
        )
        return found

    def _places(self, context: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.searchsorted(self.denoiser.rows[context], rows)

    def _mean_of(self, context: str) -> Weights:
        return self._denoised(context, self._mean_but(context)[None])[0]

    def _denoised(
        self, context: str, weights: np.ndarray, without: Sequence[int] = ()
    ) -> list[Weights]:
        found = self.denoiser.through(context, weights, without)
        return [Weights.of(w, rows=self.denoiser.rows[context]) for w in found]

    def _said_without(
        self, perturbation: Perturbation, context: str, hidden: Sequence[str], n_experts: int
    ) -> list[Weights]:
        """What the first experts say as if some targets had never been perturbed."""
        found = [self._mean_but(context, hidden)]
        rows = self.rows_with(context, hidden)
        if n_experts > 1:
            places = self._places(context, rows)
            found.append(self.process.without(perturbation, context, places))
        return self._denoised(context, np.stack(found), rows)

    def of_combinations(
        self, perturbations: Sequence[Perturbation], context: str, out: Sequence[int]
    ) -> tuple[Weights, list[Weights], np.ndarray]:
        """Mean of the combinations, and the process, as if some rows had not been measured.

        And the variances that the process leaves, summed with the gene weights.
        """
        n, process = len(perturbations), self._of_combinations
        if context not in self._units:
            return NOTHING, [NOTHING] * n, np.zeros(n)
        places = self._places(context, out)
        mean = np.zeros(len(self.denoiser.rows[context]))
        mean[self._places(context, self.measured_.combined.get(context, []))] = 1
        mean[places] = 0
        mean /= max(mean.sum(), 1)
        [one] = self._denoised(context, mean[None], out)
        if len(out):
            weights = np.stack([process.without(p, context, places) for p in perturbations])
        else:
            weights = process.weights(perturbations, context)
        # What is special to its targets is part of what a combination does.
        others = self.denoiser.through(context, weights, out, special=True)
        rows = self.denoiser.rows[context]
        left = process.left(perturbations, context, weights)[1]
        return one, [Weights.of(other, rows=rows) for other in others], left

    def unknown(
        self, perturbations: Sequence[Perturbation], context: str
    ) -> tuple[np.ndarray, float]:
        """Covariance of what is unknown of perturbations, (n, n), and the noise of one cell.

        By the process, with features if these earned a weight; summed over genes with their weights.
        """
        rows = self.denoiser.rows[context]
        h = self.denoiser.of_genes(context)[0]
        per_cell = (self.measured_.variance[rows] @ h) * self.effects_.n_cells[rows]
        return self._of_combinations.together(perturbations, context), float(per_cell.mean())

    def rows_with(self, context: str, targets: Sequence[str]) -> list[int]:
        """Rows of a context with one of some targets, or that are a unit of such a name."""
        return sorted(set().union(*(self._with.get((context, t), ()) for t in targets)))

    @cached_property
    def _with(self) -> dict[tuple[str, str], set[int]]:
        found: dict[tuple[str, str], set[int]] = {}
        for i, (context, perturbation) in enumerate(self.effects_.rows):
            for name in {*perturbation.targets, "+".join(perturbation.targets)}:
                found.setdefault((context, name), set()).add(i)
        return found

    def _left_out(self, n_experts: int, counts: Callable[[str], bool]) -> Experts:
        """What the first experts say of each target that counts, without it."""
        found: list[tuple[int, str, tuple[str, int]]] = []
        for context, units in self._units.items():
            if len(units.targets) < 2:
                continue
            found += [
                (int(row), units.targets[u], (context, int(u)))
                for row, u in zip(units.rows, units.unit, strict=True)
                if counts(units.targets[u])
            ]
        found = thinned(found, _ENOUGH)

        def of(i: int) -> list[Terms]:
            context, u = found[i][2]
            units = self._units[context]
            out = [units.targets[u]]
            said = self._said_without(units.perturbations[u], context, out, n_experts)
            return [[(1.0, w)] for w in said]

        return Experts([row for row, *_ in found], [name for _, name, _ in found], cache(of))

    # Predictions

    def of_nothing(self, context: str) -> Weights:
        """What is said of a target of which nothing is known: the shrunken mean effect."""
        return self._mean_of(context).times(float(self.mean_stack_.weights[0]))

    def of_targets(self, singles: Sequence[Perturbation], context: str) -> list[NeverPerturbed]:
        """What the experts say of targets in a context where something was measured."""
        weights = [np.repeat(self._mean_but(context)[None], len(singles), 0)]
        left = np.ones(len(singles))
        if self.stack_.weights[1:].any():
            weights.append(self.process.weights(singles, context))
            left = self._left(*self.process.left(singles, context, weights[1]))
        said = self.denoiser.through(context, np.stack(weights))
        rows, found = self.denoiser.rows[context], []
        for i, single in enumerate(singles):
            covered = self.covers(single.targets[0])
            stack = self.stack_.weights if covered else self.mean_stack_.weights
            experts = [
                (name, float(w), Weights.of(each[i], rows=rows))
                for name, w, each in zip(self.experts, stack, said, strict=False)
                if w
            ]
            found.append(NeverPerturbed(experts, left[i] if covered else 1.0))
        return found

    def without(self, single: Perturbation, context: str, out: Sequence[str]) -> Weights:
        """What is said of a target if some, itself among them, had never been measured."""
        if not self.rows_with(context, out):
            return self.of_targets([single], context)[0].weights
        stack = self.stack_.weights if self.covers(single.targets[0]) else self.mean_stack_.weights
        said = self._said_without(single, context, out, len(stack))
        return once(added(of.times(float(w)) for w, of in zip(stack, said, strict=False) if w))

    def _weights(self, perturbation: Perturbation, context: str) -> Weights:
        contexts = [context] if context in self._units else list(self._units)
        found = [
            each.weights.times(1 / len(contexts))
            for c in contexts
            for each in self.of_targets(perturbation.singles, c)
        ]
        return once(added(found))

    def _left(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Variance that the experts leave, over its mean where targets are left out."""
        mean, process = self.stack_.weights
        share = process / (mean + process)
        of_process = after / np.maximum(before, 1e-300)
        return (1 - share + share * of_process) / (1 - share + share * self._left_mean)

    @cached_property
    def _left_mean(self) -> float:
        """Mean over the covered units of what the process leaves of each without itself."""
        found = []
        for context, units in self._units.items():
            covered = [u for u, t in enumerate(units.targets) if self.covers(t)]
            covered = thinned(covered, _ENOUGH)
            for block in blocks(len(covered)):
                mine = [covered[i] for i in block]
                perturbations = [units.perturbations[u] for u in mine]
                weights = [
                    self.process.without(
                        p, context, self._places(context, self.rows_with(context, [t]))
                    )
                    for p, t in zip(perturbations, (units.targets[u] for u in mine), strict=True)
                ]
                before, after = self.process.left(perturbations, context, np.stack(weights))
                found += list(after / np.maximum(before, 1e-300))
        return float(np.mean(found)) if found else 1.0


class ShrunkenMean(UnseenTargets):
    """The mean denoised effect of a context times a slope, that of each target on the others' mean.

    Without the noise of the controls, which all effects of a context share; or the slope would be
    near 1 where nothing but that noise is common to them.

    Parameters
    ----------
    scale
        Scale of the effects.
    """

    def __init__(self, scale: Scale = "mean_log1p") -> None:
        super().__init__((), scale)
