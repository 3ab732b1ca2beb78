"""Mean effects from cells: one pass over the counts, wherever they lie, and sums that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.perturbations import Perturbation

from ._parts import ByScale, Group, Parts
from ._scales import PER, SCALES, Scale, log1p_rates
from ._table import EffectTable

_DRAWS = 32  # parts of the control cells that show how the noise of genes goes together
_LEAST_DRAWS = 5
_CHUNK = 1_000  # cells normalised at a time
_FEW = 3.0  # counts below which the spread within a group of cells says little
_EXPRESSED = 10  # genes that a cell must express to be recognised
_SUMS = ("y", "yy", "k", "kk", "kl")  # of log1p rates, of counts K, and of KL; squares of both
_OF_CELLS = ("n", "l", "ll", "q")  # cells, library sizes L, L², and L log1p(PER / L)²


def effect_table(
    counts: Any,
    library: np.ndarray,
    perturbations: Sequence[Perturbation],
    contexts: Sequence[str],
    genes: Sequence[str] | np.ndarray,
    keep: np.ndarray | None = None,
    *,
    batches: Sequence[str] | None = None,
    replicates: Sequence[str] | None = None,
) -> EffectTable:
    """Mean effects from cells, in one pass that keeps the counts sparse.

    Parameters
    ----------
    counts
        Counts, shape (n_cells, n_genes): a matrix, or what gives slices of rows, such as a backed
        or dask array.
    library
        Library size of each cell, shape (n_cells,).
    perturbations, contexts
        Perturbation and context of each cell.
    genes
        Names of the genes.
    keep
        Mask of the cells that count, shape (n_cells,); all of them by default.
    batches
        Batch of each cell: effects are differences within batches.
    replicates
        Guide, animal or well of each cell; how far these differ is part of the variance.

    Returns
    -------
    EffectTable
        Every context needs control cells; contexts are known by them.

    Raises
    ------
    ValueError
        If a context has fewer than two control cells.
    """
    sums = CellSums(genes)
    sums.add(
        counts,
        library,
        perturbations,
        contexts,
        keep,
        batches=batches,
        replicates=replicates,
    )
    return sums.table()


class CellSums:
    r"""Sums over cells, of which effects are made: add the cells of one file after the other.

    Per batch *b* the profile of a perturbation is compared with that of the batch's own controls,
    and differences are combined with weights :math:`n_{ab} n_{0b} / (n_{ab} + n_{0b})`, the same for
    all genes (Cochran 1954). Cells of batches without controls are compared with all controls of
    the context, and a warning names these batches.

    The pooled rate is the ratio r = ΣK / ΣL, with the ratio estimator's variance
    Σ(K - rL)² / (ΣL)² · n/(n-1) (Cochran, Sampling Techniques, ch. 6), brought to the log scale by
    the delta method. These variances are unbiased, as corrections for noise need them; but cells
    without counts of a gene differ in nothing, and yet their rate is not known. What intervals need
    on top (``few``) is the spread of all groups, scaled to the posterior rate of the group under a
    gamma prior; a gene that was never counted has the rate and the Poisson variance that the others
    lead to expect. Of a group with K counts it has the weight 3 / (K + 3).

    Parameters
    ----------
    genes
        Names of the genes.
    """

    def __init__(self, genes: Sequence[str] | np.ndarray) -> None:
        self.genes = np.asarray(genes, dtype=object)
        self._index: dict[Group, int] = {}
        self._sums = {name: np.zeros((0, len(self.genes))) for name in _SUMS}
        self._of_cells = {name: np.zeros(0) for name in _OF_CELLS}
        self._cells: list[tuple[np.ndarray, np.ndarray]] = []  # hashes, and their groups
        self._draws: dict[str, ControlDraws] = {}

    def add(
        self,
        counts: Any,
        library: np.ndarray,
        perturbations: Sequence[Perturbation],
        contexts: Sequence[str],
        keep: np.ndarray | None = None,
        *,
        batches: Sequence[str] | None = None,
        replicates: Sequence[str] | None = None,
    ) -> Self:
        """Add cells; arguments are those of :func:`effect_table`."""
        n = len(perturbations)
        # As floating numbers: squares of library sizes do not fit into 32 bits.
        library = np.asarray(library, float)
        labels = {"batches": batches, "replicates": replicates}
        _check_cells(counts.shape, len(self.genes), library, n, contexts, labels)
        batch, replicate = (
            [""] * n if each is None else [str(x) for x in each] for each in (batches, replicates)
        )
        keys = list(zip(contexts, perturbations, batch, replicate, strict=True))
        where = np.arange(n) if keep is None else np.flatnonzero(keep)
        if lost := int((library[where] <= 0).sum()):
            raise ValueError(f"{lost} cells have no counts; leave them out (keep=library > 0).")
        code = np.full(n, -1)
        code[where] = [self._index.setdefault(keys[i], len(self._index)) for i in where]
        self._grow(len(self._index))
        of_control = np.array(
            [c if p.is_control else None for c, p in zip(contexts, perturbations, strict=True)],
            object,
        )
        for context in {keys[i][0] for i in where if keys[i][1].is_control} - set(self._draws):
            self._draws[context] = ControlDraws(len(self.genes))
        salt = pd.util.hash_array(self.genes.astype(str).astype(object)) | np.uint64(1)
        for start in range(0, n, _CHUNK):
            rows = start + np.flatnonzero(code[start : start + _CHUNK] >= 0)
            if not len(rows):
                continue
            block = _rows(counts, start, min(start + _CHUNK, n), rows)
            cells = _fingerprints(block, salt)
            y = self._add(block, library[rows], code[rows])
            for context, draws in self._draws.items():
                if len(mine := np.flatnonzero(of_control[rows] == context)):
                    draws.add(y[mine], block[mine], library[rows[mine]], cells[mine])
            # Cells with hardly any counts are like cells of other data.
            known = np.diff(block.indptr) >= _EXPRESSED
            self._cells.append((cells[known], code[rows][known]))
        return self

    def _grow(self, n: int) -> None:
        have = len(self._of_cells["n"])
        if n > have:
            more = max(n, 2 * have) - have
            for name, old in self._sums.items():
                self._sums[name] = np.vstack([old, np.zeros((more, old.shape[1]))])
            for name, each in self._of_cells.items():
                self._of_cells[name] = np.append(each, np.zeros(more))

    def _add(self, block: sp.csr_matrix, size: np.ndarray, code: np.ndarray) -> sp.csr_matrix:
        groups, local = np.unique(code, return_inverse=True)
        member = sp.csr_matrix((np.ones(len(code)), (local, np.arange(len(code)))))
        y = log1p_rates(block, size).astype(np.float64)
        for name, cells in (
            ("y", y),
            ("yy", y.multiply(y)),
            ("k", block),
            ("kk", block.multiply(block)),
            ("kl", sp.diags(size) @ block),
        ):
            total = (member @ cells).tocoo()
            self._sums[name][groups[total.row], total.col] += total.data
        each = (np.ones(len(size)), size, size**2, size * np.log1p(PER / size) ** 2)
        for name, values in zip(_OF_CELLS, each, strict=True):
            self._of_cells[name][groups] += np.bincount(local, values)
        return y

    def plus(self, other: CellSums) -> CellSums:
        """The sums of both, of cells that are not the same."""
        both = CellSums(self.genes)
        for part in (self, other):
            code = np.array([both._index.setdefault(g, len(both._index)) for g in part._index], int)
            both._grow(len(both._index))
            for name in _SUMS:
                both._sums[name][code] += part._sums[name][: len(code)]
            for name in _OF_CELLS:
                both._of_cells[name][code] += part._of_cells[name][: len(code)]
            both._cells += [(cells, code[groups]) for cells, groups in part._cells]
            for context, draws in part._draws.items():
                both._draws.setdefault(context, ControlDraws(len(self.genes))).include(draws)
        return both

    def table(self, contexts: Sequence[str] | None = None) -> EffectTable:
        """The effects of all cells added so far.

        Parameters
        ----------
        contexts
            Those that are wanted; all by default.

        Raises
        ------
        ValueError
            If a context has fewer than two control cells.
        """
        wanted = {g[0] for g in self._index} if contexts is None else set(contexts)
        groups = sorted(g for g in self._index if g[0] in wanted)
        order = np.array([self._index[g] for g in groups], int)
        n = self._of_cells["n"][order]
        _check_controls(groups, n)
        table = Parts.of(groups, n, *self._profiles(order)).table(self.genes)
        made = {c: self._draws[c].deviations() for c in table.contexts}
        table = replace(table, draws={s: {c: m[s] for c, m in made.items() if m} for s in SCALES})
        if not self._cells:
            return table
        cells, code = map(np.concatenate, zip(*self._cells, strict=True))
        row = {key: i for i, key in enumerate(table.rows)}
        of_group = np.array([row.get(g[:2], -1) for g in self._index])[code]
        return replace(table, cells=cells[of_group >= 0], cell_rows=of_group[of_group >= 0])

    def _profiles(self, order: np.ndarray) -> tuple[ByScale, ByScale, ByScale]:
        """Mean log1p rates and pooled rates of each group, their variances, and what these miss."""
        y, yy, k, kk, kl = (self._sums[name][order] for name in _SUMS)
        n, size, square, q = (self._of_cells[name][order][:, None] for name in _OF_CELLS)
        mean, rate = y / n, k / size
        spread = np.maximum(yy - n * mean**2, 0)  # Σ (y - ȳ)²
        scatter = np.maximum(kk - 2 * rate * kl + rate**2 * square, 0)  # Σ (K - rL)²
        gene, less = _rates(k, size)
        bessel = n / np.maximum(n - 1, 1)
        variance, few = {}, {}
        for name, own, poisson in (
            ("mean_log1p", spread * bessel / n**2, gene * q / n**2),
            ("rate", scatter * bessel / size**2, gene / size),
        ):
            # What cells of a group differ by, over all groups; one Poisson draw where none do.
            several = np.where(n > 1, n, 0)
            one = poisson.sum(0) / max(len(n), 1)
            pooled = ((several * own).sum(0) + one) / ((several * poisson).sum(0) + one)
            variance[name] = np.where(n > 1, own, pooled * poisson)
            few[name] = np.maximum(less * pooled * poisson - variance[name], 0) * _FEW / (k + _FEW)
        return {"mean_log1p": mean, "rate": rate}, variance, few


class ControlDraws:
    """Profiles of random parts of the control cells of a context: how the noise of genes goes together.

    Parameters
    ----------
    n_genes
        Genes of the cells.
    """

    def __init__(self, n_genes: int) -> None:
        self._sums = {name: np.zeros((_DRAWS, n_genes)) for name in ("y", "k")}
        self._of_cells = {name: np.zeros(_DRAWS) for name in ("n", "l")}

    def add(
        self, y: sp.csr_matrix, counts: sp.csr_matrix, library: np.ndarray, cells: np.ndarray
    ) -> None:
        """Add cells, which their hash deals out to the parts."""
        part = ((cells >> np.uint64(32)) % np.uint64(_DRAWS)).astype(int)
        member = sp.csr_matrix(
            (np.ones(len(part)), (part, np.arange(len(part)))), shape=(_DRAWS, len(part))
        )
        self._sums["y"] += (member @ y).toarray()
        self._sums["k"] += (member @ counts).toarray()
        self._of_cells["n"] += np.bincount(part, minlength=_DRAWS)
        self._of_cells["l"] += np.bincount(part, library, _DRAWS)

    def include(self, other: ControlDraws) -> None:
        """Add the cells of others."""
        for mine, theirs in ((self._sums, other._sums), (self._of_cells, other._of_cells)):
            for name in mine:
                mine[name] += theirs[name]

    def deviations(self) -> dict[Scale, np.ndarray]:
        """Of each part from all, each gene at unit length, shape (n_parts, n_genes).

        Nothing where too few parts have cells to show what varies together.
        """
        found: dict[Scale, np.ndarray] = {}
        if (self._of_cells["n"] > 0).sum() < _LEAST_DRAWS:
            return found
        for scale, sums, weight in (("mean_log1p", "y", "n"), ("log1p_mean", "k", "l")):
            total, size = self._sums[sums], self._of_cells[weight][:, None]
            mean = total.sum(0) / size.sum()
            apart = np.sqrt(size) * (total / np.maximum(size, 1e-12) - mean)
            length = np.sqrt((apart**2).sum(0))
            found[scale] = (apart / np.where(length > 0, length, 1)).astype(np.float32)
        return found


def _rows(counts: Any, start: int, stop: int, wanted: np.ndarray) -> sp.csr_matrix:
    """Some rows of a slice."""
    block = counts[start:stop]
    if hasattr(block, "compute"):
        block = block.compute()
    block = sp.csr_matrix(block)
    if len(wanted) < stop - start:
        block = block[wanted - start]
    return sp.csr_matrix(block, dtype=np.float64)


def _fingerprints(block: sp.csr_matrix, salt: np.ndarray) -> np.ndarray:
    """A hash of the counts of each cell that does not depend on the order of the genes."""
    block.eliminate_zeros()
    mixed = salt[block.indices] * (block.data.astype(np.int64).astype(np.uint64) + np.uint64(1))
    mixed ^= mixed >> np.uint64(29)
    found = np.zeros(block.shape[0], np.uint64)
    filled = np.flatnonzero(np.diff(block.indptr))
    if len(filled):
        found[filled] = np.add.reduceat(mixed, block.indptr[:-1][filled])
    return found


def _rates(k: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Rate of each gene in all cells, and by how much it is lower in each group of cells.

    Both are posterior means under gamma priors. The genes' rates have the mean rate m for prior and
    the weight of half a count, so that a gene that was never counted has a small rate, not none;
    the groups' rates have the gene's for prior, with a shape found by moments. Shapes (n_genes,) and
    (n_groups, n_genes).
    """
    mean = max(k.sum() / size.sum() / k.shape[1], 1e-12)
    gene = (k.sum(0) + 0.5) / (size.sum() + 0.5 / mean)
    expected = size * gene
    excess = ((k - expected) ** 2 - expected).sum()
    shape = float(np.clip((expected**2).sum() / max(excess, 1e-12), 0.5, 1e3))
    return gene, np.minimum((k + shape) / (expected + shape), 1)


