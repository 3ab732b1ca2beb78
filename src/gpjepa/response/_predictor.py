"""The mean effect that users get: anchor, networks, and gates between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from gpjepa.effects import (
    SCALES,
    AnchorPrediction,
    EffectAnchor,
    EffectTable,
    Scale,
    control_halves,
)
from gpjepa.nn import ResponseNetwork
from gpjepa.perturbations import MissingFeatures, Perturbation, TargetFeatures

from ._gate import Gate, fit_gate
from ._networks import NETWORKS, PRIOR, Networks
from ._weights import load_network

GateOption = Literal["auto", 0, 1]
Pair = tuple[Perturbation, str]
_N_FOLDS = 5
_BLOCK = 200_000  # rows times genes that the networks are asked for at a time


@dataclass(frozen=True)
class ResponsePrediction(AnchorPrediction):
    r"""Predicted mean effects: :math:`D = A + \sum_k g_k (N_k - A)`.

    Attributes
    ----------
    anchor
        A, the anchor's prediction, shape (n_pairs, n_genes).
    gate
        The networks' weights, summed, shape (n_pairs,).
    """

    anchor: np.ndarray
    gate: np.ndarray


class ResponsePredictor:
    r"""Mean effects from everything that a screen measured, with or without cells.

    The anchor (:class:`gpjepa.effects.EffectAnchor`) predicts in closed form. Two networks add to
    it: the *response network*, which was trained on simulated screens and is used as it is, reads what each expert of the
    anchor says of combinations and new contexts; *attention* learns on the screen itself which
    measured targets tell what one does that was never perturbed, from the features.

    How much of them counts, the gate, is decided for each regime on the screen at hand: rows are
    hidden as the regime hides them, all parts predict them, and the weights go from a
    prior as far as they gain. For this the rows are compared with
    other controls than those that the predictions know
    (:func:`gpjepa.effects.control_halves`).

    Parameters
    ----------
    features
        Kinds of target features, for targets never perturbed.
    network
        ``"pretrained"``, the response network that comes with the package; one of your own; or None for the
        anchor alone, without attention too.
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
        network: Literal["pretrained"] | ResponseNetwork | None = "pretrained",
        missing_features: MissingFeatures = "error",
        seed: int = 0,
    ) -> None:
        if isinstance(network, str):
            if network != "pretrained":
                raise ValueError(
                    f"network={network!r} is not known; give 'pretrained', None or a network."
                )
            network = load_network()
        self.network = None if network is None else network.eval()
        self.anchor_ = EffectAnchor(features, missing_features)
        self.seed = seed

    def fit(self, effects: EffectTable) -> Self:
        """Fit the anchor; networks and gates of a scale when they are first needed."""
        self.anchor_.fit(effects)
        self._networks: dict[Scale, Networks] = {}
        self._gates: dict[Scale, dict[str, Gate]] = {}
        return self

    def gates(
        self, scale: Scale = "mean_log1p", *, progress: Callable[[], object] = lambda: None
    ) -> dict[str, Gate]:
        """The gate of each regime in which the networks may speak.

        ``progress`` is called after each refit, some ten times.
        """
        if self.network is None:
            return {}
        if scale not in self._gates:
            self._gates[scale] = self._judged(scale, self.network, progress)
        return self._gates[scale]

    def predict(
        self,
        perturbations: Sequence[Perturbation],
        contexts: Sequence[str],
        scale: Scale = "mean_log1p",
        gate: GateOption = "auto",
    ) -> ResponsePrediction:
        """Predict the mean effect of each pair of perturbation and context.

        Parameters
        ----------
        perturbations, contexts
            The pairs.
        scale
            Scale of the effects.
        gate
            ``"auto"``, as judged on this screen; 0 for the anchor; 1 for the networks, equally.

        Raises
        ------
        KeyError, gpjepa.perturbations.UnknownTargetError
            As :meth:`gpjepa.effects.EffectAnchor.predict`.
        """
        if gate not in ("auto", 0, 1):
            raise ValueError(f"gate={gate!r} is not known; choose 'auto', 0 or 1.")
        found = self.anchor_.predict(perturbations, contexts, scale)
        share = np.zeros((len(found.regime), len(NETWORKS)))
        if self.network is not None and gate != 0:
            share = self._shares(found.regime, scale, gate)
        mean, variance = found.mean.copy(), found.variance.copy()
        asked = np.flatnonzero(share.any(1))
        if self.network is not None and len(asked):
            networks = self._networks_of(scale, self.network)
            for some in self._blocks(asked):
                pairs = [(perturbations[i], contexts[i]) for i in some]
                said = networks.say(pairs, use=share[some].any(0))
                weights = share[some] * said.speaks
                if gate == 1:
                    weights /= np.maximum(weights.sum(1, keepdims=True), 1)
                added = said.mean - found.mean[some]
                moved = found.mean[some] + np.einsum("nk,kng->ng", weights, added)
                mean[some] = self._floored(moved, found.mean[some], pairs, scale)
                variance[some] *= np.exp(np.einsum("nk,kng->ng", weights, said.log_ratio))
                share[some] = weights
        noise = np.minimum(found.noise, variance)
        return ResponsePrediction(mean, variance, noise, found.regime, found.mean, share.sum(1))

    def _floored(
        self, mean: np.ndarray, anchor: np.ndarray, pairs: Sequence[Pair], scale: Scale
    ) -> np.ndarray:
        """Not less than no expression; the anchor has its own floor."""
        table = self.anchor_.effects_
        if scale not in SCALES or not table.has_controls:
            return mean
        floor = np.stack([-table.control[scale][c] for _, c in pairs])
        return np.maximum(mean, np.minimum(floor, anchor))

    def _networks_of(self, scale: Scale, network: ResponseNetwork) -> Networks:
        if scale not in self._networks:
            self._networks[scale] = Networks(network, self.anchor_, scale, self.seed)
        return self._networks[scale]

    def _shares(self, regimes: list[str], scale: Scale, gate: GateOption) -> np.ndarray:
        """Weights of the networks, shape (n, n_networks)."""
        if gate == 1:
            each = {r: np.array(p) >= 0 for r, p in PRIOR.items()}
        else:
            each = {r: g.weights for r, g in self.gates(scale).items()}
        nothing = np.zeros(len(NETWORKS))
        return np.stack([each.get(r, nothing).astype(float) for r in regimes])

    def _blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        at_a_time = max(1, _BLOCK // len(self.anchor_.effects_.genes))
        return (rows[i : i + at_a_time] for i in range(0, len(rows), at_a_time))

    def _judged(
        self, scale: Scale, network: ResponseNetwork, progress: Callable[[], object]
    ) -> dict[str, Gate]:
        """Gates, by predictions of all rows without them."""
        effects = self.anchor_.effects_
        rows: dict[str, list[int]] = {regime: [] for regime in PRIOR}
        anchors: dict[str, list[np.ndarray]] = {regime: [] for regime in PRIOR}
        networks: dict[str, list[np.ndarray]] = {regime: [] for regime in PRIOR}
        one, other = control_halves(effects, scale, np.random.default_rng(self.seed))
        for _, hidden in self.anchor_.folds(_N_FOLDS):
            rest = one.subset(~hidden)
            if rest.rows:
                anchor = EffectAnchor(self.anchor_.features, "mean").fit(rest)
                judged = Networks(network, anchor, scale, self.seed)
                for some in self._blocks(np.flatnonzero(hidden)):
                    pairs = [(effects.rows[i][1], effects.rows[i][0]) for i in some]
                    said = judged.say(pairs)
                    for j, regime in enumerate(said.anchor.regime):
                        if regime in rows:
                            rows[regime].append(int(some[j]))
                            anchors[regime].append(said.anchor.mean[j])
                            networks[regime].append(said.mean[:, j])
            progress()
        found = {}
        for regime, prior in PRIOR.items():
            if rows[regime]:
                said_by = np.stack(networks[regime], 1), np.stack(anchors[regime])
                found[regime] = fit_gate(*said_by, other, rows[regime], scale, np.array(prior))
            else:
                found[regime] = Gate(np.array(prior), 0, 0.0, 0.0)
        return found
