"""The response network, trained further on the pairs of a screen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
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
from ._networks import VALUES_ASKED, in_blocks
from ._pretrain import LEAST_SIZE

ENOUGH_PAIRS = 20
"""Measured pairs of targets from which on the network is trained on a screen."""
_MOST_GENES = 1_000  # that are kept of each pair
_ROWS, _GENES = 12, 128  # that a step sees
_N_STEPS, _LR, _WARM_UP = 150, 1e-3, 10


def enough_pairs(effects: EffectTable | Collection[tuple[str, ...]]) -> bool:
    """Whether a table, or a set of combinations, has enough pairs to train on."""
    if isinstance(effects, EffectTable):
        effects = {p.targets for _, p in effects.rows}
    return sum(len(targets) == 2 for targets in effects) >= ENOUGH_PAIRS


@dataclass(frozen=True)
class HiddenPairs:
    """Pairs that were hidden together, and what an anchor that was fitted without them predicts.

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
    def of(
        cls, anchor: EffectAnchor, judged_by: EffectTable, rows: np.ndarray
    ) -> Iterator[HiddenPairs]:
        """Of the hidden rows, those that the network reads; some at a time."""
        [on] = judged_by.scales
        pairs = {int(i): (judged_by.rows[i][1], judged_by.rows[i][0]) for i in rows}
        read = [i for i, (p, c) in pairs.items() if supported(p, anchor.regime(p, c))]
        genes = _some_genes(judged_by.genes)
        for some in in_blocks(np.array(read, int), len(judged_by.genes), VALUES_ASKED):
            asked = [pairs[i] for i in some]
            said = anchor.predict([p for p, _ in asked], [c for _, c in asked], on, own_genes=False)
            query = make_query(anchor, asked, said, on)
            scale = query.scale[:, None]
            measured, noise, variance = (
                torch.from_numpy((values[:, genes] / unit).astype(np.float32))
                for values, unit in (
                    (judged_by.effect[on][some], scale),
                    (judged_by.subset(some).noise(on), scale**2),
                    (said.variance, scale**2),
                )
            )
            scored = torch.from_numpy(~judged_by.targeted(some)[:, genes])
            inputs = query.inputs.genes(torch.from_numpy(genes))
            yield cls(some, Episode(inputs, measured, variance, scored), noise)

    def some(self, rows: np.ndarray, genes: np.ndarray) -> tuple[Episode, torch.Tensor]:
        """Episode and noise of some rows and genes."""
        at, of = torch.from_numpy(rows), torch.from_numpy(genes)
        return self.episode.rows(at).genes(of), self.noise[at][:, of]


def _some_genes(genes: np.ndarray) -> np.ndarray:
    """Places of enough genes, which do not depend on their order."""
    order = sorted(range(len(genes)), key=lambda g: (crc32(str(genes[g]).encode()), genes[g]))
    return np.array(order[:_MOST_GENES])


def tuned(
    network: ResponseNetwork,
    hidden: Sequence[HiddenPairs],
    without: Sequence[int] | np.ndarray,
    seed: int = 0,
) -> ResponseNetwork:
    """A copy of a network that was trained further on pairs that were hidden, but for some rows.

    By their squared error, in proportion to the size of the effect without its noise.
    """
    kept = [(each, np.flatnonzero(~np.isin(each.rows, without))) for each in hidden]
    kept = [(each, rows) for each, rows in kept if len(rows)]
    network = deepcopy(network)
    if not kept:
        return network
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), _LR, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / _WARM_UP) * 0.5 * (1 + cos(pi * s / _N_STEPS))
    )
    for _ in range(_N_STEPS):
        each, rows = kept[rng.integers(len(kept))]
        genes = rng.permutation(each.noise.shape[1])[:_GENES]
        optimizer.zero_grad()
        _loss(network, *each.some(rng.permutation(rows)[:_ROWS], genes)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def _loss(network: ResponseNetwork, episode: Episode, noise: torch.Tensor) -> torch.Tensor:
    mean, log_ratio = network(episode.inputs)
    error = (mean - episode.truth).square()
    size = episode.mean(episode.truth.square() - noise).clamp_min(0)
    relative = episode.mean(error) / (size + LEAST_SIZE)
    variance = episode.variance.clamp_min(1e-6) * log_ratio.clamp(-6, 4).exp() + noise
    misfit = (error.detach() / variance).clamp_max(50)
    likelihood = episode.mean(0.5 * (variance.log() + misfit))
    return (relative + 0.05 * likelihood).mean()
