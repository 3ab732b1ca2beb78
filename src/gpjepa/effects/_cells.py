"""Mean effects from cells: one pass over the counts, wherever they lie, and sums that add up."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.perturbations import Perturbation

from ._scales import PER, Scale, log1p_rates
from ._table import EffectTable, Strata

_CHUNK = 1_000  # cells normalised at a time
_FEW = 3.0  # counts below which the spread within a group of cells says little
_EXPRESSED = 10  # genes that a cell must express to be recognised
_SHOWN = 10.0  # differences that a variance between batches needs to stand on its own
_SUMS = ("y", "yy", "k", "kk", "kl")  # of log1p rates, of counts K, and of KL; squares of both
_OF_CELLS = ("n", "l", "ll", "q")  # cells, library sizes L, L², and L log1p(PER / L)²
Group = tuple[str, Perturbation, str, str]  # context, perturbation, batch, replicate
_ByScale = dict[str, np.ndarray]


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
    names: Sequence[str] | np.ndarray | None = None,
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
    names
        Names of the cells, by which tables made of the same cells are recognised.

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
        names=names,
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
        names: Sequence[str] | np.ndarray | None = None,
    ) -> Self:
        """Add cells; arguments are those of :func:`effect_table`."""
        n = len(perturbations)
        # As floating numbers: squares of library sizes do not fit into 32 bits.
        library = np.asarray(library, float)
        labels = {"batches": batches, "replicates": replicates, "names": names}
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
        # Without names, cells are known by their counts alone.
        named = np.zeros(n, object) if names is None else np.asarray(names, dtype=object)
        hashed = pd.util.hash_array(named)
        salt = pd.util.hash_array(self.genes.astype(str).astype(object)) | np.uint64(1)
        for start in range(0, n, _CHUNK):
            rows = start + np.flatnonzero(code[start : start + _CHUNK] >= 0)
            if not len(rows):
                continue
            block = _rows(counts, start, min(start + _CHUNK, n))[rows - start]
            self._add(block, library[rows], code[rows])
            # Cells with hardly any counts are like cells of other data.
            cells = _fingerprints(block, salt) ^ hashed[rows]
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

    def _add(self, block: sp.csr_matrix, size: np.ndarray, code: np.ndarray) -> None:
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

    def table(self) -> EffectTable:
        """The effects of all cells added so far.

        Raises
        ------
        ValueError
            If a context has fewer than two control cells.
        """
        groups = sorted(self._index)
        order = np.array([self._index[g] for g in groups], int)
        n = self._of_cells["n"][order]
        _check_controls(groups, n)
        table = Parts.of(groups, n, *self._profiles(order)).table(self.genes)
        if not self._cells:
            return table
        cells, code = map(np.concatenate, zip(*self._cells, strict=True))
        row = {key: i for i, key in enumerate(table.rows)}
        of_group = np.array([row.get(g[:2], -1) for g in self._index])[code]
        return replace(table, cells=cells[of_group >= 0], cell_rows=of_group[of_group >= 0])

    def _profiles(self, order: np.ndarray) -> tuple[_ByScale, _ByScale, _ByScale]:
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


def _rows(counts: Any, start: int, stop: int) -> sp.csr_matrix:
    block = counts[start:stop]
    if hasattr(block, "compute"):
        block = block.compute()
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


def _whole(n: np.ndarray) -> np.ndarray:
    return n if (n % 1).any() else n.astype(int)


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


@dataclass(frozen=True)
class Parts:
    """Profiles of a perturbation, or the control, in one batch of a context.

    Attributes
    ----------
    keys
        (context, perturbation, batch) of each, sorted.
    n
        Cells of each.
    profile, variance, few
        Per scale, such as ``"mean_log1p"`` and ``"rate"``, shape (n_parts, n_genes).
    replicates, between
        Weight of each replicate in each part, shape (n_parts, n_replicates), and per scale the
        variance between the replicates of a perturbation, shape (n_genes,).
    """

    keys: list[tuple[str, Perturbation, str]]
    n: np.ndarray
    profile: _ByScale
    variance: _ByScale
    few: _ByScale = field(default_factory=dict)
    replicates: sp.csr_matrix | None = None
    between: _ByScale = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        groups: list[Group],
        n: np.ndarray,
        profile: _ByScale,
        variance: _ByScale,
        few: _ByScale,
    ) -> Self:
        """Replicates put together; what they differ by is kept beside."""
        keys = sorted({g[:3] for g in groups})
        at = {key: i for i, key in enumerate(keys)}
        parent = np.array([at[g[:3]] for g in groups], int)
        total = np.bincount(parent, n)
        share = _sparse(parent, np.arange(len(groups)), n / total[parent], (len(keys), len(groups)))
        made = cls(
            keys,
            total,
            {s: share @ p for s, p in profile.items()},
            {s: share.power(2) @ v for s, v in variance.items()},
            {s: share.power(2) @ v for s, v in few.items()},
        )
        if len(groups) == len(keys):
            return made
        # A guide is the same in every batch: what it adds does not average out over them.
        units = sorted({(c, p, r) for c, p, _, r in groups})
        unit = {u: i for i, u in enumerate(units)}
        code = np.array([unit[c, p, r] for c, p, _, r in groups], int)
        member = _sparse(np.arange(len(code)), code, np.ones(len(code)), (len(code), len(units)))
        is_control = np.array([p.is_control for _, p, _ in keys])
        between = {}
        for s, values in profile.items():
            apart = values - made.profile[s][parent]
            # Guides of controls need not differ, although those of perturbations do.
            between[s] = [
                _between(sp.diags(mine.astype(float)) @ share, apart, variance[s])
                for mine in (~is_control, is_control)
            ]
            on_control = (share @ member).power(2).sum(1).A1 * is_control
            made.variance[s] += on_control[:, None] * between[s][1]
        return replace(
            made, replicates=share @ member, between={s: b[0] for s, b in between.items()}
        )

    def table(self, genes: np.ndarray) -> EffectTable:
        """Effects on each scale; rates are brought to the log scale."""
        contexts = sorted({c for c, _, _ in self.keys})
        rows = sorted({(c, p) for c, p, _ in self.keys if not p.is_control})
        strata = [i for i, (_, p, _) in enumerate(self.keys) if p.is_control]
        of_rows, of_strata = self._compared(rows, strata)
        shares = self._shares(contexts, strata)
        control = {s: p[strata] for s, p in self.profile.items()}
        noise = {s: v[strata] for s, v in self.variance.items()}
        own = {s: of_rows.power(2) @ v for s, v in self.variance.items()}
        for s, added in self._between_batches(rows, strata, of_rows, control, noise).items():
            own[s] = own[s] + added
        if self.replicates is not None:
            of_each = (of_rows @ self.replicates).power(2).sum(1).A1[:, None]
            own = {s: v + of_each * self.between[s] for s, v in own.items()}
        few = {s: np.vstack([of_rows.power(2) @ v, v[strata]]) for s, v in self.few.items()}
        profile, effect = {}, {}
        for s, values in self.profile.items():
            mine, theirs, profile[s] = of_rows @ values, of_strata @ control[s], shares @ control[s]
            if s == "rate":
                own[s] *= (PER / (1 + PER * mine)) ** 2
                slope = PER / (1 + PER * control[s])
                noise[s] *= slope**2
                few[s] *= np.vstack([(PER / (1 + PER * mine)) ** 2, slope**2])
                mine, theirs, profile[s] = (np.log1p(PER * x) for x in (mine, theirs, profile[s]))
            effect[s] = mine - theirs
        batches = len(strata) > len(contexts)
        return EffectTable(
            genes,
            tuple(rows),
            _whole(of_rows.astype(bool).astype(float) @ self.n),
            _by_scale(effect),
            _by_scale(own),
            {s: _by_context(contexts, x) for s, x in _by_scale(profile).items()},
            {s: _by_context(contexts, shares.power(2) @ x) for s, x in _by_scale(noise).items()},
            Strata(of_strata, shares, _by_scale(noise)) if batches else None,
            few=_by_scale(few),
        )

    def _compared(
        self, rows: list[tuple[str, Perturbation]], strata: list[int]
    ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Weights of the parts in each perturbed profile, and of the strata in its control."""
        row = {key: i for i, key in enumerate(rows)}
        stratum = {self.keys[i][::2]: j for j, i in enumerate(strata)}
        n_control = self.n[strata]
        of_context: dict[str, list[int]] = {}
        for (context, _), j in stratum.items():
            of_context.setdefault(context, []).append(j)
        parts: list[list[int]] = [[] for _ in rows]
        for i, (context, perturbation, _) in enumerate(self.keys):
            if not perturbation.is_control:
                parts[row[context, perturbation]].append(i)
        mine, theirs, lonely = [], [], set()
        for a, members in enumerate(parts):
            context = rows[a][0]
            here = np.array(of_context[context])
            own = [i for i in members if self.keys[i][::2] in stratum]
            rest = [i for i in members if self.keys[i][::2] not in stratum]
            lonely |= {self.keys[i][2] for i in rest}
            against = [stratum[self.keys[i][::2]] for i in own]
            weight = np.array(
                [_harmonic(self.n[i], n_control[j]) for i, j in zip(own, against, strict=True)]
            )
            pooled = _harmonic(self.n[rest].sum(), n_control[here].sum()) if rest else 0.0
            total = weight.sum() + pooled
            mine += [(a, i, w / total) for i, w in zip(own, weight, strict=True)]
            theirs += [(a, j, w / total) for j, w in zip(against, weight, strict=True)]
            mine += [(a, i, pooled / total * self.n[i] / self.n[rest].sum()) for i in rest]
            if rest:
                spread = pooled / total * n_control[here] / n_control[here].sum()
                theirs += [(a, j, w) for j, w in zip(here, spread, strict=True)]
        if lonely:
            warnings.warn(
                f"Batches without control cells: {', '.join(map(repr, sorted(lonely)[:5]))}; their "
                "cells are compared with all control cells of the context.",
                UserWarning,
                stacklevel=3,
            )
        return (
            _triples(mine, (len(rows), len(self.keys))),
            _triples(theirs, (len(rows), len(strata))),
        )

    def _shares(self, contexts: list[str], strata: list[int]) -> sp.csr_matrix:
        """Shares of the strata among the control cells of each context."""
        of = np.array([contexts.index(self.keys[i][0]) for i in strata], int)
        n = self.n[strata]
        share = n / np.bincount(of, n)[of]
        return _sparse(of, np.arange(len(strata)), share, (len(contexts), len(strata)))

    def _between_batches(
        self,
        rows: list[tuple[str, Perturbation]],
        strata: list[int],
        of_rows: sp.csr_matrix,
        control: dict[str, np.ndarray],
        noise: dict[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """What effects that differ between batches add to the variance of each row."""
        if len(strata) == len({self.keys[i][0] for i in strata}):
            return {}
        stratum = {self.keys[i][::2]: j for j, i in enumerate(strata)}
        against = np.array([stratum.get(key[::2], -1) for key in self.keys])
        within = of_rows @ sp.diags((against >= 0).astype(float))
        within.eliminate_zeros()
        within = sp.diags(1 / np.maximum(within.sum(1).A1, 1e-12)) @ within
        added = {}
        parts = of_rows.power(2)
        lonely = sp.csr_matrix(parts @ sp.diags((against < 0).astype(float)))
        shares = self._shares(sorted({c for c, _, _ in self.keys}), strata)
        for s, profile in self.profile.items():
            apart = profile - control[s][against]
            between = _between(
                within, _centred(within, apart), self.variance[s] + noise[s][against]
            )
            added[s] = parts.sum(1).A1[:, None] * between
            # Where there is no control of its own, so do batches as such.
            of_control = _between(shares, _centred(shares, control[s]), noise[s])
            added[s] += lonely.sum(1).A1[:, None] * of_control
        return added


def _centred(share: sp.csr_matrix, values: np.ndarray) -> np.ndarray:
    """Members of groups minus the mean of their group; 0 for those of none."""
    member, mean = share.tocoo(), share @ values
    found = np.zeros_like(values)
    found[member.col] = values[member.col] - mean[member.row]
    return found


def _between(share: sp.csr_matrix, apart: np.ndarray, variance: np.ndarray) -> np.ndarray:
    r"""Variance of members of a group beyond their sampling variance, shape (n_genes,).

    With shares :math:`\omega` that sum to 1 and members of variance :math:`v_b + \tau^2`,
    :math:`E \sum_b \omega_b (d_b - \bar d)^2 = \sum_b \omega_b (1 - \omega_b) (v_b + \tau^2)`. What
    few differences show of a gene is drawn to what all genes show, in proportion to their noise.
    """
    loose = share.copy()
    loose.data = share.data * (1 - share.data)
    freedom = float(loose.sum())
    if freedom <= 0:
        return np.zeros(apart.shape[1])
    sampling = (loose @ variance).sum(0)
    excess = (share @ apart**2).sum(0) - sampling
    common = max(excess.sum() / max(sampling.sum(), 1e-30), 0.0) * sampling
    alone = freedom / (freedom + _SHOWN)
    return np.maximum(alone * excess + (1 - alone) * common, 0) / freedom


def _harmonic(a: float, b: float) -> float:
    return float(a * b / (a + b))


def _triples(found: list[tuple[int, int, float]], shape: tuple[int, int]) -> sp.csr_matrix:
    rows, columns, values = zip(*found, strict=True) if found else ((), (), ())
    return _sparse(np.array(rows, int), np.array(columns, int), np.array(values, float), shape)


def _sparse(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]
) -> sp.csr_matrix:
    return sp.csr_matrix((values, (rows, columns)), shape=shape)


def _by_scale(values: dict[str, np.ndarray]) -> dict[Scale, np.ndarray]:
    """Rates are on the log scale by now."""
    names = {"rate": "log1p_mean"}
    return {names.get(s, s): np.asarray(v, np.float32) for s, v in values.items()}


def _by_context(contexts: list[str], values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(contexts, values.astype(np.float32), strict=True))
