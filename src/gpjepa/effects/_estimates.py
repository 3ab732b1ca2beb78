"""What the anchor says on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._combinations import Combinations
from ._measured import Measured
from ._own import OwnGenes
from ._scales import Scale
from ._singles import SURPLUS, Singles
from ._table import EffectTable
from ._weighted import Estimate, added


class ScaleFit:
    """The anchor on one scale: estimates of its experts, and the numbers that these stand for."""

    def __init__(
        self, effects: EffectTable, scale: Scale, features: Sequence[TargetFeatures] = ()
    ) -> None:
        self.measured = Measured(effects, scale)
        self.singles = Singles(self.measured, features)
        self.combinations = Combinations(self.measured, self.singles)

    @cached_property
    def own(self) -> OwnGenes:
        """What perturbations do to the genes that they target."""
        return OwnGenes(self.singles.denoiser, self.combinations.misfit)

    @cached_property
    def _residuals(self) -> np.ndarray:
        return np.vstack([self.singles.residuals, self.combinations.residual])

    def estimates(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[Estimate]:
        """One mean effect for each pair of perturbation and context."""
        alone = self.singles.estimates((p, c) for p, c in pairs if len(p.targets) == 1)
        several = [(p, c) for p, c in pairs if len(p.targets) > 1]
        found = alone | dict(zip(several, self.combinations.estimates(several), strict=True))
        return [Estimate() if p.is_control else found[p, c] for p, c in pairs]

    def left_out(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[Estimate]:
        """What is said of measured pairs without them; weights of experts are those of all."""
        several = [(p, c) for p, c in pairs if len(p.targets) > 1]
        found = dict(zip(several, self.combinations.expected(several), strict=True))
        for single, context in pairs:
            if len(single.targets) == 1:
                found[single, context] = self.singles.left_out(single, context, single.targets)
        return [found[pair] for pair in pairs]

    def mean(self, estimates: Sequence[Estimate]) -> np.ndarray:
        """Predicted mean effects, shape (n_estimates, n_genes)."""
        return self.measured.mean(self.measured.assemble([e.terms for e in estimates]))

    def weights(self, estimate: Estimate) -> np.ndarray:
        """Weight of each measured effect, shape (n_rows,)."""
        whole = added(of.times(weight) for weight, of in estimate.terms)
        n = len(self.measured.values)
        return np.bincount(whole.columns, whole.values, n)[:n]

    def variances(
        self, estimates: Sequence[Estimate], size: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sampling noise of the predictions, and what shrinkage and priors leave.

        ``size`` are the effects that interactions are in proportion to. Each of shape
        (n_estimates, n_genes).
        """
        sums = self.measured.assemble([e.terms for e in estimates])
        noise = self.measured.noise(sums, interval=True)
        left = self.measured.left(estimates)
        left += np.array([e.residual for e in estimates]) @ self._residuals
        interaction = np.array([e.interaction for e in estimates])[:, None]
        # Where nothing is predicted, something may still interact.
        square = size**2 + SURPLUS * self.singles.spread
        left += interaction * 0.5 * (square + square.mean(1, keepdims=True))
        return noise, left
