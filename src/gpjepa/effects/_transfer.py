"""Carrying the effect of a perturbation over from other contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from gpjepa.perturbations import Perturbation

from ._baselines import Baseline
from ._denoise import Denoiser
from ._measured import Measured, thinned
from ._scales import Scale
from ._stack import Experts, fit_stack, stacked
from ._weighted import Terms, Weights, once

Form = Literal["mean", "similar", "log_rate", "state"]
MIN_CONTEXTS = 2
"""Contexts that weights of transfer need. Two weights rest on all genes of all rows, so that fewer
than for other weights are enough; with two, each is judged by the other alone."""

_MOST_ROWS = 2_000
"""Rows that weights are fitted on."""
FEW_CONTEXTS = 10
"""Contexts of which effects are denoised before they are carried over; the mean of more has little
noise."""
FROM_ELSEWHERE = ("mean effect elsewhere", "controls elsewhere - here", "where controls are alike")

_PSEUDO = 0.1  # counts per 10,000 added to rates before their ratio is taken


class Transfer(Baseline):
    """The effect that the same perturbation has in the other contexts.

    Parameters
    ----------
    form
        ``"mean"``: the mean over the other contexts. ``"similar"``: their mean, weighted by
        exp(-distance of control profiles / smallest distance). ``"log_rate"``: their mean log
        ratio of rates, put on this context's control. ``"state"``: their mean, plus a slope,
        fitted across the training contexts, times (their mean control - this control): perturbed
        states are more alike than the controls they started from.
    scale
        Scale of the effects.
    """

    def __init__(self, form: Form = "mean", scale: Scale = "mean_log1p") -> None:
        super().__init__(scale)
        if form not in get_args(Form):
            raise ValueError(f"form={form!r} is not known; choose one of {get_args(Form)}.")
        self.form = form

    def _fit(self) -> None:
        if self.form != "mean" and not self.effects_.has_controls:
            raise ValueError(
                f"form={self.form!r} needs the control profiles of the contexts, which this table "
                "does not have (control_profiles=)."
            )
        self.slope_ = 0.0
        if self.form == "state":
            prior = np.array([1.0, 0.0, 0.0])
            experts = transfer_experts(self.measured_)
            fitted = fit_stack(self.measured_, experts, prior, min_units=MIN_CONTEXTS)
            self.slope_ = float(fitted.weights[1])

    def _sources(self, perturbation: Perturbation, context: str) -> list[int]:
        return [i for i in self._elsewhere(perturbation) if self.effects_.rows[i][0] != context]

    def predict(self, perturbations: Sequence[Perturbation], contexts: Sequence[str]) -> np.ndarray:
        """Predict one effect per pair of perturbation and context, shape (n_pairs, n_genes).

        No change for a perturbation that was measured in no other context.
        """
        pairs = zip(perturbations, contexts, strict=True)
        found = [self._predict(p, c) for p, c in pairs]
        return np.reshape(found, (len(found), len(self.effects_.genes)))

    def _predict(self, perturbation: Perturbation, context: str) -> np.ndarray:
        rows = self._sources(perturbation, context)
        if not rows:
            return np.zeros(len(self.effects_.genes))
        if self.form == "log_rate":
            return self._log_rate(rows, context)
        elsewhere = [self.effects_.rows[i][0] for i in rows]
        similar = self.form == "similar"
        weights = alike(self.measured_, elsewhere, context) if similar else np.ones(len(rows))
        carried = np.average(self.effects_.effect[self.scale][rows], axis=0, weights=weights)
        if self.form == "state":
            away = difference_of_states(self.measured_, elsewhere, context)
            state = self.measured_.mean(self.measured_.assemble([[(self.slope_, away)]]))[0]
            carried = carried + state
        return carried

    def _log_rate(self, rows: list[int], context: str) -> np.ndarray:
        control = self.effects_.control[self.scale]
        here = np.expm1(control[context].astype(float)) + _PSEUDO
        ratios = []
        for i in rows:
            before = control[self.effects_.rows[i][0]].astype(float)
            after = np.maximum(before + self.effects_.effect[self.scale][i], 0)
            ratios.append(np.log((np.expm1(after) + _PSEUDO) / (np.expm1(before) + _PSEUDO)))
        moved = np.maximum(here * np.exp(np.mean(ratios, axis=0)) - _PSEUDO, 0)
        return np.log1p(moved) - control[context]


def transfer_experts(measured: Measured, denoiser: Denoiser | None = None) -> Experts:
    """What other contexts say of every row measured elsewhere too.

    Their mean, how their controls differ from these, and their mean weighted by how alike the
    controls are; of denoised effects where there is a denoiser.
    """
    effects = measured.effects
    carried = [(p, contexts) for p, contexts in effects.measured_in.items() if len(contexts) > 1]
    carried = thinned(carried, max(_MOST_ROWS // len(effects.contexts), 1))
    # Rows of one perturbation after the other, as they rest on the same rows.
    several = [measured.row[c, p] for p, contexts in carried for c in contexts]

    def of(i: int) -> list[Terms]:
        context, perturbation = effects.rows[several[i]]
        elsewhere = [c for c in effects.measured_in[perturbation] if c != context]
        rows = [measured.row[c, perturbation] for c in elsewhere]
        if denoiser is None or len(rows) > FEW_CONTEXTS:
            return from_elsewhere(
                measured, lambda w: [(1.0, Weights(np.array(rows), w))], elsewhere, context
            )
        sources = [denoiser.terms(i) for i in rows]
        return from_elsewhere(measured, lambda w: stacked(sources, w), elsewhere, context)

    return Experts(several, [effects.rows[i][0] for i in several], of)


def from_elsewhere(
    measured: Measured,
    mean: Callable[[np.ndarray], Terms],
    elsewhere: Sequence[str],
    context: str,
) -> list[Terms]:
    """What each expert of transfer makes of what is known of a perturbation in other contexts.

    ``mean`` is the weighted mean of what is known in these.
    """
    equal = np.full(len(elsewhere), 1 / len(elsewhere))
    away = difference_of_states(measured, elsewhere, context)
    return [mean(equal), [(1.0, away)], mean(alike(measured, elsewhere, context))]


def alike(measured: Measured, elsewhere: Sequence[str], context: str) -> np.ndarray:
    """Weights of other contexts by how alike their controls are, shape (n_elsewhere,)."""
    n = len(measured.values)
    at = [measured.control[c] - n for c in elsewhere]
    distance = measured.control_distances[measured.control[context] - n, at]
    weights = np.exp(-distance / max(distance.min(), 1e-12))
    return weights / weights.sum()


def difference_of_states(measured: Measured, sources: Sequence[str], context: str) -> Weights:
    """Weights of the control profiles in (mean control of other contexts - control here)."""
    columns = [measured.control[c] for c in (*sources, context)]
    share = np.full(len(sources), 1 / max(len(sources), 1))
    return once(Weights(np.array(columns), np.append(share, -1.0)))
