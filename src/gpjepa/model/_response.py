"""What training on perturbations found, and the mean effects that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpjepa.effects import SCALES, EffectTable, Scale
from gpjepa.perturbations import Perturbation
from gpjepa.response import GateOption, Judged, ResponsePredictor

from ._results import PredictedEffect

Asked = tuple[Perturbation, str, str]
"""A perturbation, what results call it, and its context."""


@dataclass(frozen=True)
class Response:
    """What :meth:`gpjepa.GPJEPA.train` found, beside the weights of the module.

    Attributes
    ----------
    effects
        Measured effects of all training cells.
    library_shifts
        How perturbations change the mean log library size.
    judged
        Gates, errors and the response network, from measured effects that were hidden in turn.
    """

    effects: EffectTable
    library_shifts: Mapping[Perturbation, float]
    judged: Judged


def predicted_effects(
    predictor: ResponsePredictor,
    asked: Sequence[Asked],
    gate: GateOption = "auto",
    scales: Sequence[Scale] = SCALES,
) -> list[PredictedEffect]:
    """Mean effects on some scales."""
    pairs = [p for p, _, _ in asked], [c for _, _, c in asked]
    found = {s: predictor.predict(*pairs, s, gate) for s in scales}
    first, control = found[scales[0]], predictor.anchor_.effects_.control
    return [
        PredictedEffect(
            perturbation,
            label,
            context,
            first.regime[i],
            float(first.gate[i]),
            {s: found[s].mean[i].astype(np.float32) for s in scales},
            {s: found[s].anchor[i] for s in scales},
            {s: found[s].variance[i] for s in scales},
            {s: control[s][context] for s in scales},
        )
        for i, (perturbation, label, context) in enumerate(asked)
    ]
