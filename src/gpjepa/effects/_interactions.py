"""The part of a combination's effect that is not additive: measured, and judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm

from gpjepa.perturbations import Perturbation

from ._measured import Measured
from ._scales import Scale
from ._table import EffectTable


def measured_interactions(
    effects: EffectTable, scale: Scale = "mean_log1p"
) -> tuple[list[tuple[str, Perturbation]], np.ndarray, np.ndarray]:
    """Effects of combinations minus the sum of their singles, where all of these were measured.

    Returns
    -------
    tuple
        The (context, combination) of each row; the interactions and their sampling variance,
        shape (n_combinations, n_genes). The noise of the shared control is in it once per single
        too many.
    """
    measured = Measured(effects, scale)
    found, sums = [], []
    for rows in measured.combined.values():
        for i in rows:
            context, perturbation = effects.rows[i]
            keys = [(context, s) for s in perturbation.singles]
            if all(key in measured.row for key in keys):
                found.append((context, perturbation))
                singles = [(-1.0, measured.one(measured.row[key])) for key in keys]
                sums.append([(1.0, measured.one(i)), *singles])
    interactions = measured.assemble(sums)
    return found, measured.mean(interactions), measured.noise(interactions)


def significant_interactions(
    interaction: np.ndarray, variance: np.ndarray, level: float = 0.05
) -> np.ndarray:
    """Which interactions differ from 0, at a false discovery rate (Benjamini and Hochberg 1995).

    Parameters
    ----------
    interaction, variance
        As :func:`measured_interactions` returns them.
    level
        False discovery rate over all combinations and genes.

    Returns
    -------
    numpy.ndarray
        Mask of the shape of ``interaction``.
    """
    z = np.abs(interaction) / np.sqrt(np.maximum(variance, 1e-12))
    p = false_discovery_control(2 * norm.sf(z), axis=None)
    return np.reshape(p <= level, z.shape)


def interaction_recall(
    predicted: np.ndarray,
    interacts: np.ndarray,
    false_discoveries: Sequence[float] = (0.05, 0.1, 0.2, 0.5),
) -> pd.Series:
    """Recall of interactions at a fixed false discovery proportion (Ahlmann-Eltze et al. 2025).

    Combinations × genes are called in the order of the size of their predicted interaction.

    Parameters
    ----------
    predicted
        Predicted interactions, any shape.
    interacts
        Which of them are there in truth, same shape.
    false_discoveries
        Proportions of false calls among all calls.

    Returns
    -------
    pandas.Series
        The largest recall at which the proportion is not exceeded, 0 where it always is.

    Raises
    ------
    ValueError
        If nothing interacts: recall is not defined.
    """
    true = np.asarray(interacts, bool).ravel()
    if not true.any():
        raise ValueError("Recall is not defined: nothing interacts.")
    size = np.abs(np.asarray(predicted)).ravel()
    order = np.argsort(-size, kind="stable")
    hits = np.cumsum(true[order])
    calls = np.arange(1, len(order) + 1)
    # Equal sizes are called together, or an order among ties would decide.
    last = np.append(np.diff(size[order]) != 0, True) & (size[order] > 0)
    recall, false = hits[last] / true.sum(), 1 - hits[last] / calls[last]
    found = {level: float(recall[false <= level].max(initial=0)) for level in false_discoveries}
    return pd.Series(found, name="recall").rename_axis("false discovery proportion")
