"""Cells that have the mean effect which a method states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy.sparse as sp

from gpjepa.effects import PER

from ._cells import CellSet

N_STEPS = 10  # of the search for the factors
TOLERANCE = 1e-6  # of a profile's difference that asks for no move
MANY = 50  # added counts per cell from which on single molecules are not told from each other


def calibrated(cells: CellSet, profile: np.ndarray, seed: int = 0) -> CellSet:
    """Cells moved gene by gene until their mean is a stated profile.

    What a gene has too much of is thinned: every molecule stays with one probability. What it has
    too little of is added: Poisson counts in proportion to library sizes, so that counts stay
    integers and cells keep what sets them apart. The one factor per gene is found by bracketed
    secant steps on the very molecules that are drawn, so that the mean of log1p counts per 10,000
    is the profile up to a single molecule. A profile below zero is no expression, and none is more
    than all counts of a cell.

    Random numbers are the same for every profile: the same profile gives the same cells.

    Parameters
    ----------
    cells
        Cells with counts.
    profile
        Mean log1p counts per 10,000 to reach, shape (n_genes,).
    seed
        Seed of the molecules that stay and that are added.

    Returns
    -------
    CellSet
        The same cells with other counts.
    """
    target = np.clip(np.asarray(profile, float), 0, np.log1p(PER))
    counts = sp.csc_matrix(cells.counts, dtype=np.float64)
    now = np.asarray(cells.log1p.mean(0), float).ravel()
    extra = (np.expm1(target) - np.expm1(now)) * cells.library.mean() / PER
    groups = {
        _kept: target < now - TOLERANCE,
        _joined: (target > now + TOLERANCE) & (extra <= MANY),
        _joined_by_many: (target > now + TOLERANCE) & (extra > MANY),
    }
    rng = np.random.default_rng(seed)
    parts, order = [], []
    for move, mask in groups.items():
        genes = np.flatnonzero(mask)
        if len(genes):
            parts.append(move(counts[:, genes], target[genes], cells.library, rng))
            order.append(genes)
    if not parts:
        return cells
    same = np.flatnonzero(~np.isin(np.arange(len(target)), np.concatenate(order)))
    back = np.argsort(np.concatenate([*order, same]), kind="stable")
    moved = sp.csr_matrix(
        sp.hstack([*parts, counts[:, same]], format="csc")[:, back], dtype=np.float32
    )
    moved.eliminate_zeros()
    return replace(cells, counts=moved)


@dataclass(frozen=True)
class _Molecules:
    """Molecules with the time at which each appears; a gene's threshold says which are there.

    ``entry`` is the (cell, gene) of each molecule, ``cell`` and ``gene`` those of each entry.
    """

    time: np.ndarray
    entry: np.ndarray
    cell: np.ndarray
    gene: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def of(cls, time: np.ndarray, cell: np.ndarray, gene: np.ndarray, shape: tuple) -> _Molecules:
        place, entry = np.unique(gene.astype(np.int64) * shape[0] + cell, return_inverse=True)
        return cls(time, entry, place % shape[0], place // shape[0], shape)

    def there(self, threshold: np.ndarray) -> np.ndarray:
        """Counts of each entry."""
        inside = self.time < threshold[self.gene[self.entry]]
        return np.bincount(self.entry[inside], minlength=len(self.cell)).astype(float)

    def mean(self, threshold: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Mean log1p counts per 10,000, shape (n_genes,)."""
        values = np.log1p(self.there(threshold) * (PER / library)[self.cell])
        return np.bincount(self.gene, values, minlength=self.shape[1]) / self.shape[0]

    def matrix(self, threshold: np.ndarray) -> sp.csc_matrix:
        return sp.csc_matrix((self.there(threshold), (self.cell, self.gene)), self.shape)


