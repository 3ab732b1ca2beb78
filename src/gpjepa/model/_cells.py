"""The cells of an AnnData as the model reads them, aligned to its genes by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from gpjepa._checks import check_library
from gpjepa.effects import log1p_rates
from gpjepa.perturbations import LabelReader, Perturbation

from ._fields import (
    BATCH_KEY,
    CONTEXT_KEY,
    DATASET_KEY,
    LIBRARY_KEY,
    MEASURED,
    PERTURBATION_KEY,
    REPLICATE_KEY,
)

logger = logging.getLogger(__name__)

MAX_MISSING = 0.5
"""Share of the model's genes that a query may lack."""


@dataclass(frozen=True)
class Cells:
    """Cells as the model reads them.

    Attributes
    ----------
    counts
        Shape (n_cells, n_genes), genes in the model's order.
    library
        Library sizes, shape (n_cells,).
    perturbations, contexts
        Perturbation and context of each cell; no perturbations for unlabelled cells, and None for
        one whose label is dropped or cannot be read.
    batch
        Code of the batch, shape (n_cells,); one past the last for a batch unknown to training.
    names
        Names of the cells.
    visible
        Mask of the genes that the data have, shape (n_genes,).
    expressed
        Mask of the cells that have counts; the others have no rates, shape (n_cells,).
    labels
        What results call each control cell's perturbation, empty for other cells.
    replicate
        Code of what was repeated, such as the guide, shape (n_cells,); None where nothing says.
    dataset, measured
        Code of each cell's data set, and the genes that each of them measured, shape (n_datasets,
        n_genes); None where all measured the same.
    """

    counts: sp.csr_matrix
    library: np.ndarray
    perturbations: list[Perturbation | None] | None
    contexts: list[str]
    batch: np.ndarray
    names: np.ndarray
    visible: np.ndarray
    expressed: np.ndarray
    labels: np.ndarray | None = None
    replicate: np.ndarray | None = None
    dataset: np.ndarray | None = None
    measured: np.ndarray | None = None

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def is_control(self) -> np.ndarray:
        """Mask of the control cells."""
        assert self.perturbations is not None
        return np.fromiter(
            (p is not None and p.is_control for p in self.perturbations), bool, len(self)
        )

    @property
    def each_perturbation(self) -> list[Perturbation]:
        """Perturbation of every cell, where all have one, as training cells do."""
        found = [p for p in self.perturbations or () if p is not None]
        assert len(found) == len(self)
        return found

    @property
    def usable(self) -> np.ndarray:
        """Mask of the cells that have counts, and a perturbation if they are labelled."""
        if self.perturbations is None:
            return self.expressed
        return self.expressed & np.fromiter((p is not None for p in self.perturbations), bool)

    def take(self, where: np.ndarray) -> Cells:
        """Some of the cells."""
        return replace(
            self,
            names=self.names[where],
            counts=self.counts[where],
            library=self.library[where],
            perturbations=self.perturbations and [self.perturbations[i] for i in where],
            contexts=[self.contexts[i] for i in where],
            batch=self.batch[where],
            expressed=self.expressed[where],
            labels=None if self.labels is None else self.labels[where],
            replicate=None if self.replicate is None else self.replicate[where],
            dataset=None if self.dataset is None else self.dataset[where],
        )

    def halves(self, rng: np.random.Generator) -> tuple[Cells, Cells]:
        """The same cells, each count in one of two halves, drawn at random."""
        first = self.counts.copy()
        first.data = rng.binomial(first.data.astype(np.int64), 0.5).astype(first.dtype)
        library = self.library / 2
        return (
            replace(self, counts=first, library=library),
            replace(self, counts=self.counts - first, library=library),
        )

    def by_dataset(self, where: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Genes that were measured, and the cells (positions in ``where``) that have just these."""
        if self.dataset is None or self.measured is None:
            yield self.visible, np.arange(len(where))
            return
        codes = self.dataset[where]
        for code in np.unique(codes):
            yield self.visible & self.measured[code], np.flatnonzero(codes == code)

    def tensors(
        self, where: np.ndarray, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """Some of the cells by registry keys: counts (dense), library sizes and codes of batches."""
        return {
            REGISTRY_KEYS.X_KEY: torch.from_numpy(self.counts[where].toarray()).to(dtype),
            LIBRARY_KEY: torch.from_numpy(self.library[where]).to(dtype),
            BATCH_KEY: torch.from_numpy(self.batch[where]),
        }

    def log1p_rates(self, where: np.ndarray) -> np.ndarray:
        """log1p of counts per 10,000 of some of the cells, dense, shape (n_cells, n_genes)."""
        return log1p_rates(self.counts[where], self.library[where]).toarray()


def _read_datasets(manager: AnnDataManager) -> tuple[np.ndarray | None, np.ndarray | None]:
    if DATASET_KEY not in manager.data_registry:
        return None, None
    names = manager.get_state_registry(DATASET_KEY)["values"]
    table = manager.adata.varm[MEASURED].rename(columns=str)
    measured = [
        table[n].to_numpy(bool) if n in table else np.zeros(len(table), bool) for n in names
    ]
    return _codes(manager, DATASET_KEY), np.stack(measured)


def read_cells(
    manager: AnnDataManager, visible: np.ndarray | None, n_batches: int, reader: LabelReader
) -> Cells:
    """Read the cells behind a manager.

    Parameters
    ----------
    manager
        With the fields of :meth:`gpjepa.GPJEPA.setup_anndata`.
    visible
        Genes that the data have; None for all.
    n_batches
        Batches known to training.
    reader
        How labels are written.
    """
    adata = manager.adata
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    counts = counts if isinstance(counts, sp.csr_matrix) else sp.csr_matrix(counts)
    has = manager.data_registry
    expressed = np.ones(counts.shape[0], bool)
    if LIBRARY_KEY in has:
        library = np.asarray(manager.get_from_registry(LIBRARY_KEY), float).ravel()
        check_library(library, counts, f"obs[{has[LIBRARY_KEY]['attr_key']!r}]")
    else:
        library = np.asarray(counts.sum(1), float).ravel()
        expressed = library > 0
        library[~expressed] = 1  # all rates are 0, whatever they are divided by
    perturbations = labels = None
    if PERTURBATION_KEY in has:
        state = manager.get_state_registry(PERTURBATION_KEY)
        table = [Perturbation.of(t, d) for t, d in state["values"]]
        code = _codes(manager, PERTURBATION_KEY)
        perturbations = [None if i < 0 else table[i] for i in code]
        control = np.isin(code, [i for i, p in enumerate(table) if p.is_control])
        labels = np.full(len(code), "", dtype=object)
        written = adata.obs[state["obs_key"]].astype(object)[control]
        said = {w: reader.spelling(str(w)) for w in written.unique()}
        labels[control] = [said[w] for w in written]
    contexts = manager.get_state_registry(CONTEXT_KEY)["values"]
    return Cells(
        counts,
        library,
        perturbations,
        [contexts[i] for i in _codes(manager, CONTEXT_KEY)],
        np.minimum(_codes(manager, BATCH_KEY), n_batches),
        adata.obs_names.to_numpy().astype(str),
        np.ones(counts.shape[1], bool) if visible is None else visible,
        expressed,
        labels,
        _codes(manager, REPLICATE_KEY) if REPLICATE_KEY in has else None,
        *_read_datasets(manager),
    )


def _codes(manager: AnnDataManager, key: str) -> np.ndarray:
    return np.asarray(manager.get_from_registry(key)).ravel()


def align(
    adata: AnnData,
    genes: Sequence[str] | np.ndarray,
    layer: str | None,
    obs_keys: Sequence[str | None],
) -> tuple[AnnData, np.ndarray]:
    """A light copy with the model's genes in the model's order; the input stays as it is.

    Parameters
    ----------
    adata
        Any AnnData.
    genes
        The model's genes.
    layer
        Where the model expects counts; taken from ``X`` if a query lacks it.
    obs_keys
        Columns of ``.obs`` to carry along.

    Returns
    -------
    tuple
        The copy, with missing genes as zeros, and a mask of the genes that were there.

    Raises
    ------
    ValueError
        If no gene, or less than half of them, is there.
    """
    where = adata.var_names.get_indexer(pd.Index(genes))
    visible = where >= 0
    n_missing = int((~visible).sum())
    if n_missing > MAX_MISSING * len(genes):
        raise ValueError(
            f"{n_missing} of the model's {len(genes)} genes are not in the data (at most "
            f"{MAX_MISSING:.0%} may be missing). The model knows {list(genes[:3])} ..., the data "
            f"have {list(adata.var_names[:3])} ...: are both gene symbols, of one species?"
        )
    if n_missing:
        warnings.warn(
            f"{n_missing} of the model's {len(genes)} genes are not in the data; they are hidden "
            "from the encoder, not taken as zero.",
            UserWarning,
            stacklevel=4,
        )
    source = adata.X if layer is None or layer not in adata.layers else adata.layers[layer]
    counts = sp.csr_matrix(source)
    if n_missing or not np.array_equal(where, np.arange(adata.n_vars)):
        pick = sp.csr_matrix(
            (np.ones(int(visible.sum()), counts.dtype), (where[visible], np.flatnonzero(visible))),
            shape=(adata.n_vars, len(genes)),
        )
        counts = sp.csr_matrix(counts @ pick)
        counts.sort_indices()
    kept = [k for k in dict.fromkeys(obs_keys) if k is not None and k in adata.obs]
    light = AnnData(obs=adata.obs[kept].copy(), var=pd.DataFrame(index=pd.Index(genes)))
    if layer is None:
        light.X = counts
    else:
        light.layers[layer] = counts
    if isinstance(adata.varm.get(MEASURED), pd.DataFrame):
        light.varm[MEASURED] = adata.varm[MEASURED].reindex(light.var_names, fill_value=False)
    return light, visible


def as_trained(adata: AnnData, registry: dict) -> tuple[AnnData, np.ndarray | None]:
    """The AnnData itself if its genes are the model's in their order, else an aligned copy.

    With a mask of the model's genes that it has, None for all.
    """
    counts = registry["field_registries"][REGISTRY_KEYS.X_KEY]
    genes = np.asarray(counts["state_registry"]["column_names"])
    if np.array_equal(adata.var_names.to_numpy().astype(str), genes.astype(str)):
        return adata, None
    light, visible = align(adata, genes, counts["data_registry"]["attr_key"], list(adata.obs))
    return light, None if visible.all() else visible


def positions(n_cells: int, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Positions of the cells that positions or a mask choose."""
    where = np.arange(n_cells) if indices is None else np.asarray(indices)
    where = np.flatnonzero(where) if where.dtype == bool else where
    if not len(where):
        raise ValueError("No cells were selected.")
    return where
