"""From cells to their states, and back to counts."""

from __future__ import annotations

from copy import deepcopy
from numbers import Integral
from typing import Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from . import _random
from ._cells import Cells
from ._fields import LIBRARY_KEY
from ._module import GPJEPAModule

BATCH_SIZE = 512
"""Cells encoded or decoded at a time, unless told otherwise."""


class States:
    """The module's encoder and decoder, on cells.

    Parameters
    ----------
    module
        The module, on whatever device it is.
    batch_size
        Cells at a time.
    """

    def __init__(self, module: GPJEPAModule, batch_size: int | None = None) -> None:
        whole = isinstance(batch_size, Integral) and not isinstance(batch_size, bool)
        if batch_size is not None and not (whole and batch_size > 0):
            raise ValueError(f"batch_size={batch_size!r}: expected a whole number from 1, or None.")
        self.module = module
        self.batch_size = BATCH_SIZE if batch_size is None else int(batch_size)

    def in_double(self) -> States:
        """The same in double precision.

        In single precision, the last bits of a state depend on the number of threads and on which
        cells share a mini-batch, and samples would turn them into other counts.
        """
        module = deepcopy(self.module)
        if module.anchor_map.device.type == "mps":  # which has no double precision
            module = module.cpu()
        return States(module.double(), self.batch_size)

    @property
    def n_latent(self) -> int:
        """Dimensions of a state."""
        return int(self.module.anchor_map.shape[1])

    @property
    def dispersion(self) -> np.ndarray:
        """Inverse dispersion θ of each gene, shape (n_genes,)."""
        return self.module.decoder.dispersion.detach().cpu().numpy()

    @torch.inference_mode()
    def encode(self, cells: Cells, where: np.ndarray | None = None) -> np.ndarray:
        """States of cells, shape (n_cells, n_latent)."""
        self.module.eval()
        where = np.arange(len(cells)) if where is None else where
        like = self.module.anchor_map
        states = torch.empty(len(where), self.n_latent, dtype=like.dtype)
        for measured, mine in cells.by_dataset(where):
            seen = torch.from_numpy(measured).to(like.device) & self.module.known
            if not seen.any():
                raise ValueError(
                    f"The encoder knows none of the {int(measured.sum())} genes of these cells: call "
                    "pretrain() on cells that have them."
                )
            visible = None if seen.all() else seen
            for start in range(0, len(mine), self.batch_size):
                part = mine[start : start + self.batch_size]
                batch = cells.tensors(where[part], like.dtype)
                counts, library = (
                    batch[key].to(like.device) for key in (REGISTRY_KEYS.X_KEY, LIBRARY_KEY)
                )
                states[part] = self.module.inference(counts, library, visible)["z"].cpu()
        return states.numpy()

    @torch.inference_mode()
    def moved(self, state: np.ndarray, effect: np.ndarray) -> np.ndarray:
        """States moved by the image of a mean effect on ``mean_log1p``, shape (n_cells, n_latent)."""
        like = self.module.anchor_map
        return state + (torch.from_numpy(effect).to(like) @ like).cpu().numpy()

    @torch.inference_mode()
    def decode(self, state: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Share of each gene in the library size, shape (n_cells, n_genes)."""
        like = self.module.anchor_map
        z, b = torch.from_numpy(state).to(like), torch.from_numpy(batch).to(like.device)
        parts = zip(z.split(self.batch_size), b.split(self.batch_size), strict=True)
        return torch.cat([self.module.decoder(*part).cpu() for part in parts]).numpy()

    def sample(self, cells: Cells, where: np.ndarray, k: int) -> Any:
        """Counts drawn from each cell's own state for the k-th time, as a :class:`sparse.GCXS`."""
        import sparse

        parts, theta = [], self.dispersion
        for start in range(0, len(where), self.batch_size):
            part = where[start : start + self.batch_size]
            share = self.decode(self.encode(cells, part), cells.batch[part])
            mean = share * cells.library[part, None]
            counts = _random.gamma_poisson(
                theta, mean / theta, cells.names[part], np.full(len(part), k), "posterior"
            )
            parts.append(sparse.GCXS.from_numpy(counts))
        return sparse.concatenate(parts)
