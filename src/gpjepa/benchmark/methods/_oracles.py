"""Positive controls: they see the truth."""

from __future__ import annotations

import numpy as np

from gpjepa.benchmark.tasks import CellSet, Task

from ._predict import Prediction, mean_prediction

ORACLES = ("replicate", "interpolated duplicate", "truth")


def oracle(name: str, task: Task, half: int) -> Prediction:
    """A positive control for one half of the truth.

    ``replicate`` is the other half; ``truth`` this half; ``interpolated duplicate`` halfway between
    the replicate and the mean response: the mean of their effects, and of each row as many cells
    of the one as of the other (Mejia et al. 2025).
    """
    truth = task.truths[half if name == "truth" else 1 - half]
    cells = truth.cells.take(truth.cells.row >= 0)
    if name != "interpolated duplicate":
        return Prediction(truth.effect.astype(float), cells)
    mean = mean_prediction(task)
    if not task.has_cells:
        return Prediction((truth.effect + mean.effect) / 2, cells)
    parts = []
    for row in range(len(task.rows)):
        both = [s.take(s.row == row) for s in (cells, mean.cells)]
        n = min(len(s.row) for s in both)
        # Every so many of the larger set: its first cells need not be like its others.
        parts += [s.take(np.linspace(0, len(s.row) - 1, n).round().astype(int)) for s in both]
    return Prediction((truth.effect + mean.effect) / 2, CellSet.stacked(parts))
