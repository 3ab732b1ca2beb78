"""The networks, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gpjepa.effects import AnchorPrediction, EffectAnchor, Scale
from gpjepa.nn import ResponseNetwork
from gpjepa.perturbations import Perturbation

from ._attention import TargetAttention
from ._inputs import READ, make_query

NETWORKS = ("response network", "attention")
PRIOR = {
    "seen2": (0.5, 0.0),
    "seen1": (0.0, 0.0),
    "unseen": (0.0, 0.0),
    "new context": (0.0, 0.0),
}
"""Weights of the networks by regime where a screen cannot judge them; other regimes are the anchor's."""


@dataclass(frozen=True)
class Said:
    """What anchor and networks say of some pairs.

    Attributes
    ----------
    anchor
        The anchor's prediction.
    mean
        Mean effects, shape (n_networks, n, n_genes); the anchor's where one does not speak.
    log_ratio
        Log of the variance over the anchor's, of the same shape.
    speaks
        Whether each network speaks of each pair, shape (n, n_networks).
    """

    anchor: AnchorPrediction
    mean: np.ndarray
    log_ratio: np.ndarray
    speaks: np.ndarray


class Networks:
    """The networks over one anchor, on one scale.

    Parameters
    ----------
    network
        The response network.
    anchor
        A fitted anchor.
    scale
        Scale of the effects.
    seed
        Of what is learned on the screen.
    """

    def __init__(
        self, network: ResponseNetwork, anchor: EffectAnchor, scale: Scale, seed: int
    ) -> None:
        self.network, self.anchor, self.scale, self.seed = network, anchor, scale, seed

    @cached_property
    def attention(self) -> TargetAttention:
        """Learned when it is first needed."""
        return TargetAttention(self.anchor, self.scale, seed=self.seed)

    def say(
        self, pairs: Sequence[tuple[Perturbation, str]], use: Sequence[bool] = (True, True)
    ) -> Said:
        """What all say of some pairs; those not in use say what the anchor says."""
        perturbations, contexts = [p for p, _ in pairs], [c for _, c in pairs]
        anchor = self.anchor.predict(perturbations, contexts, self.scale)
        mean = np.repeat(anchor.mean[None], len(NETWORKS), 0)
        log_ratio = np.zeros_like(mean)
        speaks = np.zeros((len(pairs), len(NETWORKS)), bool)
        reads = [i for i, r in enumerate(anchor.regime) if r in READ]
        if use[0] and reads:
            query = make_query(
                self.anchor,
                [perturbations[i] for i in reads],
                [contexts[i] for i in reads],
                self.scale,
            )
            with torch.inference_mode():
                said, ratio = self.network(query.inputs)
            mean[0, reads] = said.numpy() * query.scale[:, None]
            log_ratio[0, reads] = ratio.numpy().clip(-6, 4)
            speaks[reads, 0] = True
        if use[1] and self.anchor.features:
            self._attend(pairs, anchor, mean[1], speaks[:, 1])
        return Said(anchor, mean, log_ratio, speaks)

    def _attend(
        self,
        pairs: Sequence[tuple[Perturbation, str]],
        anchor: AnchorPrediction,
        mean: np.ndarray,
        speaks: np.ndarray,
    ) -> None:
        """Write what attention says of targets never perturbed."""
        by_context: dict[str, list[int]] = {}
        for i, ((p, context), regime) in enumerate(zip(pairs, anchor.regime, strict=True)):
            if regime == "unseen" and any(f.covers(p.targets[0]) for f in self.anchor.features):
                by_context.setdefault(context, []).append(i)
        for context, mine in by_context.items():
            if context in self.attention.contexts:
                targets = [pairs[i][0].targets[0] for i in mine]
                base = self.anchor.shrunken_mean(context, self.scale)
                mean[mine] = base + self.attention.predict(targets, context)
                speaks[mine] = True