def _present(counts: sp.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Cell and gene of every molecule."""
    entries = counts.tocoo()
    times = entries.data.astype(int)
    return np.repeat(entries.row, times), np.repeat(entries.col, times)


def _kept(
    counts: sp.csc_matrix, target: np.ndarray, library: np.ndarray, rng: np.random.Generator
) -> sp.csc_matrix:
    """Some of the molecules that are there."""
    cell, gene = _present(counts)
    found = _Molecules.of(rng.random(len(cell)), cell, gene, counts.shape)
    ends = np.zeros(len(target)), np.ones(len(target))
    return found.matrix(_solve(partial(found.mean, library=library), target, *ends))


def _joined(
    counts: sp.csc_matrix, target: np.ndarray, library: np.ndarray, rng: np.random.Generator
) -> sp.csc_matrix:
    """Added molecules, in layers until every gene has enough to choose from."""
    n_cells, n_genes = counts.shape
    cell, gene = _present(counts)
    times, cells, genes = [np.full(len(cell), -1.0)], [cell], [gene]
    share = np.cumsum(library / library.sum())
    low, high = np.zeros(n_genes), _expected(counts, target, library) * library.sum() + 1
    while True:
        new = np.repeat(np.arange(n_genes), rng.poisson(high - low))
        times.append(low[new] + rng.random(len(new)) * (high - low)[new])
        cells.append(np.minimum(np.searchsorted(share, rng.random(len(new))), n_cells - 1))
        genes.append(new)
        time, cell, gene = (np.concatenate(x) for x in (times, cells, genes))
        found = _Molecules.of(time, cell, gene, counts.shape)
        short = found.mean(high, library) < target
        if not short.any():
            break
        low, high = high, np.where(short, 2 * high, high)
    mean = partial(found.mean, library=library)
    return found.matrix(_solve(mean, target, np.zeros(n_genes), high))


def _joined_by_many(
    counts: sp.csc_matrix, target: np.ndarray, library: np.ndarray, rng: np.random.Generator
) -> sp.csc_matrix:
    """Added counts so many that a rounded Gaussian stands for their Poisson distribution."""
    base, size = counts.toarray(), library[:, None]
    noise = rng.normal(size=base.shape)

    def there(rate: np.ndarray) -> np.ndarray:
        expected = size * rate
        return base + np.maximum(np.rint(expected + np.sqrt(expected) * noise), 0)

    def mean(rate: np.ndarray) -> np.ndarray:
        return np.log1p(there(rate) * PER / size).mean(0)

    high = _expected(counts, target, library)
    while (short := mean(high) < target).any():
        high = np.where(short, 2 * high, high)
    rate = _solve(mean, target, np.zeros(len(target)), high)
    return sp.csc_matrix(there(rate))


def _expected(counts: sp.csc_matrix, target: np.ndarray, library: np.ndarray) -> np.ndarray:
    """About the rate that is missing: what it would be if all cells had the same."""
    pooled = np.asarray(counts.sum(0)).ravel() / library.sum()
    return np.maximum(np.expm1(target) / PER - pooled, 0.1 * np.expm1(target) / PER)


def _solve(
    mean: Callable[[np.ndarray], np.ndarray], target: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Where the mean of each gene, which rises, is the target: secant steps in a bracket."""
    below, above = mean(low) - target, mean(high) - target
    best, gap = np.where(-below < above, low, high), np.minimum(-below, above)
    for step in range(N_STEPS):
        secant = np.divide(-below, above - below, out=np.full_like(low, 0.5), where=above > below)
        # Plain halving every third step, or one end may never move.
        share = 0.5 if step % 3 == 2 else np.clip(secant, 0.02, 0.98)
        at = low + (high - low) * share
        error = mean(at) - target
        closer = np.abs(error) < gap
        best, gap = np.where(closer, at, best), np.where(closer, np.abs(error), gap)
        over = error > 0
        high, above = np.where(over, at, high), np.where(over, error, above)
        low, below = np.where(over, low, at), np.where(over, below, error)
    return best
