"""What metrics of predicted cells compute: one value per row of the task."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from ._scoring import Scoring

N_CORRELATED = 50  # genes of the gene-gene correlation
N_CELLS = 500  # cells of each side of the energy distance


def energy_distance_unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """Squared energy distance of two samples, shapes (n, d) and (m, d): the U-statistic."""
    import torch

    from gpjepa.objectives import energy_distance

    return float(energy_distance(torch.from_numpy(x).double(), torch.from_numpy(y).double()))


def energy_distances(scoring: Scoring) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = []
    for row, hidden in enumerate(~scoring.task.scored):
        parts = [
            scoring.task.components(x[np.sort(rng.permutation(x.shape[0])[:N_CELLS])], hidden)
            for x in scoring.cells_of(row)
        ]
        values.append(energy_distance_unbiased(*parts))
    return np.array(values)


def _variance(values: sp.csr_matrix) -> np.ndarray:
    mean = np.asarray(values.mean(0)).ravel()
    square = np.asarray(values.multiply(values).mean(0)).ravel()
    return np.maximum(square - mean**2, 0) * values.shape[0] / max(values.shape[0] - 1, 1)


def variance_log_ratio(scoring: Scoring) -> np.ndarray:
    values = []
    for row, scored in enumerate(scoring.task.scored):
        predicted, measured = (_variance(x)[scored].sum() for x in scoring.cells_of(row))
        values.append(abs(np.log(max(predicted, 1e-12) / measured)) if measured > 0 else np.nan)
    return np.array(values)


def gene_correlation_error(scoring: Scoring) -> np.ndarray:
    values = []
    for row, (context, _) in enumerate(scoring.task.rows):
        mine = scoring.task.controls.take(scoring.task.controls.context == context)
        spread = _variance(mine.log1p)
        top = np.argsort(-np.where(scoring.task.scored[row], spread, -1), kind="stable")
        predicted, measured = (
            _correlations(x[:, top[:N_CORRELATED]].toarray()) for x in scoring.cells_of(row)
        )
        values.append(float(np.sqrt(np.mean((predicted - measured) ** 2))))
    return np.array(values)


def _correlations(values: np.ndarray) -> np.ndarray:
    """Gene-gene correlations above the diagonal; 0 for a gene that does not vary."""
    centred = values - values.mean(0)
    size = np.sqrt((centred**2).sum(0))
    centred = centred / np.where(size > 0, size, 1)
    return (centred.T @ centred)[np.triu_indices(values.shape[1], 1)]
