"""What metrics compute: mean effects, cells, calibration. One value per row of the task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from gpjepa.effects import (
    interaction_recall,
    noise_corrected_error,
    significant_interactions,
)

from ._scoring import Scoring
from ._tasks import SCALE

N_TOP = 20  # genes of R²
N_HIGHEST = 1_000  # genes of L2
N_CORRELATED = 50  # genes of the gene-gene correlation
FALSE_DISCOVERIES = 0.2  # proportion among the interactions that are called
N_CELLS = 500  # cells of each side of the energy distance


# Mean effects


def squared_error(scoring: Scoring) -> np.ndarray:
    """Noise-corrected squared error of the mean effect."""
    return noise_corrected_error(
        scoring.predicted.effect, scoring.truth.effect, scoring.noise, scoring.task.scored
    )


def squared_effect(scoring: Scoring) -> np.ndarray:
    """Noise-corrected squared size of the measured effect: the error of no change."""
    effect = scoring.truth.effect
    return noise_corrected_error(np.zeros_like(effect), effect, scoring.noise, scoring.task.scored)


def correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Pearson correlation; 0 for a constant prediction, which says nothing."""
    if measured.std() == 0:
        return float("nan")
    if predicted.std() <= 1e-12 * max(1.0, np.abs(predicted).max()):
        return 0.0
    return float(np.corrcoef(predicted, measured)[0, 1])


def pearson_delta(scoring: Scoring) -> np.ndarray:
    return scoring.each(correlation)


def pearson_centroid(scoring: Scoring) -> np.ndarray:
    task, predicted = scoring.task, scoring.predicted.effect - scoring.task.mean_response
    measured = scoring.truth.effect - task.mean_response
    return np.array([correlation(p[s], m[s])
                     for p, m, s in zip(predicted, measured, task.scored, strict=True)])  # fmt: skip


def l2_highest(scoring: Scoring) -> np.ndarray:
    control = np.where(scoring.task.scored, scoring.task.control_profiles, -np.inf)
    top = np.argsort(-control, axis=1, kind="stable")[:, :N_HIGHEST]
    error = np.where(scoring.task.scored, scoring.predicted.effect - scoring.truth.effect, 0)
    return np.sqrt((np.take_along_axis(error, top, 1).astype(float) ** 2).sum(1))


def r2_top(
    predicted: np.ndarray, measured: np.ndarray, noise: np.ndarray, control: np.ndarray
) -> float:
    """R² of mean expression on the genes with the largest effect over its sampling error.

    Each of shape (n_genes,). scGen's R² (Lotfollahi 2019), on means of log1p counts per 10,000.
    """
    from sklearn.metrics import r2_score

    score = np.abs(measured) / np.sqrt(noise + 1e-8)
    top = np.argsort(-score, kind="stable")[:N_TOP]
    return float(r2_score(control[top] + measured[top], control[top] + predicted[top]))


def r2_top_genes(scoring: Scoring) -> np.ndarray:
    control = [scoring.truth.table.control[SCALE][c] for c, _ in scoring.task.rows]
    parts = zip(scoring.predicted.effect, scoring.truth.effect, scoring.noise, control,
                scoring.task.scored, strict=True)  # fmt: skip
    return np.array([r2_top(p[s], m[s], n[s], c[s]) for p, m, n, c, s in parts])


