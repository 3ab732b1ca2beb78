"""The response network, trained further on the pairs of a screen."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import cos, pi
from zlib import crc32

import numpy as np
import torch

from gpjepa.effects import EffectAnchor, EffectTable
from gpjepa.nn import ResponseNetwork

from ._episodes import Episode
from ._inputs import make_query, supported

ENOUGH_PAIRS = 20
"""Measured pairs of targets from which on the network is trained on a screen."""
_MOST_GENES = 1_000  # that are kept of each pair
_ROWS, _GENES = 12, 128  # that a step sees
_N_STEPS, _LR, _WARM_UP = 150, 1e-3, 10
_LEAST_SIZE = 0.15  # as in pretraining


def enough_pairs(effects: EffectTable) -> bool:
    """Whether there are enough pairs to train on."""
    pairs = {p.targets for _, p in effects.rows if len(p.targets) == 2}
    return len(pairs) >= ENOUGH_PAIRS


@dataclass(frozen=True)
class HiddenPairs:
    """Pairs that were hidden together, and of which an anchor without them was asked.

    Attributes
    ----------
    rows
        Which rows of the table they are, shape (n_rows,).
    episode
        What the network reads, and their effects as measured.
    noise
        Sampling variance of these, in the same units, shape (n_rows, n_genes).
    """

    rows: np.ndarray
    episode: Episode
    noise: torch.Tensor

    @classmethod
    def of(cls, anchor: EffectAnchor, judged_by: EffectTable, rows: np.ndarray) -> HiddenPairs:
        """Of the hidden rows, those that the network reads."""
        [on] = judged_by.scales
        regimes = [anchor.regime(judged_by.rows[i][1], judged_by.rows[i][0]) for i in rows]
        read = [supported(judged_by.rows[i][1], r) for i, r in zip(rows, regimes, strict=True)]
        rows = rows[np.array(read, bool)]
        pairs = [(judged_by.rows[i][1], judged_by.rows[i][0]) for i in rows]
        said = anchor.predict([p for p, _ in pairs], [c for _, c in pairs], on)
        query = make_query(anchor, pairs, said, on)
        genes = _some_genes(judged_by.genes)
        scale = query.scale[:, None]
        measured, noise, variance = (
            torch.from_numpy((values[:, genes] / unit).astype(np.float32))
            for values, unit in (
                (judged_by.effect[on][rows], scale),
                (judged_by.subset(rows).noise(on), scale**2),
                (said.variance, scale**2),
            )
        )
        scored = torch.from_numpy(~judged_by.targeted(rows)[:, genes])
        inputs = query.inputs.genes(torch.from_numpy(genes))
        return cls(rows, Episode(inputs, measured, variance, scored), noise)

    def without(self, rows: np.ndarray) -> HiddenPairs:
        """But for some rows of the table."""
        kept = np.flatnonzero(~np.isin(self.rows, rows))
        at = torch.from_numpy(kept)
        return HiddenPairs(self.rows[kept], self.episode.rows(at), self.noise[at])


def _some_genes(genes: np.ndarray) -> np.ndarray:
    """Places of enough genes, which do not depend on their order."""
    order = sorted(range(len(genes)), key=lambda g: (crc32(str(genes[g]).encode()), genes[g]))
    return np.array(order[:_MOST_GENES])


def tuned(
    network: ResponseNetwork, hidden: Sequence[HiddenPairs], seed: int = 0
) -> ResponseNetwork:
    """A copy of a network that was trained further on pairs that were hidden.

    By their squared error, in proportion to the size of the effect without its noise.
    """
    hidden = [each for each in hidden if len(each.rows)]
    network = deepcopy(network)
    if not hidden:
        return network
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), _LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / _WARM_UP) * 0.5 * (1 + cos(pi * s / _N_STEPS))
    )
    for _ in range(_N_STEPS):
        each = hidden[rng.integers(len(hidden))]
        rows = torch.from_numpy(rng.permutation(len(each.rows))[:_ROWS])
        genes = torch.from_numpy(rng.permutation(each.noise.shape[1])[:_GENES])
        optimizer.zero_grad()
        episode, noise = each.episode.rows(rows).genes(genes), each.noise[rows][:, genes]
        _loss(network, episode, noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def _loss(network: ResponseNetwork, episode: Episode, noise: torch.Tensor) -> torch.Tensor:
    mean, log_ratio = network(episode.inputs)
    error = (mean - episode.truth).square()
    size = episode.mean(episode.truth.square() - noise).clamp_min(0)
    relative = episode.mean(error) / (size + _LEAST_SIZE)
    variance = episode.variance.clamp_min(1e-6) * log_ratio.clamp(-6, 4).exp() + noise
    misfit = (error.detach() / variance).clamp_max(50)
    likelihood = episode.mean(0.5 * (variance.log() + misfit))
    return (relative + 0.05 * likelihood).mean()
