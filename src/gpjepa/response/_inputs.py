"""What the response network reads, from an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpjepa.effects import ROLES, AnchorPrediction, EffectAnchor, ExpertPredictions, Scale
from gpjepa.nn import ResponseInputs
from gpjepa.perturbations import Perturbation

SUPPORTED = ("seen2", "seen1")
"""Regimes that the response network reads: pairs of which at least one target was measured alone."""
_LEAST = 1e-9


def supported(perturbation: Perturbation, regime: str) -> bool:
    """Whether the response network reads a perturbation of a regime: it was trained on pairs."""
    return regime in SUPPORTED and len(perturbation.targets) == 2


@dataclass(frozen=True)
class Query:
    """Some mean effects: what the anchor says of them, and the same for the network.

    Attributes
    ----------
    anchor
        The anchor's predictions.
    inputs
        What the network reads, in units of ``scale``.
    scale
        Expected size of an effect: root mean square over genes of the anchor's mean and standard
        deviation, shape (n_rows,).
    """

    anchor: AnchorPrediction
    inputs: ResponseInputs
    scale: np.ndarray


def make_query(
    anchor: EffectAnchor,
    pairs: Sequence[tuple[Perturbation, str]],
    predicted: AnchorPrediction,
    on: Scale,
) -> Query:
    """What the network is asked of some pairs, of which the anchor has made its predictions."""
    perturbations, contexts = [p for p, _ in pairs], [c for _, c in pairs]
    experts = anchor.experts(perturbations, contexts, on)
    size = (predicted.mean.astype(float) ** 2 + predicted.variance).mean(1)
    table = anchor.effects_
    typical = np.mean(table.effect[on].astype(float) ** 2)
    scale = np.sqrt(np.maximum(size, _LEAST * typical + 1e-300))
    most = max([1, *(len(e.roles) for e in experts)])
    said, noise = (np.zeros((len(experts), most, len(table.genes)), np.float32) for _ in range(2))
    roles = np.full((len(experts), most), -1)
    per_expert = np.zeros((len(experts), most, 4), np.float32)
    for i, each in enumerate(experts):
        n = len(each.roles)
        said[i, :n], noise[i, :n] = each.mean / scale[i], np.sqrt(each.noise) / scale[i]
        roles[i, :n] = [ROLES.index(role) for role in each.roles]
        per_expert[i, :n] = _of_experts(each, predicted.mean[i])
    genes = {gene: g for g, gene in enumerate(table.genes)}
    targeted = np.zeros(predicted.mean.shape, np.float32)
    for own, perturbation in zip(targeted, perturbations, strict=True):
        own[[genes[t] for t in perturbation.targets if t in genes]] = 1
    controls = [
        np.reshape([of[on][c] for c in contexts], predicted.mean.shape)
        for of in (table.control, table.control_variance)
    ]
    lengths = [predicted.mean, np.sqrt(predicted.variance), controls[0], np.sqrt(controls[1])]
    per_gene = np.stack([*(each / scale[:, None] for each in lengths), targeted], -1)
    return Query(
        predicted,
        ResponseInputs(
            torch.from_numpy(said),
            torch.from_numpy(noise),
            torch.from_numpy(roles),
            torch.from_numpy(per_expert),
            torch.from_numpy(per_gene.astype(np.float32)),
            torch.from_numpy(_of_rows(anchor, perturbations, contexts)),
        ),
        scale,
    )


def _of_experts(each: ExpertPredictions, anchor: np.ndarray) -> np.ndarray:
    """Scalars of the experts on one row, shape (n_experts, 4)."""
    length = np.sqrt((each.mean**2).sum(1))
    whole = np.sqrt((anchor.astype(float) ** 2).sum())
    cosine = each.mean @ anchor / np.maximum(length * whole, 1e-300)
    relative = np.log1p(np.minimum(length / max(whole, 1e-300), 20))
    return np.stack([each.weights, np.clip(each.on_control, -3, 3), cosine, relative], 1)


def _of_rows(
    anchor: EffectAnchor, perturbations: Sequence[Perturbation], contexts: Sequence[str]
) -> np.ndarray:
    """How much was measured, and where, shape (n_rows, 6)."""
    rows = anchor.effects_.rows
    n: dict[tuple[str, bool], int] = {}
    for context, perturbation in rows:
        of = context, len(perturbation.targets) > 1
        n[of] = n.get(of, 0) + 1
    regimes = anchor.effects_.regimes
    found = []
    for perturbation, context in zip(perturbations, contexts, strict=True):
        alone = [regimes.of(s, context) == "seen" for s in perturbation.singles]
        elsewhere = len(regimes.measured_in.get(perturbation, ()))
        counts = [n.get((context, False), 0), n.get((context, True), 0), elsewhere]
        n_targets = len(perturbation.targets)
        share = sum(alone) / n_targets
        found.append([*np.log1p(counts) / 2, float(n_targets > 1), n_targets / 2, share])
    return np.array(found, np.float32)
