"""What training on perturbations found, and the mean effects that follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpjepa.effects import SCALES, EffectAnchor, EffectTable, Gate, Regimes, Scale
from gpjepa.perturbations import Perturbation

from ._held_out import HeldOut
from ._network import Network, Reference
from ._results import PredictedEffect

GateOption = Literal["auto", 0, 1]


@dataclass(frozen=True)
class Response:
    """What :meth:`gpjepa.GPJEPA.train` found, beside the weights of the module.

    Attributes
    ----------
    effects
        Measured effects of all training cells.
    reference
        Control cells of each context, from which the network's mean effects are decoded.
    library_shifts
        How perturbations change the mean log library size.
    trained
        What the network was trained on; the held-out rows are not among it.
    gate
        Gate of each regime that was judged.
    held_out
        What was held out, and the errors there.
    """

    effects: EffectTable
    reference: Mapping[str, Reference]
    library_shifts: Mapping[Perturbation, float]
    trained: Regimes
    gate: Mapping[str, Gate]
    held_out: HeldOut


class MeanEffects:
    """D = A + g (N - A), on both scales.

    Parameters
    ----------
    anchor
        A, fitted on all training cells.
    network
        N - A.
    response
        The gate, and what it was judged on.
    """

    def __init__(self, anchor: EffectAnchor, network: Network, response: Response) -> None:
        self.anchor, self.network, self.response = anchor, network, response

    def gate(self, perturbation: Perturbation, context: str, asked: GateOption = "auto") -> float:
        """How much of the network is let in.

        The anchor may know targets on which the network was never trained, as they were held out:
        the smaller gate holds, of what is far for either of them.
        """
        if perturbation.is_control:
            return 0.0
        if asked != "auto":
            return float(asked)
        knowledge = (self.anchor.effects_.regimes, self.response.trained)
        regimes = {known.of(perturbation, context) for known in knowledge}
        if any(known.never_perturbed(perturbation) for known in knowledge):
            regimes.add("unseen")  # no better judged than its target that was never perturbed
        gates = self.response.gate
        return min(gates[r].gate if r in gates else 0.0 for r in regimes)

    def of_all(
        self, asked: Sequence[tuple[Perturbation, str, str]], gate: GateOption = "auto"
    ) -> list[PredictedEffect]:
        """Each perturbation, called by its label, in its context."""
        pairs = [p for p, _, _ in asked], [c for _, _, c in asked]
        found = {s: self.anchor.predict(*pairs, s) for s in SCALES}
        return [
            self._gated(
                *one,
                found["mean_log1p"].regime[i],
                gate,
                {s: found[s].mean[i] for s in SCALES},
                {s: found[s].variance[i] for s in SCALES},
            )
            for i, one in enumerate(asked)
        ]

    def _gated(
        self,
        perturbation: Perturbation,
        label: str,
        context: str,
        regime: str,
        gate: GateOption,
        anchor: dict[Scale, np.ndarray],
        variance: dict[Scale, np.ndarray],
    ) -> PredictedEffect:
        control = {s: self.anchor.effects_.control[s][context] for s in SCALES}
        g, effect = self.gate(perturbation, context, gate), anchor
        if g:
            added = self.network.effect(perturbation, context, anchor["mean_log1p"])
            effect = {s: anchor[s] + g * added[s] for s in SCALES}
        # The network's expression is not negative, the anchor has its own floor.
        floored = {
            s: np.maximum(effect[s], np.minimum(-control[s], anchor[s])).astype(np.float32)
            for s in SCALES
        }
        return PredictedEffect(
            perturbation, label, context, regime, g, floored, anchor, variance, control
        )
