from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from . import _random
from ._base import Registered
from ._cells import Cells

_ENCODE = 512  # cells encoded at a time


class Embedding(Registered):
    """From cells to their states, and back to counts."""

    @contextmanager
    def _double_precision(self) -> Iterator[None]:
        """Work with the module in double precision.

        In single precision, the last bits of a state depend on the number of threads and on which
        cells share a mini-batch, and samples would turn them into other counts.
        """
        single = self.module
        module = deepcopy(single)
        if module.anchor_map.device.type == "mps":  # which has no double precision
            module = module.cpu()
        self.module = module.double()
        try:
            yield
        finally:
            self.module = single

    @torch.inference_mode()
    def _encode(self, cells: Cells, where: np.ndarray) -> torch.Tensor:
        """States of cells, shape (n_cells, n_latent)."""
        self.module.eval()
        device, dtype = self.module.anchor_map.device, self.module.anchor_map.dtype
        states = torch.empty(len(where), self.module.anchor_map.shape[1], dtype=dtype)
        for measured, mine in cells.by_dataset(where):
            seen = torch.from_numpy(measured).to(device) & self.module.known
            if not seen.any():
                raise ValueError(
                    f"The encoder knows none of the {int(measured.sum())} genes of these cells: call "
                    "pretrain() on cells that have them."
                )
            visible = None if seen.all() else seen
            for start in range(0, len(mine), _ENCODE):
                part = mine[start : start + _ENCODE]
                values = cells.tensors(where[part], dtype)["values"].to(device)
                states[part] = self.module.inference(values, visible)["z"].cpu()
        return states.clone()

    @torch.inference_mode()
    def _decode(self, state: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Share of each gene in the library size, shape (n_cells, n_genes)."""
        like = self.module.anchor_map
        z, b = torch.from_numpy(state).to(like), torch.from_numpy(batch).to(like.device)
        return self.module.decoder(z, b).cpu().numpy()

    @property
    def _dispersion(self) -> np.ndarray:
        return self.module.decoder.dispersion.detach().cpu().numpy()

    def get_latent_representation(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None
    ) -> np.ndarray:
        """States of cells.

        Parameters
        ----------
        adata
            Cells, aligned by gene name; the training cells by default.
        indices
            Cells to take; all by default.

        Returns
        -------
        numpy.ndarray
            Shape (n_cells, n_latent).
        """
        self._check_if_trained(warn=True)
        cells = self._query_cells(adata)
        where = _positions(len(cells), indices)
        # Batches in the order of the names: the same cells give the same numbers to the last bit.
        order = np.argsort(cells.names[where], kind="stable")
        result = np.empty((len(where), self.module.anchor_map.shape[1]), np.float32)
        result[order] = self._encode(cells, where[order]).numpy()
        return result

    def embed(self, adata: AnnData) -> None:
        """Write the states of cells to ``adata.obsm["X_gpjepa"]``."""
        adata.obsm["X_gpjepa"] = self.get_latent_representation(adata)

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 1,
        batch_size: int | None = None,
    ) -> Any:
        """Counts drawn from each cell's own state, for :mod:`scvi.criticism`.

        Parameters
        ----------
        adata
            Cells; the training cells by default.
        indices
            Cells to take; all by default.
        n_samples
            Draws per cell.
        batch_size
            Cells decoded at a time.

        Returns
        -------
        sparse.GCXS
            Shape (n_cells, n_genes), with a third axis (n_samples,) if there are several.
        """
        import sparse

        self._check_if_trained(warn=True)
        cells = self._query_cells(adata, decodes=True)
        where = _positions(len(cells), indices)
        with self._double_precision():
            draws = [self._draw(cells, where, k, batch_size or _ENCODE) for k in range(n_samples)]
        return draws[0] if n_samples == 1 else sparse.stack(draws, axis=2)

    def _draw(self, cells: Cells, where: np.ndarray, k: int, size: int) -> Any:
        """Counts of one draw from each cell's own state."""
        import sparse

        parts = []
        for start in range(0, len(where), size):
            part = where[start : start + size]
            share = self._decode(self._encode(cells, part).numpy(), cells.batch[part])
            mean, theta = share * cells.library[part, None], self._dispersion
            counts = _random.gamma_poisson(
                theta, mean / theta, cells.names[part], np.full(len(part), k), "posterior"
            )
            parts.append(sparse.GCXS.from_numpy(counts))
        return sparse.concatenate(parts)


def _positions(n_cells: int, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Positions of the cells that positions or a mask choose."""
    where = np.arange(n_cells) if indices is None else np.asarray(indices)
    where = np.flatnonzero(where) if where.dtype == bool else where
    if not len(where):
        raise ValueError("No cells were selected.")
    return where
