"""Mini-batches: which cells a training step sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from . import _random
from ._cells import Cells

Draw = tuple[np.ndarray, torch.Tensor]


class EpochSampler(Sampler[Draw]):
    """Draws the mini-batches of an epoch, which follow from the seed and the epoch alone."""

    def __init__(self) -> None:
        self.seed = self.epoch = 0

    def __len__(self) -> int:
        raise AssertionError("each sampler says how many mini-batches an epoch has")

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next; Lightning calls it."""
        self.epoch = epoch

    @property
    def rng(self) -> torch.Generator:
        """A generator at its start."""
        start = _random.key(self.seed, "batches", self.epoch) % 2**63
        return torch.Generator().manual_seed(start)


class RandomBatches(EpochSampler):
    """Mini-batches of cells in random order, without the last, smaller one.

    Parameters
    ----------
    groups
        Cells; a mini-batch is of one group.
    batch_size
        Cells in a mini-batch.
    """

    def __init__(self, groups: Sequence[np.ndarray], batch_size: int) -> None:
        super().__init__()
        self.groups = [(cells, min(batch_size, len(cells))) for cells in groups]

    def __len__(self) -> int:
        return sum(len(cells) // size for cells, size in self.groups)

    def __iter__(self) -> Iterator[Draw]:
        batches, rng = [], self.rng
        for cells, size in self.groups:
            order = cells[torch.randperm(len(cells), generator=rng).numpy()]
            batches += [order[i : i + size] for i in range(0, len(cells) - size + 1, size)]
        for i in torch.randperm(len(batches), generator=rng):
            yield batches[i], torch.empty(0)


class RowBatches(EpochSampler):
    """Mini-batches of a few (context, perturbation) rows, with equally many cells of each.

    Parameters
    ----------
    rows
        Cells of each row.
    n_rows, n_cells
        Rows in a batch, and cells per row.
    n_batches
        Batches in an epoch.
    controls
        Control cells of each row's context. As many of them follow the perturbed cells, row by row.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        n_rows: int,
        n_cells: int,
        n_batches: int,
        controls: Sequence[np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self.drawn = [rows] if controls is None else [rows, controls]
        self.n_rows, self.n_cells, self.n_batches = min(n_rows, len(rows)), n_cells, n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Draw]:
        rng = self.rng
        for _ in range(self.n_batches):
            chosen = torch.randperm(len(self.drawn[0]), generator=rng)[: self.n_rows]
            cells = [_draw(groups[i], self.n_cells, rng) for groups in self.drawn for i in chosen]
            yield np.concatenate(cells), chosen


def _draw(cells: np.ndarray, n: int, rng: torch.Generator) -> np.ndarray:
    """Some of the cells, each once where there are enough."""
    if len(cells) >= n:
        return cells[torch.randperm(len(cells), generator=rng)[:n].numpy()]
    return cells[torch.randint(len(cells), (n,), generator=rng).numpy()]


class _Rows(Dataset):
    """Cells by lists of positions, with their states where those are at hand."""

    def __init__(self, cells: Cells, latent: torch.Tensor | None) -> None:
        self.cells, self.latent = cells, latent

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: Draw) -> dict[str, torch.Tensor]:
        where, rows = index
        batch = {**self.cells.tensors(where), "rows": rows}
        if self.cells.measured is not None:  # a mini-batch is of one data set
            ((measured, _),) = self.cells.by_dataset(where)
            batch["measured"] = torch.from_numpy(measured)
        if self.latent is not None:
            batch["latent"] = self.latent[where]
        return batch


class Batches(LightningDataModule):
    """Feeds a training plan with the mini-batches of a sampler.

    Parameters
    ----------
    cells
        Cells that the sampler draws positions of.
    sampler
        What an epoch consists of.
    latent
        States of all cells, shape (n_cells, n_latent), where the plan works on them.
    validation
        Mini-batches by which the plan is watched.
    """

    def __init__(
        self,
        cells: Cells,
        sampler: EpochSampler,
        latent: torch.Tensor | None = None,
        validation: Sequence[Draw] = (),
    ) -> None:
        super().__init__()
        self.rows, self.sampler = _Rows(cells, latent), sampler
        self.validation = list(validation)

    def train_dataloader(self) -> DataLoader:
        """One epoch."""
        return DataLoader(self.rows, sampler=self.sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """What is not trained on."""
        return DataLoader(self.rows, sampler=self.validation, batch_size=None)
