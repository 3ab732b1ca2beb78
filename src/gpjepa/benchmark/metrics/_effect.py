"""What metrics of mean effects compute: one value per row of the task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpjepa.effects import (
    interaction_recall,
    noise_corrected_error,
    significant_interactions,
)

from ._scoring import Scoring

N_TOP = 20  # genes of R²
N_HIGHEST = 1_000  # genes of L2
FALSE_DISCOVERIES = 0.2  # proportion among the interactions that are called


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
    return np.array(
        [correlation(p[s], m[s]) for p, m, s in zip(predicted, measured, task.scored, strict=True)]
    )


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
    control = [scoring.truth.table.control[scoring.task.scale][c] for c, _ in scoring.task.rows]
    parts = zip(
        scoring.predicted.effect,
        scoring.truth.effect,
        scoring.noise,
        control,
        scoring.task.scored,
        strict=True,
    )
    return np.array([r2_top(p[s], m[s], n[s], c[s]) for p, m, n, c, s in parts])


def recall_of_interactions(scoring: Scoring) -> np.ndarray:
    """Recall of genetic interactions, the same value for every combination that has one.

    An interaction is the effect of a combination minus the sum of the effects that training
    measured of its targets alone, for the measured and for the predicted effect.
    """
    task, found = scoring.task, np.full(len(scoring.task.rows), np.nan)
    training = {row: i for i, row in enumerate(task.training.rows)}
    scale = task.scale
    noise, effect = task.training.noise(scale), task.training.effect[scale]
    rows, parts = [], []
    for i, (context, perturbation) in enumerate(task.rows):
        alone = [(context, s) for s in perturbation.singles]
        if len(alone) < 2 or not training.keys() >= set(alone):
            continue
        singles = [training[key] for key in alone]
        # The noise of the control that the singles share adds up in their sum.
        n, shared = len(singles), task.training.control_variance[scale][context]
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
