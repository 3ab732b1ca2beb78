"""What each expert of the anchor says of a mean effect, for models that learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpjepa.perturbations import Perturbation

from ._combinations import BOTH, NEITHER, PARTLY
from ._estimates import ScaleFit
from ._few_shot import SPECIAL
from ._transfer import FROM_ELSEWHERE
from ._unseen import MEAN, PROCESS
from ._weighted import Share, Sums, Terms, Weights, added, once

TARGET, MEASURED, OTHER = "target of the combination", "target as measured", "anything else"
BEYOND = ("combinations beyond their sums", "combinations of its targets beyond their sums")
ROLES = tuple(
    dict.fromkeys(
        [
            *BOTH,
            *PARTLY,
            *NEITHER,
            MEAN,
            *FROM_ELSEWHERE,
            *SPECIAL,
            *BEYOND,
            TARGET,
            MEASURED,
            OTHER,
        ]
    )
)
"""What an expert can be."""


@dataclass(frozen=True)
class ExpertPredictions:
    """What experts say of one mean effect.

    Attributes
    ----------
    roles
        What each expert is, one of ``ROLES``. Of a combination, its targets are among them, as
        estimated and as measured, and the mean effect of its context, with weight 0.
    weights
        Weights in the anchor's prediction, shape (n_experts,).
    mean, noise
        What each says, and its sampling variance, shape (n_experts, n_genes).
    on_control
        Weight of the control profiles in each, summed, shape (n_experts,): how often it holds
        their noise.
    """

    roles: tuple[str, ...]
    weights: np.ndarray
    mean: np.ndarray
    noise: np.ndarray
    on_control: np.ndarray


Expert = tuple[str, float, Terms]


def expert_predictions(
    fit: ScaleFit, pairs: Sequence[tuple[Perturbation, str]]
) -> list[ExpertPredictions]:
    """What each expert predicts of each pair of perturbation and context."""
    by_pair = _experts(fit, pairs)
    measured = fit.measured
    sums = measured.assemble([terms for each in by_pair for *_, terms in each])
    mean, noise = measured.mean(sums), measured.noise(sums, interval=True)
    on_control = measured.on_strata(sums).sum(1)
    ends = np.cumsum([0, *map(len, by_pair)])
    return [
        ExpertPredictions(
            tuple(role for role, *_ in each),
            np.array([weight for _, weight, _ in each]),
            *(values[start:end] for values in (mean, noise, on_control)),
        )
        for each, start, end in zip(by_pair, ends[:-1], ends[1:], strict=True)
    ]


def _experts(fit: ScaleFit, pairs: Sequence[tuple[Perturbation, str]]) -> list[list[Expert]]:
    """By pair; where a combination is put together here, all experts on that, used or not."""
    together = [
        (p, c)
        for p, c in pairs
        if len(p.targets) > 1
        and (c, p) not in fit.measured.row
        and fit.combinations.carried(p, c) is None
    ]
    found = {
        pair: _of_combination(fit, *pair, *expected)
        for pair, expected in zip(together, fit.combinations.said(together), strict=True)
    }
    rest = [pair for pair in pairs if pair not in found]
    for pair, estimate in zip(rest, fit.estimates(rest), strict=True):
        found[pair] = _by_role(estimate.shares)
    return [found[pair] for pair in pairs]


def _of_combination(
    fit: ScaleFit, perturbation: Perturbation, context: str, sums: Sums, weights: np.ndarray
) -> list[Expert]:
    experts = zip(sums.names, weights, sums.terms(), strict=True)
    found = [(name, float(weight), terms) for name, weight, terms in experts]
    for single, part in zip(perturbation.singles, sums.parts, strict=False):
        found.append((TARGET, 0.0, part.terms))
        own = fit.measured.row.get((context, single))
        if own is not None:
            found.append((MEASURED, 0.0, [(1.0, fit.measured.one(own))]))
    beyond = fit.combinations.beyond_sums(perturbation, context)
    found += [(role, 0.0, terms) for role, terms in zip(BEYOND, beyond, strict=False)]
    alone = fit.measured.alone.get(context, [])
    if alone:  # it holds the noise of the controls, as all effects do
        found.append((MEAN, 0.0, [(1.0, Weights.equal(alone))]))
    return found


def _by_role(shares: Sequence[Share]) -> list[Expert]:
    """Shares of one role as one expert, weighted as in the prediction."""
    of: dict[str, list[Share]] = {}
    for share in shares:
        known = PROCESS if share.expert.startswith(PROCESS) else share.expert
        of.setdefault(known if known in ROLES else OTHER, []).append(share)
    found: list[Expert] = []
    for role, mine in of.items():
        weight = float(sum(share.weight for share in mine))
        whole = once(added(share.of.times(share.weight / (weight or 1.0)) for share in mine))
        found.append((role, weight, [(1.0, whole)]))
    return found
