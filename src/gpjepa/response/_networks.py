"""Which network predicts what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from gpjepa.effects import AnchorPrediction, EffectAnchor, Scale
from gpjepa.nn import ResponseNetwork
from gpjepa.perturbations import Perturbation

from ._attention import TargetAttention
from ._inputs import SUPPORTED, make_query, supported

Pair = tuple[Perturbation, str]
PRIOR = {"seen2": 0.5, "seen1": 0.0, "unseen": 0.0}
"""Gates of the regimes in which there is a network, where a screen cannot judge it. Attention
predicts targets never perturbed, the response network the others."""
VALUES_ASKED, _VALUES_READ = 500_000, 20_000
"""Rows times genes that the experts are asked for, and that the network reads, at a time; so few stay
in the cache of a processor."""
_VALUES_PREDICTED = 2_000_000


def in_blocks(
    rows: np.ndarray, n_genes: int, values: int = _VALUES_PREDICTED
) -> Iterator[np.ndarray]:
    """Some rows, as many at a time as have so many values."""
    at_a_time = max(1, values // n_genes)
    return (rows[i : i + at_a_time] for i in range(0, len(rows), at_a_time))


@dataclass(frozen=True)
class NetworkPredictions:
    """What the networks predict of some pairs.

    Attributes
    ----------
    available
        Of which pairs a network predicts something, shape (n,).
    mean
        Mean effects; the anchor's where no network is available. Shape (n, n_genes).
    log_ratio
        Log of the variance over the anchor's, of the same shape.
    """

    available: np.ndarray
    mean: np.ndarray
    log_ratio: np.ndarray


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

    def predict(self, pairs: Sequence[Pair], anchor: AnchorPrediction) -> NetworkPredictions:
        """Predict some pairs, of which the anchor has made its predictions."""
        found = NetworkPredictions(
            np.zeros(len(pairs), bool), anchor.mean.copy(), np.zeros_like(anchor.mean)
        )
        if not self.network.untrained:
            reads = [i for i, (p, _) in enumerate(pairs) if supported(p, anchor.regime[i])]
            for some in in_blocks(np.array(reads, int), anchor.mean.shape[1], VALUES_ASKED):
                self._read(found, pairs, anchor, some)
        unseen = [i for i, regime in enumerate(anchor.regime) if regime == "unseen"]
        if unseen and self.anchor.features:
            self._attend(found, pairs, unseen)
        return found

    def _read(
        self,
        found: NetworkPredictions,
        pairs: Sequence[Pair],
        anchor: AnchorPrediction,
        rows: np.ndarray,
    ) -> None:
        """Let the response network read some rows."""
        query = make_query(self.anchor, [pairs[i] for i in rows], anchor.rows(rows), self.scale)
        size = max(1, _VALUES_READ // query.anchor.mean.shape[1])
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            with torch.inference_mode():
                mean, log_ratio = self.network(query.inputs.rows(some))
            found.mean[rows[some]] = mean.numpy() * query.scale[some, None]
            found.log_ratio[rows[some]] = log_ratio.numpy().clip(-6, 4)
        found.available[rows] = True

    def _attend(self, found: NetworkPredictions, pairs: Sequence[Pair], rows: list[int]) -> None:
        """Predict targets never perturbed from those like them."""
        by_context: dict[str, list[int]] = {}
        for i in rows:
            if self.anchor.covers(pairs[i][0].targets[0]):
                by_context.setdefault(pairs[i][1], []).append(i)
        for context, mine in by_context.items():
            if context in self.attention.contexts:
                targets = [pairs[i][0].targets[0] for i in mine]
                base = self.anchor.shrunken_mean(context, self.scale)
                found.mean[mine] = base + self.attention.predict(targets, context)
                found.available[mine] = True

    @property
    def regimes(self) -> list[str]:
        """Regimes in which one of them may be available."""
        attends = self.anchor.features and TargetAttention.measured(self.anchor)
        reads = [] if self.network.untrained else SUPPORTED
        return [*reads, *(["unseen"] if attends else [])]
