"""What the cells say of each gene before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpjepa.effects import PER

from ._cells import Cells

CHUNK = 512
"""Cells held dense at a time."""


@dataclass(frozen=True)
class Moments:
    """Moments of each gene over the cells that measured it, all of shape (n_genes,).

    Attributes
    ----------
    root, spread
        Mean and standard deviation of square roots of counts per 10,000.
    share
        Mean share of the counts.
    dispersion
        θ of the negative binomial with one rate for all cells, by moments:
        Var(k) = ℓr + ℓ²r²/θ gives θ = r²Σℓ² / Σ((k - ℓr)² - k).
    """

    root: np.ndarray
    spread: np.ndarray
    share: np.ndarray
    dispersion: np.ndarray


def moments(cells: Cells, where: np.ndarray) -> Moments:
    """Moments of some of the cells; a gene that none of them measured has mean 0 and spread 0."""
    n_genes = cells.counts.shape[1]
    sums = {
        name: np.zeros(n_genes)
        for name in ("n", "root", "share", "count", "excess", "crossed", "library", "libraries")
    }
    for measured, mine in cells.by_dataset(where):
        for start in range(0, len(mine), CHUNK):
            part = where[mine[start : start + CHUNK]]
            counts, library = cells.counts[part], cells.library[part]
            k, of_cell = counts.data.astype(float), np.repeat(library, np.diff(counts.indptr))
            each = {
                "root": np.sqrt(PER * k / of_cell),
                "share": k / of_cell,
                "count": k,
                "excess": k**2 - k,
                "crossed": k * of_cell,
            }
            found = {name: np.bincount(counts.indices, x, n_genes) for name, x in each.items()}
            of_cells = {"n": len(part), "library": library.sum(), "libraries": (library**2).sum()}
            for name, x in (found | of_cells).items():
                sums[name] += x * measured
    n = np.maximum(sums["n"], 1)
    root, share = sums["root"] / n, sums["share"] / n
    rate = sums["count"] / np.maximum(sums["library"], 1)
    excess = sums["excess"] - 2 * rate * sums["crossed"] + rate**2 * sums["libraries"]
    return Moments(
        root,
        np.sqrt(np.maximum(PER * share - root**2, 0)),
        share,
        rate**2 * sums["libraries"] / np.maximum(excess, 1e-12),
    )
