"""Targets that other contexts know, in a context with a few effects of its own."""

from __future__ import annotations

from functools import cache

import numpy as np

from gpjepa.perturbations import Perturbation
from gpjepa.splits import MIN_UNITS

from ._measured import Measured, thinned
from ._stack import Experts, Stack, fit_stack, stack_residual, stacked
from ._transfer import from_elsewhere
from ._unseen import UnseenTargets
from ._weighted import Share, Terms, added, once

_MOST_ROWS = 300
"""Rows of a context that its weights are fitted on."""
SPECIAL = ("special to it elsewhere", "special to it where controls are alike")


class FewShot:
    """What a context's own targets predict, and what is special to a target elsewhere.

    Special is what was measured of a target beyond what is predicted of it there: its mean over
    the other contexts, equally and by how alike the controls are. The targets measured both in
    this context and elsewhere decide what that is worth here.

    Parameters
    ----------
    measured
        The effects.
    unseen
        Experts on targets never perturbed.
    """

    def __init__(self, measured: Measured, unseen: UnseenTargets) -> None:
        self.measured, self.unseen = measured, unseen
        self.stack = cache(self._stack)

    def knows(self, perturbation: Perturbation, context: str) -> bool:
        """Whether enough targets show what other contexts are worth in this one."""
        few_shot = self.measured.effects.regimes.few_shot(perturbation, context)
        return few_shot and self.stack(context)[0].n_units >= MIN_UNITS

    def shares(self, single: Perturbation, context: str) -> list[Share]:
        """What the experts contribute."""
        own, *weights = self.stack(context)[0].weights
        [said] = self.unseen.of_targets([single], context)
        found = [Share(str(single), name, float(own * w), of) for name, w, of in said.experts]
        for name, weight, terms in zip(
            SPECIAL, weights, self._special(single, context), strict=True
        ):
            of = once(added(of.times(factor) for factor, of in terms))
            found.append(Share(str(single), name, float(weight), of))
        return [share for share in found if share.weight]

    def residual(self, context: str) -> np.ndarray:
        """Variance that the experts leave in a context, without noise, shape (n_genes,)."""
        return self.stack(context)[1]

    def _stack(self, context: str) -> tuple[Stack, np.ndarray]:
        experts = self.experts(context)
        own_alone = np.eye(1 + len(SPECIAL))[0]
        stack = fit_stack(self.measured, experts, own_alone, np.zeros(len(own_alone)))
        residual = stack_residual(self.measured, experts, stack.weights)
        return stack, np.zeros(self.measured.values.shape[1]) if residual is None else residual

    def experts(self, context: str) -> Experts:
        """What they say of the targets of a context that others know, without these."""
        effects = self.measured.effects
        rows = [
            i
            for i in self.measured.alone.get(context, [])
            if len(effects.measured_in[effects.rows[i][1]]) > 1
        ]
        rows = thinned(rows, _MOST_ROWS)

        def of(i: int) -> list[Terms]:
            single = effects.rows[rows[i]][1]
            own = self.unseen.without(single, context, single.targets)
            return [[(1.0, own)], *self._special(single, context)]

        return Experts(rows, [effects.rows[i][1].targets for i in rows], of)

    def _special(self, single: Perturbation, context: str) -> list[Terms]:
        """What other contexts measured of a target beyond what is predicted of it there."""
        others = [c for c in self.measured.effects.measured_in[single] if c != context]
        special = [
            [
                *self.unseen.denoiser.terms(self.measured.row[c, single]),
                (-1.0, self.unseen.without(single, c, single.targets)),
            ]
            for c in others
        ]
        mean, _, alike = from_elsewhere(
            self.measured, lambda w: stacked(special, w), others, context
        )
        return [mean, alike]