def recall_of_interactions(scoring: Scoring) -> np.ndarray:
    """Recall of genetic interactions, the same value for every combination that has one.

    An interaction is the effect of a combination minus the sum of the effects that training
    measured of its targets alone, for the measured and for the predicted effect.
    """
    task, found = scoring.task, np.full(len(scoring.task.rows), np.nan)
    training = {row: i for i, row in enumerate(task.training.rows)}
    noise, effect = task.training.noise(SCALE), task.training.effect[SCALE]
    rows, parts = [], []
    for i, (context, perturbation) in enumerate(task.rows):
        alone = [(context, s) for s in perturbation.singles]
        if len(alone) < 2 or not training.keys() >= set(alone):
            continue
        singles = [training[key] for key in alone]
        # The noise of the control that the singles share adds up in their sum.
        n, shared = len(singles), task.training.control_variance[SCALE][context]
        variance = scoring.noise[i] + noise[singles].sum(0) + n * (n - 1) * shared
        additive, scored = effect[singles].sum(0), task.scored[i]
        both = (e[i] - additive for e in (scoring.predicted.effect, scoring.truth.effect))
        rows.append(i)
        parts.append(np.stack([*both, variance])[:, scored])
    if not rows:
        return found
    predicted, measured, variance = np.concatenate(parts, axis=1)
    # Rounding errors are larger where effects are, and would be ranked as if they were a prediction.
    predicted = np.where(np.abs(predicted) > 1e-5 * np.abs(effect).max(), predicted, 0)
    interacts = significant_interactions(measured, variance)
    if interacts.any():
        found[rows] = interaction_recall(predicted, interacts, [FALSE_DISCOVERIES]).iloc[0]
    return found


def from_cell_eval(name: str) -> Callable[[Scoring], np.ndarray]:
    def value(scoring: Scoring) -> np.ndarray:
        return scoring.cell_eval[name].to_numpy()

    return value


# Cells


def energy_distance_unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """Squared energy distance of two samples, shapes (n, d) and (m, d): the U-statistic."""
    import torch

    from gpjepa.objectives import energy_distance

    return float(energy_distance(torch.from_numpy(x).double(), torch.from_numpy(y).double()))


def energy_distances(scoring: Scoring) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = []
    for row in range(len(scoring.task.rows)):
        parts = [
            scoring.task.pca.transform(x[np.sort(rng.permutation(x.shape[0])[:N_CELLS])])
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
        mine = scoring.task.controls.context == context
        spread = _variance(scoring.task.controls.log1p[np.flatnonzero(mine)])
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


# Calibration


def _spread(scoring: Scoring) -> np.ndarray | None:
    """Standard deviation of the measured effect around the predicted one, if it is stated."""
    sd = scoring.predicted.sd
    return None if sd is None else np.sqrt(sd.astype(float) ** 2 + scoring.noise)


def coverage(level: int) -> Callable[[Scoring], np.ndarray]:
    def covered(scoring: Scoring) -> np.ndarray:
        from scipy.stats import norm

        spread = _spread(scoring)
        if spread is None:
            return np.full(len(scoring.task.rows), np.nan)
        wrong = np.abs(scoring.predicted.effect - scoring.truth.effect)
        counts = scoring.task.scored & (spread > 0)
        inside = counts & (wrong <= norm.ppf(0.5 + level / 200) * spread)
        n = counts.sum(1)
        return np.where(n > 0, inside.sum(1) / np.maximum(n, 1), np.nan)

    return covered


def crps(scoring: Scoring) -> np.ndarray:
    """Of a Gaussian (Gneiting and Raftery 2007, eq. 21), mean over genes."""
    from scipy.stats import norm

    spread = _spread(scoring)
    if spread is None:
        return np.full(len(scoring.task.rows), np.nan)
    spread = np.maximum(spread, 1e-12)
    z = (scoring.truth.effect - scoring.predicted.effect) / spread
    value = spread * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    return np.where(scoring.task.scored, value, 0).sum(1) / scoring.task.scored.sum(1)


def risk_coverage(error: np.ndarray, uncertainty: np.ndarray) -> float:
    """Mean error of the most certain share of the rows, averaged over all shares, over the mean.

    Below 1 if the stated uncertainty tells good predictions from bad ones (the area under the
    risk-coverage curve, Geifman and El-Yaniv 2017).

    Parameters
    ----------
    error, uncertainty
        Of each row, shape (n_rows,).
    """
    ordered = error[np.argsort(uncertainty, kind="stable")]
    risk = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float(risk.mean() / error.mean())
