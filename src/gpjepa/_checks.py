"""Checks of cells that data sets and models share; each error says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

_CHUNK = 1 << 22  # values looked at in one go
_LIBRARY_NAMES = {
    "librarysize",
    "totalcounts",
    "ncounts",
    "ncount",
    "ncountrna",
    "numi",
    "numis",
    "umicount",
    "umicounts",
    "totalumis",
    "totalumi",
    "numumis",
    "coverage",
    "ntotalcounts",
}


def check_anndata(adata: Any) -> None:
    """Refuse what is no AnnData in memory, or has no usable names."""
    if isinstance(adata, str | Path):
        raise TypeError(
            f"Expected an AnnData, got the path {str(adata)!r}: read it first, "
            "adata = anndata.read_h5ad(path)."
        )
    if type(adata).__name__ == "MuData":
        raise TypeError(
            f"Expected an AnnData, got a MuData with the modalities {list(adata.mod)}: give the "
            "RNA, such as mdata['rna'], with the labels in its own obs."
        )
    if not isinstance(adata, AnnData):
        raise TypeError(f"Expected an AnnData, got {type(adata).__name__}.")
    if adata.isbacked:
        raise ValueError(
            f"The AnnData is backed by {adata.filename}, and its counts are not in memory: "
            "subset it to the genes and cells that you need, then call .to_memory()."
        )
    if adata.n_obs == 0 or adata.n_vars == 0:
        nothing = "genes" if adata.n_obs else "cells"
        raise ValueError(f"The AnnData holds no {nothing}: the selection is empty.")
    check_cell_names(adata.obs_names)
    check_gene_names(adata.var_names)


@contextmanager
def unchanged_on_error(adata: AnnData) -> Iterator[None]:
    """Take back what scvi-tools and our fields write to ``obs`` and ``uns``, if set-up fails."""
    obs, uns = adata.obs.copy(), dict(adata.uns)
    try:
        yield
    except Exception:  # whatever it was: it is raised again
        adata.obs = obs
        adata.uns = uns
        raise


def check_columns(adata: AnnData, columns: Mapping[str, Any]) -> None:
    """Refuse keys that are not names of columns of ``obs``; columns by argument, None for unused."""
    shown = [str(c) for c in adata.obs.columns if not str(c).startswith("_")]
    for name, column in columns.items():
        if column is None:
            continue
        if not isinstance(column, str):
            raise TypeError(
                f"{name}={column!r}: expected the name of a column of obs, which has {shown}."
            )
        if column not in adata.obs:
            raise KeyError(f"{name}={column!r} is not a column of obs, which has {shown}.")


def count_sums(matrix: Any) -> tuple[float, ...]:
    """Number of values that are not 0, sum, sum of squares, and sums weighted by place.

    Exact for counts. Any normalisation changes them, other types and formats do not.
    """
    values = matrix.data if sp.issparse(matrix) else np.asarray(matrix)
    values = values.reshape(-1)
    sums = np.zeros(3)
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK].astype(float)
        sums += np.count_nonzero(part), part.sum(), part @ part
    by_place = []
    for axis in (0, 1):
        total = np.asarray(matrix.sum(axis), float).ravel()
        by_place.append(float(total @ np.arange(1, len(total) + 1)))
    return (*sums.tolist(), *by_place)


def same_values(adata: AnnData, layer: str | None) -> bool:
    """Whether a layer and ``X`` hold the same values, as after an assignment without a copy."""
    if layer is None or adata.X is None or adata.layers[layer].shape != adata.X.shape:
        return False
    x, counts = adata.X, adata.layers[layer]
    if sp.issparse(x) != sp.issparse(counts):
        return False
    x, counts = (x.data, counts.data) if sp.issparse(x) else (x, counts)
    return x is counts or np.array_equal(x, counts)


def propose_library(adata: AnnData, total: np.ndarray) -> str | None:
    """A column of ``obs`` that holds more counts per cell than the genes here."""
    for column in adata.obs:
        if re.sub(r"[\W_]+", "", str(column).lower()) not in _LIBRARY_NAMES:
            continue
        values = pd.to_numeric(adata.obs[column], errors="coerce").to_numpy(float)
        if np.isfinite(values).all() and (values >= total * (1 - 1e-6)).all():
            if np.median(values) > 1.05 * np.median(total):
                return str(column)
    return None


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
                "normalised. Name the layer with raw counts in layer=."
            )


def text_of(column: pd.Series) -> pd.Series:
    """Values as text, whole numbers without a decimal point: batch 0 and batch 0.0 are one."""
    if column.dtype == object or isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object).infer_objects()
    if pd.api.types.is_float_dtype(column) and np.isfinite(column).all():
        if (column == column.round()).all():
            column = column.astype(int)
    return column.astype(str)


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers, sorted; from anndata 0.13 on, X is among them as None."""
    return sorted(str(name) for name in adata.layers if name is not None)


def check_layer(adata: AnnData, layer: str | None) -> None:
    """Refuse a layer that is not there."""
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"layer={layer!r} is not in adata.layers, which has {layer_names(adata)}.")


def raw_counts(adata: AnnData, layer: str | None) -> sp.csr_matrix:
    """Checked counts and gene names: of a layer, by default ``layers["counts"]`` if there, else X."""
    if layer is None and "counts" in adata.layers:
        layer = "counts"
    check_layer(adata, layer)
    counts = adata.X if layer is None else adata.layers[layer]
    check_counts(counts, "X" if layer is None else f"layers[{layer!r}]")
    check_gene_names(adata.var_names)
    return sp.csr_matrix(counts)


def check_library(library: np.ndarray, counts: sp.csr_matrix | np.ndarray, where: str) -> None:
    """Refuse library sizes that are not positive or smaller than the cell's own counts."""
    wrong = ~(np.isfinite(library) & (library > 0))
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} cells have no positive, finite library size in {where}, such as "
            f"{library[wrong][0]:g}. Mend the column or remove these cells."
        )
    total = np.asarray(counts.sum(1)).ravel()
    if (total > library * (1 + 1e-6)).any():
        n = int((total > library * (1 + 1e-6)).sum())
        raise ValueError(
            f"{n} cells have more counts than the library size in {where}; expected the counts of "
            "the whole cell, before genes were chosen."
        )


def check_cell_names(names: pd.Index) -> None:
    """Refuse duplicate cell names: random numbers belong to cells by name."""
    if not names.is_unique:
        repeats = names[names.duplicated()].unique()
        raise ValueError(
            f"Names of cells occur more than once, such as {list(repeats[:3])}; "
            "call adata.obs_names_make_unique() first."
        )


def check_gene_names(names: pd.Index) -> None:
    """Refuse missing or duplicate gene names: cells are aligned by name."""
    missing = names.isna() | (names.astype(str) == "") | (names.astype(str) == "nan")
    if missing.any():
        raise ValueError(
            f"Genes without a name: {int(missing.sum())}. Remove them, adata[:, "
            "adata.var_names.notna()], or take another column of var as names."
        )
    if not names.is_unique:
        repeats = names[names.duplicated()].unique()
        raise ValueError(
            f"{len(repeats)} gene names occur more than once, such as {list(repeats[:3])}; "
            "call adata.var_names_make_unique() first."
        )
