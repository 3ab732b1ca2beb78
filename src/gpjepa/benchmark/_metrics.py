"""Metrics of predicted mean effects: each is declared once, with its direction and best value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpjepa.effects import noise_corrected_error

N_TOP = 20


@dataclass(frozen=True)
class Measured:
    """What one held-out perturbation did, over the genes that are scored.

    Attributes
    ----------
    effect, noise
        Measured mean effect and its sampling variance, the control's included, shape (n_genes,).
    control
        Control profile, shape (n_genes,).
    """

    effect: np.ndarray
    noise: np.ndarray
    control: np.ndarray


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes
    ----------
    label
        What figures and tables call it.
    higher_is_better, best
        Direction and value of a perfect prediction.
    function
        From a predicted effect, shape (n_genes,), and what was measured.
    """

    label: str
    higher_is_better: bool
    best: float
    function: Callable[[np.ndarray, Measured], float]


def _squared_error(predicted: np.ndarray, measured: Measured) -> float:
    error = noise_corrected_error(predicted[None], measured.effect[None], measured.noise[None])
    return float(error[0])


def _pearson_delta(predicted: np.ndarray, measured: Measured) -> float:
    if predicted.std() == 0 or measured.effect.std() == 0:
        return float("nan")
    return float(np.corrcoef(predicted, measured.effect)[0, 1])


def _r2_top(predicted: np.ndarray, measured: Measured) -> float:
    """R² of mean expression on the genes with the largest effect over its sampling error.

    scGen's R² (Lotfollahi 2019), on means of log1p counts per 10,000.
    """
    from sklearn.metrics import r2_score

    score = np.abs(measured.effect) / np.sqrt(measured.noise + 1e-8)
    top = np.argsort(-score, kind="stable")[:N_TOP]
    truth = measured.control[top] + measured.effect[top]
    return float(r2_score(truth, measured.control[top] + predicted[top]))


METRICS: dict[str, Metric] = {
    "squared_error": Metric("noise-corrected squared error", False, 0.0, _squared_error),
    "pearson_delta": Metric("Pearson delta", True, 1.0, _pearson_delta),
    "r2_top20": Metric("R², top 20 genes", True, 1.0, _r2_top),
}


def score(predicted: np.ndarray, measured: Measured) -> dict[str, float]:
    """All metrics of one predicted effect."""
    return {name: metric.function(predicted, measured) for name, metric in METRICS.items()}
