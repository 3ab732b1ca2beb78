"""Episodes: rows of a screen are hidden as a regime would hide them, and are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from gpjepa.datasets import RandomScreen
from gpjepa.effects import EffectAnchor
from gpjepa.nn import ResponseInputs

from ._inputs import make_query, supported

_MOST_ROWS = 12


@dataclass(frozen=True)
class Episode:
    """Hidden rows, in units of the scale of each.

    Attributes
    ----------
    inputs
        What the network reads of them.
    truth
        True effects, shape (n_rows, n_genes).
    variance
        The anchor's, shape (n_rows, n_genes).
    counts
        Genes that are scored: all but those targeted, shape (n_rows, n_genes).
    laws
        Laws of combination in the screen.
    """

    inputs: ResponseInputs
    truth: torch.Tensor
    variance: torch.Tensor
    counts: torch.Tensor
    laws: frozenset[str] = frozenset()

    def genes(self, chosen: torch.Tensor) -> Episode:
        """Of some genes only."""
        truth, variance, counts = (x[:, chosen] for x in (self.truth, self.variance, self.counts))
        return Episode(self.inputs.genes(chosen), truth, variance, counts, self.laws)

    def rows(self, chosen: torch.Tensor) -> Episode:
        """Of some rows only."""
        truth, variance, counts = (x[chosen] for x in (self.truth, self.variance, self.counts))
        return Episode(self.inputs.rows(chosen), truth, variance, counts, self.laws)

    def to(self, dtype: torch.dtype) -> Episode:
        """With floating-point numbers of another precision."""
        inputs = [getattr(self.inputs, f.name) for f in fields(self.inputs)]
        values = [v.to(dtype) if v.is_floating_point() else v for v in inputs]
        truth, variance = self.truth.to(dtype), self.variance.to(dtype)
        return Episode(ResponseInputs(*values), truth, variance, self.counts, self.laws)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the genes that are scored, shape (n_rows,)."""
        return (values * self.counts).sum(1) / self.counts.sum(1).clamp_min(1)


def draw_episode(screen: RandomScreen, rng: np.random.Generator) -> Episode | None:
    """Hide rows of a screen, fit the anchor on the others, and ask for some of those hidden.

    None if nothing is left to fit on, or nothing hidden that the network reads.
    """
    hidden, may_be_asked = hide(screen, rng)
    rows, rest = screen.effects.rows, screen.effects.subset(~hidden)
    regimes = {i: rest.regimes.of(rows[i][1], rows[i][0]) for i in np.flatnonzero(may_be_asked)}
    asked = np.array([i for i, regime in regimes.items() if supported(rows[i][1], regime)], int)
    asked = np.sort(rng.permutation(asked)[:_MOST_ROWS])
    if not len(asked) or not rest.rows:
        return None
    anchor = EffectAnchor(screen.features, "mean").fit(rest)
    [on] = screen.effects.scales
    perturbations, contexts = [rows[i][1] for i in asked], [rows[i][0] for i in asked]
    predicted = anchor.predict(perturbations, contexts, on, own_genes=False)
    pairs = list(zip(perturbations, contexts, strict=True))
    query = make_query(anchor, pairs, predicted, on)
    scale = query.scale[:, None]
    return Episode(
        query.inputs,
        torch.from_numpy((screen.truth[asked] / scale).astype(np.float32)),
        torch.from_numpy((query.anchor.variance / scale**2).astype(np.float32)),
        torch.from_numpy(~screen.effects.targeted(asked)),
        screen.laws,
    )


def hide(screen: RandomScreen, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are hidden, and those of them that may be asked for."""
    rows = screen.effects.rows
    several = np.array([len(p.targets) > 1 for _, p in rows])
    if rng.random() < 0.7:
        return _combinations(rng, several, [p for _, p in rows])
    targets = sorted({t for _, p in rows for t in p.targets})
    chosen = set(rng.permutation(targets)[: max(1, len(targets) // 4)])
    hidden = np.array([not chosen.isdisjoint(p.targets) for _, p in rows])
    return hidden, hidden & several


def _combinations(
    rng: np.random.Generator, several: np.ndarray, perturbations: list
) -> tuple[np.ndarray, np.ndarray]:
    """Some combinations in all contexts, or all of them, and sometimes a few of their targets."""
    units = sorted({p for p, many in zip(perturbations, several, strict=True) if many})
    share = rng.choice([0.3, rng.random(), 1.0], p=[0.4, 0.3, 0.3])
    chosen = {units[i] for i in rng.permutation(len(units))[: max(1, round(share * len(units)))]}
    asked = np.array([p in chosen for p in perturbations])
    hidden = asked.copy()
    if rng.random() < 0.2:  # of other combinations, some targets were never measured alone
        alone = sorted({p for p, many in zip(perturbations, several, strict=True) if not many})
        away = {alone[i] for i in rng.permutation(len(alone))[: len(alone) // 4]}
        hidden |= np.array([p in away for p in perturbations])
    return hidden, asked
