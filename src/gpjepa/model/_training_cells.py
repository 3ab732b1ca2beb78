"""The cells of training, and which of them are held out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from gpjepa.effects import CellSums, EffectTable, library_shifts
from gpjepa.perturbations import Perturbation
from gpjepa.splits import Holdout, exclude, hold_out

from . import _random
from ._cells import Cells

_LEAST_WATCHED = 2_000  # unlabelled cells from which on some are held out
_LEAST_CONTROLS = 4  # control cells of a context that can be dealt out to two sides

Row = tuple[str, Perturbation]


class TrainingCells:
    """The cells of training by name, and which of them are held out.

    Everything goes through the cells in the order of their names, so that the order in which they
    come changes nothing.

    Parameters
    ----------
    cells
        Cells with counts, and with a perturbation if they are labelled.
    genes
        Names of the genes.
    batch_names
        Names of the batches, for effects within them; None for no batches.
    """

    def __init__(
        self, cells: Cells, genes: np.ndarray, batch_names: Sequence[str] | None = None
    ) -> None:
        self.cells, self.genes, self.batch_names = cells, genes, batch_names
        self.order = np.argsort(cells.names, kind="stable")
        if cells.perturbations is None:
            self.rows: list[Row] = []
            self.holdout = Holdout("cells", ())  # a fiftieth of them
            out = self._ranks(cells.contexts) % 50 == 49
            self.out = out & (len(cells) >= _LEAST_WATCHED)
            return
        self.rows = list(zip(cells.contexts, cells.each_perturbation, strict=True))
        self.holdout = hold_out(sorted(set(self.rows)))
        rank = self._ranks(self.rows)
        if self.holdout.kind == "cells":
            self.out = rank % 10 == 9
            return
        self.out = exclude(cells.each_perturbation, cells.contexts, self.holdout)
        # Half of the controls, so that what is held out is measured against controls that the
        # network has not seen: noise that both shared would pass for skill.
        controls = pd.Series(cells.contexts)[cells.is_control].value_counts()
        judged = {c for c, _ in self.held_rows}
        few = sorted(c for c in judged if controls[c] < _LEAST_CONTROLS)
        spared = np.isin(np.array(cells.contexts, dtype=object), sorted(judged - set(few)))
        self.out = self.out | (cells.is_control & spared & (rank % 2 == 1))

    def _ranks(self, groups: Sequence[Any]) -> np.ndarray:
        """Place of each cell among those of its group, by name."""
        rank = np.empty(len(self.order), int)
        ordered = pd.Series([groups[i] for i in self.order])
        rank[self.order] = ordered.groupby(ordered, sort=False).cumcount()
        return rank

    @property
    def inside(self) -> np.ndarray:
        """Cells that are trained on, in the order of their names."""
        return self.order[~self.out[self.order]]

    @property
    def held(self) -> np.ndarray:
        """Cells that are held out, in the order of their names."""
        return self.order[self.out[self.order]]

    @property
    def held_rows(self) -> set[Row]:
        """Rows of which there are held-out cells, without controls."""
        return {self.rows[i] for i in np.flatnonzero(self.out) if not self.rows[i][1].is_control}

    def members(self) -> dict[Row, np.ndarray]:
        """Cells of each row that are trained on."""
        found: dict[Row, list[int]] = {}
        for i in self.inside:
            found.setdefault(self.rows[i], []).append(int(i))
        return {key: np.array(mine) for key, mine in found.items()}

    def effects(self) -> tuple[EffectTable, EffectTable | None, EffectTable | None]:
        """Effects of all cells, of those inside, and of those held out where they have controls."""
        cells, names = self.cells, self.batch_names
        labels = {
            "batches": None if names is None else [str(names[b]) for b in cells.batch],
            "replicates": None if cells.replicate is None else [str(r) for r in cells.replicate],
        }
        sums = [CellSums(self.genes) for _ in range(2)]
        for side, keep in zip(sums, (~self.out, self.out), strict=True):
            side.add(
                cells.counts,
                cells.library,
                cells.each_perturbation,
                cells.contexts,
                keep,
                **labels,
            )
        every = sums[0].plus(sums[1]).table()
        controls = cells.is_control
        sides: list[EffectTable | None] = []
        for side, keep in zip(sums, (~self.out, self.out), strict=True):
            n = pd.Series(cells.contexts)[keep & controls].value_counts()
            enough = sorted(n.index[n > 1])
            with warnings.catch_warnings():  # which batches have no controls is said of all cells
                warnings.simplefilter("ignore", UserWarning)
                sides.append(side.table(enough) if enough else None)
        return every, sides[0], sides[1]

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether other cells are these, in any order."""
        cells = self.cells
        nothing = [None] * len(cells)
        each = zip(
            cells.names,
            cells.contexts,
            cells.batch,
            cells.library,
            cells.perturbations or nothing,
            nothing if cells.replicate is None else cells.replicate,
            strict=True,
        )
        labels = [str(cell) for cell in each]
        return {
            "cells": len(cells),
            "genes": len(self.genes),
            "counts": float(cells.counts.sum(dtype=float)),
            "names and labels": f"{_random.key(*self.genes, *sorted(labels)):032x}",
        }

    def library_shifts(self) -> dict[Perturbation, float]:
        """Of all cells."""
        cells = self.cells
        return library_shifts(cells.library, cells.each_perturbation, cells.contexts)
