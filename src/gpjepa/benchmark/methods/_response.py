"""The response predictor: anchor, network and gate on mean effects alone."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np

from gpjepa.effects import EffectTable
from gpjepa.perturbations import Perturbation, TargetFeatures
from gpjepa.response import GateOption, ResponsePredictor
from gpjepa.splits import Split

from ._effects import EffectMethod, Predicted


class ResponseMethod(EffectMethod):
    """Anchor and response network.

    Parameters
    ----------
    features
        Kinds of target features.
    gate
        As in :meth:`gpjepa.response.ResponsePredictor.predict`.
    """

    def __init__(self, features: Sequence[TargetFeatures], gate: GateOption = "auto") -> None:
        super().__init__(self._predicted)
        self.features, self.gate = features, gate

    def fit(self, train: ad.AnnData, split: Split) -> None:
        """Fit the anchor; the gate is judged when it is first needed."""
        super().fit(train, split)
        self._fitted = ResponsePredictor(self.features, missing_features="mean").fit(self.effects_)

    def _predicted(
        self, effects: EffectTable, wanted: list[Perturbation], contexts: list[str]
    ) -> Predicted:
        found = self._fitted.predict(wanted, contexts, effects.scales[0], self.gate)
        return found.mean, np.sqrt(found.variance)
