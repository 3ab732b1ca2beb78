"""Targets alone: measured, at another dose, elsewhere, or never."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from gpjepa.perturbations import Perturbation, TargetFeatures

from ._doses import Doses
from ._few_shot import FewShot
from ._measured import Measured
from ._stack import fit_stack, stack_residual, stacked
from ._transfer import FEW_CONTEXTS, FROM_ELSEWHERE, MIN_CONTEXTS, from_elsewhere, transfer_experts
from ._unseen import PROCESS, NeverPerturbed, UnseenTargets
from ._weighted import (
    SPREAD,
    TRANSFER,
    UNSEEN,
    WITHOUT_FEATURES,
    Estimate,
    Share,
    Weights,
    added,
    once,
    total,
)

_FROM_FEW = 0.25
"""Share that is carried over of the effect in a single other context."""
SURPLUS = 0.1
"""Share of the spread of effects that a residual variance never falls below."""

COMBINED = "mean of the combinations"
Single = tuple[Perturbation, str]


class Singles:
    """What is known of targets alone on one scale.

    Attributes
    ----------
    spread
        Noise-corrected mean square of the effects, shape (n_genes,).
    unseen
        Experts on targets never perturbed.
    denoiser
        Of the measured effects.
    perturbed
        Contexts where something was measured.
    """

    def __init__(self, measured: Measured, features: Sequence[TargetFeatures]) -> None:
        self.measured, self.effects = measured, measured.effects
        self.spread = _spread(measured)
        self.unseen = UnseenTargets(features, scale=measured.scale).fit_on(measured)
        self.denoiser = self.unseen.denoiser
        self._elsewhere = transfer_experts(measured, self.denoiser)
        prior = _FROM_FEW * np.eye(len(FROM_ELSEWHERE))[0]
        self._transfer = fit_stack(
            measured, self._elsewhere, prior, np.zeros(len(prior)), MIN_CONTEXTS
        )
        self.few_shot = FewShot(measured, self.unseen)
        self.perturbed = {c for c, _ in self.effects.rows}
        self.doses = Doses(measured, self.denoiser)

    @cached_property
    def residuals(self) -> np.ndarray:
        """Variance of each kind that experts leave, without noise, shape (n_kinds - 1, n_genes).

        That of combinations is known elsewhere.
        """
        carried = stack_residual(self.measured, self._elsewhere, self._transfer.weights)
        of_experts = [self.unseen.residual_, self.unseen.mean_residual_, carried]
        left = [self.spread if r is None else r + SURPLUS * self.spread for r in of_experts]
        return np.stack([self.spread, *left])

    def here(self, single: Perturbation, context: str) -> bool:
        """Whether its target was measured alone in the context, at whatever dose."""
        return (context, single.targets[0]) in self.doses.of

    def known(self, single: Perturbation, context: str) -> bool:
        """Whether its target was measured alone: here, at whatever dose, or in enough contexts."""
        return self.here(single, context) or self.effects.regimes.can_be_carried(single, context)

    def estimates(
        self, singles: Iterable[Single], without: Sequence[int] = (), bias: bool = True
    ) -> dict[Single, Estimate]:
        """One mean effect for each target and context, as if some rows had not been measured."""
        wanted = dict.fromkeys(singles)
        rows = {(s, c): self.measured.row.get((c, s)) for s, c in wanted}
        measured = {pair: row for pair, row in rows.items() if row is not None}
        denoised = self.denoiser.estimates(list(measured.values()), without, bias)
        found = {pair: denoised[row] for pair, row in measured.items()}
        never: dict[str, list[Perturbation]] = {}
        for single, context in wanted:
            if (single, context) in found:
                continue
            estimate = self.doses.estimate(single, context, without, bias)
            estimate = estimate or self._carried(single, context)
            if estimate is not None:
                found[single, context] = estimate
            elif self.unseen.rows_with(context, single.targets):
                found[single, context] = self._of_combinations(single, context, without)
            elif context in self.perturbed:
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
        said = self.unseen.without(single, context, without)
        return Estimate((Share(str(single), "prediction without it", 1.0, said),))

    def carried(
        self, perturbation: Perturbation, context: str, sources: dict[str, Estimate]
    ) -> Estimate | None:
        """From the other contexts, by the stacked experts of transfer.

        And from this one's own targets, if enough of them show what other contexts are worth here.
        None if no context is a source, or a single one is and this context has a few effects.
        """
        if not sources:
            return None
        if self.few_shot.knows(perturbation, context):
            return self._of_few(perturbation, context)
        if len(sources) < 2 and context in self.perturbed:
            return None
        weights, kind = self._transfer.weights, TRANSFER
        if len(sources) < 2:
            weights, kind = _FROM_FEW * np.eye(len(weights))[0], SPREAD
        terms = [e.terms for e in sources.values()]
        said = from_elsewhere(self.measured, lambda w: stacked(terms, w), list(sources), context)
        name = str(perturbation)
        shares = [
            Share(name, n, float(w), once(added(of.times(f) for f, of in terms)))
            for n, w, terms in zip(FROM_ELSEWHERE, weights, said, strict=False)
            if w
        ]
        elsewhere = total([e.times(1 / len(sources)) for e in sources.values()])
        carried = Estimate(
            tuple(shares),
            left=elsewhere.left.times(float(weights[0] + weights[2:].sum()) ** 2),
            # What was unknown of the sources does not average out: it is unknown of the target.
            residual=np.max([e.residual for e in sources.values()], axis=0),
        )
        return carried.less_sure(kind, 1.0)

    def _of_few(self, single: Perturbation, context: str) -> Estimate:
        """From a context's own targets, and what other contexts know of this one beyond theirs."""
        left = self.few_shot.residual(context) + SURPLUS * self.spread
        return Estimate(tuple(self.few_shot.shares(single, context)), bias=Weights.of(left))

    def as_measured(self, perturbation: Perturbation, context: str) -> dict[str, Estimate]:
        """Measured effects of a perturbation in the other contexts, denoised where these are few."""
        others = [c for c in self.effects.measured_in.get(perturbation, ()) if c != context]
        rows = [self.measured.row[c, perturbation] for c in others]
        if len(rows) > FEW_CONTEXTS:
            said = [
                Share(str(perturbation), "measured effect", 1.0, self.measured.one(i)) for i in rows
            ]
            return {c: Estimate((share,)) for c, share in zip(others, said, strict=True)}
        denoised = self.denoiser.estimates(rows)
        return {c: denoised[row] for c, row in zip(others, rows, strict=True)}

    def of_process(
        self, perturbations: Sequence[Perturbation], context: str, without: Sequence[int] = ()
    ) -> tuple[Estimate, list[Estimate]]:
        """The mean of the combinations of a context, and what the process predicts in it.

        As if some rows had not been measured; if none are left out, the perturbations must not be
        among those measured.
        """
        mean, process, left = self.unseen.of_combinations(perturbations, context, without)
        said = [Estimate((Share("", PROCESS, 1.0, weights),)) for weights in process]
        if left.any():
            size = max(float(self.spread @ self.denoiser.of_genes(context)[0]), 1e-300)
            said = [e.less_sure(SPREAD, x / size) for e, x in zip(said, left, strict=True)]
        return Estimate((Share("", COMBINED, 1.0, mean),)), said

    def _of_combinations(
        self, single: Perturbation, context: str, without: Sequence[int]
    ) -> Estimate:
        """A target that was measured in combinations only."""
        [said] = self.of_process([single], context, without)[1]
        [share] = said.shares
        return replace(said, shares=(replace(share, part=str(single)),))

    def _carried(self, single: Perturbation, context: str) -> Estimate | None:
        return self.carried(single, context, self.as_measured(single, context))

    def _unseen(self, singles: list[Perturbation], context: str) -> list[Estimate]:
        """Targets never perturbed, from what was in their context."""
        said = self.unseen.of_targets(singles, context)
        return [self._of_experts(s, each) for s, each in zip(singles, said, strict=True)]

    def _of_experts(self, single: Perturbation, said: NeverPerturbed) -> Estimate:
        shares = [Share(str(single), name, weight, of) for name, weight, of in said.experts]
        kind = UNSEEN if self.unseen.covers(single.targets[0]) else WITHOUT_FEATURES
        return Estimate(tuple(shares)).less_sure(kind, said.kriging)

    def _from_everywhere(self, single: Perturbation, context: str) -> Estimate:
        """A target never perturbed, in a context where nothing was."""
        others = [c for c in self.effects.contexts if c in self.perturbed]
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
