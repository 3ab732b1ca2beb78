"""Cells in the one form that every method gets, and sets of them that are scored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Self

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa._checks import (
    check_anndata,
    check_columns,
    check_counts,
    check_gene_names,
    check_layer,
    check_library,
    layer_names,
    text_of,
)
from gpjepa.effects import log1p_rates
from gpjepa.perturbations import LabelReader, Perturbation
from gpjepa.splits import Row


def standard_cells(
    adata: ad.AnnData,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | None = None,
    batch_key: str | None = None,
    replicate_key: str | None = None,
    dosage_key: str | None = None,
    library_size_key: str | None = None,
    cell_type_key: str | None = None,
    **labels: Any,
) -> ad.AnnData:
    """Cells in the one form that every method gets.

    Parameters
    ----------
    adata
        Cells with raw counts.
    layer, perturbation_key, context_key, batch_key, replicate_key, dosage_key, library_size_key
        As in :meth:`gpjepa.GPJEPA.setup_anndata`.
    cell_type_key
        Column of ``obs`` with cell types, which no method sees and the metric ``avg_bio`` needs; a
        cell without one is left out there.
    **labels
        How labels are written: arguments of :class:`gpjepa.perturbations.LabelReader`.

    Returns
    -------
    anndata.AnnData
        Counts in ``X``; ``obs`` ``perturbation`` (``"A+B"``, ``"control"``), ``context``
        (``"all"`` if there is one), ``library_size`` (the counts of the whole cell, whatever genes
        are chosen later), and ``batch``, ``replicate`` and ``cell_type`` if they were named; cells
        sorted by name.

    Raises
    ------
    ValueError, KeyError
        If values are not counts, a column is missing, names repeat, or labels look as if they were
        written in another way.
    """
    check_anndata(adata)
    check_layer(adata, layer)
    keys = {"perturbation_key": perturbation_key, "context_key": context_key}
    named = {"batch": batch_key, "replicate": replicate_key, "cell_type": cell_type_key}
    keys |= {f"{name}_key": key for name, key in named.items()}
    check_columns(adata, {**keys, "dosage_key": dosage_key, "library_size_key": library_size_key})
    if layer is None and "counts" in adata.layers:
        layer = "counts"
    matrix = adata.X if layer is None else adata.layers[layer]
    check_counts(matrix, "X" if layer is None else f"layers[{layer!r}]")
    check_gene_names(adata.var_names)
    if not adata.obs_names.is_unique:
        raise ValueError("Names of cells repeat; call adata.obs_names_make_unique() first.")
    counts = sp.csr_matrix(matrix).astype(np.float32)
    column = adata.obs[perturbation_key]
    reader = LabelReader(**labels).checked(column, genes=adata.var_names)
    read = reader.read_cells(column, None if dosage_key is None else adata.obs[dosage_key])
    library = np.asarray(counts.sum(1)).ravel()
    if library_size_key is not None:
        library = adata.obs[library_size_key].to_numpy(float)
        check_library(library, counts, f"obs[{library_size_key!r}]")
    obs = pd.DataFrame(
        {
            "perturbation": [str(p) for p in read],
            "context": "all" if context_key is None else list(text_of(adata.obs[context_key])),
            "library_size": library,
        },
        index=adata.obs_names.astype(str),
    )
    for name, key in named.items():
        if key is not None:
            known = adata.obs[key].notna().to_numpy()
            obs[name] = np.where(known, adata.obs[key].astype(str).to_numpy(), "")
    n = int((np.asarray(counts.sum(1)).ravel() == 0).sum()) if library_size_key is None else 0
    if n:
        warnings.warn(f"{n} of {len(library)} cells have no counts and are left out.", stacklevel=2)
    some = (library > 0) & np.array([p is not None for p in read])
    order = np.argsort(obs.index.to_numpy()[some], kind="stable")
    keep = np.flatnonzero(some)[order]
    return ad.AnnData(counts[keep], obs.iloc[keep], pd.DataFrame(index=adata.var_names.astype(str)))


def measured_rows(cells: ad.AnnData) -> dict[Row, int]:
    """Cells of each (context, perturbation) that is not control, sorted."""
    pairs = cells.obs.groupby(["context", "perturbation"], observed=True).size()
    found = {(str(c), Perturbation.parse(str(p))): int(n) for (c, p), n in pairs.items()}
    return {row: found[row] for row in sorted(found) if not row[1].is_control}


def data_hash(cells: ad.AnnData) -> str:
    """Hash of counts, labels and gene names, whatever order the genes and cells come in."""
    order = np.argsort(cells.var_names.to_numpy(), kind="stable")
    counts = sp.csr_matrix(cells.X[:, order])
    counts.sort_indices()
    found = sha256("\n".join(cells.var_names[order]).encode())
    found.update(str(cells.uns.get("unit", "")).encode())
    for name in layer_names(cells):
        found.update(np.ascontiguousarray(np.asarray(cells.layers[name])[:, order]).tobytes())
    for column in cells.obs:
        found.update("\n".join(cells.obs[column].astype(str)).encode())
    for part in (counts.indptr.astype(np.int64), counts.indices.astype(np.int64), counts.data):
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class CellSet:
    """Cells, and the row of the task that each belongs to; -1 marks control cells.

    Attributes
    ----------
    counts
        Counts, shape (n_cells, n_genes); None for cells that were predicted on the log1p scale.
    library, row, context
        Of each cell, shape (n_cells,).
    cell_type
        Cell types, ``""`` where there is none; None if they are not known.
    values
        log1p counts per 10,000 of cells without counts.
    """

    counts: sp.csr_matrix | None
    library: np.ndarray
    row: np.ndarray
    context: np.ndarray
    cell_type: np.ndarray | None = None
    values: sp.csr_matrix | None = None

    @classmethod
    def stacked(cls, sets: Sequence[CellSet]) -> Self:
        """The cells of several sets; without counts if one of them has none."""
        counted = all(s.counts is not None for s in sets)
        matrix = sp.csr_matrix(sp.vstack([s.counts if counted else s.log1p for s in sets]))
        parts = [
            np.concatenate([getattr(s, f) for s in sets]) for f in ("library", "row", "context")
        ]
        library, row, context = parts
        if counted:
            return cls(matrix, library, row, context)
        return cls(None, library, row, context, values=matrix)

    def take(self, which: np.ndarray) -> CellSet:
        """The cells at these positions, or where a mask is true."""
        at = np.flatnonzero(which) if which.dtype == bool else which
        return replace(
            self,
            counts=None if self.counts is None else self.counts[at],
            values=None if self.values is None else self.values[at],
            cell_type=None if self.cell_type is None else self.cell_type[at],
            **{f: getattr(self, f)[at] for f in ("library", "row", "context")},
        )

    def without(self, genes: np.ndarray) -> CellSet:
        """The cells with nothing of the genes where a mask is true; library sizes stay."""
        keep = sp.diags((~genes).astype(np.float32))

        def blanked(matrix: sp.csr_matrix | None) -> sp.csr_matrix | None:
            return None if matrix is None else sp.csr_matrix(matrix @ keep)

        return replace(self, counts=blanked(self.counts), values=blanked(self.values))

    def to_anndata(self, genes: np.ndarray) -> ad.AnnData:
        """The cells without their labels, as methods embed them."""
        obs = pd.DataFrame({"context": self.context, "library_size": self.library})
        obs.index = obs.index.astype(str)
        return ad.AnnData(self.counts, obs, pd.DataFrame(index=genes))

    @cached_property
    def log1p(self) -> sp.csr_matrix:
        """log1p counts per 10,000, shape (n_cells, n_genes)."""
        if self.counts is None:
            return self.values
        return sp.csr_matrix(log1p_rates(self.counts, self.library))
