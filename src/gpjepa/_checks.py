"""Checks of cells that data sets and models share; each error says what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

_CHUNK = 1 << 22  # values looked at in one go


def check_counts(matrix: Any, where: str) -> None:
    """Refuse anything but finite, non-negative integers.

    Parameters
    ----------
    matrix
        Dense array or SciPy sparse matrix; every value is looked at, nothing is copied whole.
    where
        How the user calls it, for the message: ``layers["counts"]``.

    Raises
    ------
    ValueError
        Saying what was found, and where raw counts usually are.
    """
    values = matrix.data if sp.issparse(matrix) else np.asarray(matrix)
    values = values.reshape(-1)
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        if not np.isfinite(part).all():
            raise ValueError(
                f"{where} holds NaN or infinite values; expected raw counts. Look for the cells "
                "with ~numpy.isfinite(...) and remove or re-quantify them."
            )
        if (part < 0).any():
            raise ValueError(
                f"{where} holds negative values (smallest {part.min():g}); expected raw counts. "
                "Scaled or corrected values cannot be used: give the layer with raw counts."
            )
        if not np.issubdtype(part.dtype, np.integer) and (part != np.rint(part)).any():
            odd = part[part != np.rint(part)][0]
            raise ValueError(
                f"{where} holds values that are not integers, such as {odd:g}: it looks "
                "normalised. Give the layer with raw counts, e.g. layer='counts'."
            )


def raw_counts(adata: AnnData, layer: str | None) -> sp.csr_matrix:
    """Checked counts and gene names: of a layer, by default ``layers["counts"]`` if there, else X."""
    if layer is None and "counts" in adata.layers:
        layer = "counts"
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"layer={layer!r} is not in adata.layers, which has {sorted(map(str, adata.layers))}."
        )
    counts = adata.X if layer is None else adata.layers[layer]
    check_counts(counts, "X" if layer is None else f"layers[{layer!r}]")
    check_gene_names(adata.var_names)
    return sp.csr_matrix(counts)


def check_library(library: np.ndarray, counts: sp.csr_matrix | np.ndarray, where: str) -> None:
    """Refuse library sizes that are not positive or smaller than the cell's own counts."""
    if not np.isfinite(library).all() or (library <= 0).any():
        n = int((~(library > 0)).sum())
        raise ValueError(
            f"{n} cells have no counts or no finite library size in {where}. Remove them first: "
            "scanpy.pp.filter_cells(adata, min_counts=1)."
        )
    total = np.asarray(counts.sum(1)).ravel()
    if (total > library * (1 + 1e-6)).any():
        n = int((total > library * (1 + 1e-6)).sum())
        raise ValueError(
            f"{n} cells have more counts than the library size in {where}; expected the counts of "
            "the whole cell, before genes were chosen."
        )


def check_gene_names(names: pd.Index) -> None:
    """Refuse duplicate gene names: cells are aligned by name."""
    if not names.is_unique:
        repeats = names[names.duplicated()].unique()
        raise ValueError(
            f"{len(repeats)} gene names occur more than once, such as {list(repeats[:3])}; "
            "call adata.var_names_make_unique() first."
        )