def _check_cells(
    shape: tuple[int, int],
    n_genes: int,
    library: np.ndarray,
    n: int,
    contexts: Sequence[str],
    labels: dict[str, Any],
) -> None:
    lengths = {"counts": shape[0], "library": len(library), "contexts": len(contexts)}
    lengths |= {name: len(each) for name, each in labels.items() if each is not None}
    if wrong := {name: found for name, found in lengths.items() if found != n}:
        raise ValueError(
            f"There are perturbations of {n} cells, but lengths of others are {wrong}."
        )
    if shape[1] != n_genes:
        raise ValueError(f"counts has {shape[1]} columns; there are {n_genes} genes.")
    for name in ("batches", "replicates"):
        if labels[name] is not None and (lost := int(pd.isna(np.asarray(labels[name])).sum())):
            raise ValueError(f"{lost} cells have no value in {name}; label or remove them.")


def _check_controls(groups: list[Group], n: np.ndarray) -> None:
    controls: dict[str, float] = {}
    for (context, perturbation, *_), cells in zip(groups, n, strict=True):
        controls[context] = controls.get(context, 0) + cells * perturbation.is_control
    missing = sorted(c for c, cells in controls.items() if cells == 0)
    lone = sorted(c for c, cells in controls.items() if cells == 1)
    if lone:
        raise ValueError(
            f"A single control cell in context {', '.join(map(repr, lone))} shows no sampling "
            "error; at least 2 are needed. Add control cells or remove the context."
        )
    if missing:
        raise ValueError(
            f"No control cells in context {', '.join(map(repr, missing))}: an effect is a "
            "difference from the control of the same context. Add control cells or remove it."
        )
