"""The mean effect that users get: anchor, networks, and gates between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch

from gpjepa.effects import (
    ROLES,
    SCALES,
    AnchorPrediction,
    EffectAnchor,
    EffectTable,
    Gate,
    JointEffects,
    Scale,
)
from gpjepa.nn import ResponseNetwork
from gpjepa.perturbations import MissingFeatures, Perturbation, TargetFeatures

from ._judge import Judge, Judged
from ._networks import PRIOR, Networks, Pair, in_blocks
from ._weights import load_network

GateOption = Literal["auto", 0, 1]


@dataclass(frozen=True)
class ResponsePrediction(AnchorPrediction):
    r"""Predicted mean effects: :math:`D = A + g (N - A)`.

    Attributes
    ----------
    anchor
        A, the anchor's prediction, shape (n_pairs, n_genes).
    gate
        g, the network's share, shape (n_pairs,).
    """

    anchor: np.ndarray
    gate: np.ndarray


class ResponsePredictor:
    r"""Mean effects from everything that a screen measured, with or without cells.

    The anchor (:class:`gpjepa.effects.EffectAnchor`) predicts in closed form, and two networks add
    to it. The *response network*, trained on simulated screens and then on the screen's own pairs,
    reads what each expert of the anchor predicts of a pair of targets. *Attention*, learned on the
    screen itself, predicts targets never perturbed from measured ones with similar features.

    How much of a network counts, the gate, is decided for each regime on the screen at hand: rows
    are hidden as the regime hides them, anchor and network predict them, and the gate is as large as
    their gain justifies (:func:`gpjepa.effects.fit_gate`). The rows are compared with other controls
    than those that the predictions know (:func:`gpjepa.effects.control_halves`). Of pairs whose
    targets were both measured alone, and of which fewer than five can be hidden, half of the network
    counts; in other regimes nothing does.

    Parameters
    ----------
    features
        Kinds of target features, for targets never perturbed.
    network
        ``"pretrained"``, the response network that comes with the package, trained further where 20
        pairs of targets or more were measured; ``"scratch"``, one that is trained on these alone, and
        none if there are fewer; one of your own, used as it is; or None for the anchor alone, without
        attention too.
    missing_features
        As in :class:`gpjepa.effects.EffectAnchor`.
    seed
        Of all that is random.

    Attributes
    ----------
    anchor_
        The fitted anchor.
    """

    def __init__(
        self,
        features: TargetFeatures | Sequence[TargetFeatures] = (),
        network: Literal["pretrained", "scratch"] | ResponseNetwork | None = "pretrained",
        missing_features: MissingFeatures = "error",
        seed: int = 0,
    ) -> None:
        self._may_tune = isinstance(network, str)
        if network == "pretrained":
            network = load_network()
        elif network == "scratch":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = ResponseNetwork(len(ROLES))
        elif not (network is None or isinstance(network, ResponseNetwork)):
            raise ValueError(
                f"network={network!r} is not known; give 'pretrained', 'scratch', None or a "
                "ResponseNetwork."
            )
        if network is not None and network.n_roles != len(ROLES):
            raise ValueError(
                f"The network reads {network.n_roles} kinds of experts; the anchor has {len(ROLES)}."
            )
        self.network = None if network is None else network.eval()
        self.anchor_ = EffectAnchor(features, missing_features)
        self.seed = seed

    def fit(self, effects: EffectTable, judged: Judged | None = None) -> Self:
        """Fit the anchor; networks and gates are learned when they are first needed.

        Parameters
        ----------
        effects
            Measured effects.
        judged
            What :meth:`judge` found on the same effects before.
        """
        if judged is not None and judged.roles != ROLES:
            raise ValueError(
                "The response network was trained with an earlier version, on other experts of the "
                "anchor. Train it again."
            )
        self.anchor_.fit(effects)
        self._networks: dict[Scale, Networks] = {}
        self._judge = Judge(self.anchor_, self.network, self._may_tune, self.seed)
        self._judged = judged
        return self

    def judge(self, *, progress: Callable[[], object] = lambda: None) -> Judged:
        """Hide measured rows in turn, predict them from the others, and set the gates.

        On the first scale of the effects; the gates hold for the others too.

        Parameters
        ----------
        progress
            Called after each of ``n_refits``.
        """
        if self._judged is None:
            self._judged = self._judge.judge(progress)
        return self._judged

    @property
    def n_refits(self) -> int:
        """How often :meth:`judge` fits everything anew, at most thirty times."""
        return self._judge.n_refits

    def gates(self) -> Mapping[str, Gate]:
        """The gate of each regime in which there is a network (:meth:`judge`)."""
        return self.judge().gates if self.network is not None else {}

    def predict(
        self,
        perturbations: Sequence[Perturbation],
        contexts: Sequence[str],
        scale: Scale | None = None,
        gate: GateOption = "auto",
    ) -> ResponsePrediction:
        """Predict the mean effect of each pair of perturbation and context.

        Parameters
        ----------
        perturbations, contexts
            The pairs.
        scale
            Scale of the effects; the table's first by default.
        gate
            ``"auto"``, as judged on this screen; 0 for the anchor; 1 for the network.

        Raises
        ------
        KeyError, gpjepa.perturbations.UnknownTargetError
            As :meth:`gpjepa.effects.EffectAnchor.predict`.
        """
        if gate not in ("auto", 0, 1):
            raise ValueError(f"gate={gate!r} is not known; choose 'auto', 0 or 1.")
        scale = self._scale(scale)
        found = self.anchor_.predict(perturbations, contexts, scale, own_genes=False)
        share = self._shares(found.regime, gate)
        mean, variance = found.mean.copy(), found.variance.copy()
        for rows in in_blocks(np.flatnonzero(share), found.mean.shape[1]):
            pairs = [(perturbations[i], contexts[i]) for i in rows]
            network = self._networks_of(scale).predict(pairs, found.rows(rows))
            share[rows] *= network.available
            g = share[rows, None]
            moved = found.mean[rows] + g * (network.mean - found.mean[rows])
            mean[rows] = self._floored(moved, found.mean[rows], pairs, scale)
            variance[rows] *= np.exp(g * network.log_ratio)
        noise = np.minimum(found.noise, variance)
        pairs = list(zip(perturbations, contexts, strict=True))
        anchor = self.anchor_.with_own_genes(found, pairs, scale).mean
        moved = ResponsePrediction(mean, variance, noise, found.regime, anchor, share)
        return self.anchor_.with_own_genes(moved, pairs, scale)

    def joint(
        self,
        perturbations: Sequence[Perturbation],
        contexts: Sequence[str],
        scale: Scale | None = None,
        gate: GateOption = "auto",
    ) -> JointEffects:
        """As :meth:`predict`, with errors that go together (:class:`gpjepa.effects.JointEffects`)."""
        scale = self._scale(scale)
        found = self.predict(perturbations, contexts, scale, gate)
        joint = self.anchor_.joint(perturbations, contexts, scale)
        return joint.moved(found.mean, found.variance)

    def _scale(self, scale: Scale | None) -> Scale:
        effects = self.anchor_.effects_
        return effects.scales[0] if scale is None else effects.check_scale(scale)

    def _floored(
        self, mean: np.ndarray, anchor: np.ndarray, pairs: Sequence[Pair], scale: Scale
    ) -> np.ndarray:
        """Not less than no expression; the anchor has its own floor."""
        table = self.anchor_.effects_
        if scale not in SCALES or not table.has_controls:
            return mean
        floor = np.stack([-table.control[scale][c] for _, c in pairs])
        return np.maximum(mean, np.minimum(floor, anchor))

    def _networks_of(self, scale: Scale) -> Networks:
        if scale not in self._networks:
            network = self.judge().network if self._judge.tunes else self.network
            assert network is not None
            self._networks[scale] = Networks(network, self.anchor_, scale, self.seed)
        return self._networks[scale]

    def _shares(self, regimes: list[str], gate: GateOption) -> np.ndarray:
        if self.network is None or gate == 0 or not set(regimes) & set(PRIOR):
            return np.zeros(len(regimes))
        if gate == 1:
            return np.array([float(r in PRIOR) for r in regimes])
        gates = self.gates()
        return np.array([gates[r].gate if r in gates else 0.0 for r in regimes])
