"""What metrics of stated uncertainty compute: one value per row of the task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._scoring import Scoring


def _spread(scoring: Scoring) -> np.ndarray:
    """Standard deviation of the measured effect around the predicted one."""
    assert scoring.predicted.sd is not None
    return np.sqrt(scoring.predicted.sd.astype(float) ** 2 + scoring.noise)


def coverage(level: int) -> Callable[[Scoring], np.ndarray]:
    def covered(scoring: Scoring) -> np.ndarray:
        from scipy.stats import norm

        spread = _spread(scoring)
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
    spread = np.maximum(spread, 1e-12)
    z = (scoring.truth.effect - scoring.predicted.effect) / spread
    value = spread * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    return np.where(scoring.task.scored, value, 0).sum(1) / scoring.task.scored.sum(1)
