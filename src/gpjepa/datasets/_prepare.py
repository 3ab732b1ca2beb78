from __future__ import annotations

import logging
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from gpjepa._checks import raw_counts
from gpjepa.effects import log1p_rates
from gpjepa.perturbations import LabelReader

logger = logging.getLogger(__name__)


def prepare(
    adata: ad.AnnData,
    train: np.ndarray | None = None,
    *,
    layer: str | None = None,
    n_genes: int = 2_000,
    min_counts: int = 500,
    min_cells: int = 10,
    perturbation_key: str = "perturbation",
    **labels: Any,
) -> ad.AnnData:
    """Quality control, counts and genes, with nothing learned from test cells.

    Parameters
    ----------
    adata
        All cells, with raw counts; it stays as it is.
    train
        Mask of the training cells, shape (n_cells,); genes are chosen on these alone. All cells by
        default.
    layer
        Layer with raw counts; by default ``layers["counts"]`` if there, else ``X``.
    n_genes
        Highly variable genes to keep (scanpy's ``flavor="seurat"``), besides the genes that are
        named in training perturbations.
    min_counts
        Counts that a cell must have.
    min_cells
        Training cells that must express a gene.
    perturbation_key
        Column of ``obs`` with the perturbations.
    **labels
        How they are written: arguments of :class:`gpjepa.perturbations.LabelReader`.

    Returns
    -------
    anndata.AnnData
        Counts in ``X`` and ``layers["counts"]``; ``obs["library_size"]``, the counts of the whole
        cell, which :meth:`gpjepa.GPJEPA.setup_anndata` takes as ``library_size_key``.

    Raises
    ------
    ValueError
        If the values are not counts or nothing is left.
    """
    import scanpy as sc

    counts = raw_counts(adata, layer)
    inside = np.ones(adata.n_obs, bool) if train is None else np.asarray(train, bool)
    if inside.shape != (adata.n_obs,) or not inside.any():
        raise ValueError(
            f"`train` has shape {inside.shape} and selects {int(inside.sum())} of {adata.n_obs} "
            "cells; expected a mask with one value per cell."
        )
    library = np.asarray(counts.sum(1), float).ravel()
    if "library_size" in adata.obs:
        library = adata.obs["library_size"].to_numpy(float)
    good = library >= min_counts
    if not (good & inside).any():
        raise ValueError(f"No training cell has {min_counts} counts; lower min_counts.")
    logger.info("Kept %d of %d cells with at least %d counts.", good.sum(), good.size, min_counts)

    trained = sp.csr_matrix(counts[good & inside])
    expressed = np.asarray((trained > 0).sum(0)).ravel() >= min_cells
    if not expressed.any():
        raise ValueError(f"No gene is expressed in {min_cells} training cells; lower min_cells.")
    logged = ad.AnnData(log1p_rates(trained, library[good & inside])[:, expressed])
    logged.uns["log1p"] = {"base": None}
    sc.pp.highly_variable_genes(logged, flavor="seurat", n_top_genes=min(n_genes, logged.n_vars))
    keep = np.zeros(adata.n_vars, bool)
    keep[np.flatnonzero(expressed)[logged.var["highly_variable"].to_numpy()]] = True
    if perturbation_key in adata.obs:
        column = adata.obs.loc[inside, perturbation_key].drop_duplicates()
        read = LabelReader(**labels).read_cells(column, unreadable=None)
        keep |= adata.var_names.isin({t for p in read if p for t in p.targets}) & expressed

    counts = sp.csr_matrix(counts[good][:, keep], dtype=np.float32)
    has_any = np.asarray(counts.sum(1)).ravel() > 0
    counts = counts[has_any]
    where = np.flatnonzero(good)[has_any]
    obs = adata.obs.iloc[where].copy()
    obs["library_size"] = library[where]
    var = adata.var.loc[keep].copy()
    return ad.AnnData(counts, obs=obs, var=var, layers={"counts": counts.copy()})
