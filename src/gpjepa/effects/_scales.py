"""The two scales of mean effects of cells, and the expectation of one under the NB.

Tables of effects that were published have a scale of their own, named by its unit.

``mean_log1p``
    Mean over cells of log1p counts per 10,000: what the field scores.
``log1p_mean``
    log1p of the pooled rate per 10,000 (summed counts over summed library sizes): what a
    generative model can hit exactly.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

Scale = str
SCALES: tuple[Scale, ...] = ("mean_log1p", "log1p_mean")
PER = 1e4
"""Rates are counts per this many counts of the cell."""

# Trapezoid in v = log t; the integrand falls like exp(v) to the left and exp(-exp(v)) to the right.
_V = np.linspace(np.log(1e-7), np.log(40.0), 24)


def check_scale(scale: Scale) -> Scale:
    """Refuse anything but the two scales of cells."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known; choose one of {list(SCALES)}.")
    return scale


def log1p_rates(counts: sp.csr_matrix, library: np.ndarray) -> sp.csr_matrix:
    """log1p counts per 10,000, as sparse as the counts.

    Parameters
    ----------
    counts
        Counts, shape (n_cells, n_genes).
    library
        Counts of each cell, shape (n_cells,).
    """
    rates = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    per_cell = np.asarray(PER / library, np.float32)
    rates.data = np.log1p(rates.data * np.repeat(per_cell, np.diff(rates.indptr)))
    return rates


def expected_log1p(mean: np.ndarray, dispersion: np.ndarray, library: np.ndarray) -> np.ndarray:
    r"""Expectation of log1p counts per 10,000 under a negative binomial, without sampling.

    With :math:`s = 10^4/\ell` and Frullani's integral
    :math:`\log(1+sk) = \int_0^\infty (1-e^{-skt})\,e^{-t}\,dt/t`, the expectation needs only the
    generating function :math:`G(u) = (1+\mu(1-u)/\theta)^{-\theta}` at :math:`u=e^{-st}`.

    Parameters
    ----------
    mean
        Mean counts, shape (n_cells, n_genes).
    dispersion
        Inverse dispersion θ of each gene (variance μ + μ²/θ), shape (n_genes,).
    library
        Library size of each cell, shape (n_cells,).

    Returns
    -------
    numpy.ndarray
        Shape (n_cells, n_genes), within 1e-3 (relative) of the exact sum.
    """
    mean = np.asarray(mean, np.float32)
    theta = np.asarray(dispersion, np.float32)
    s = np.asarray(PER / np.asarray(library, float), np.float32)[:, None]
    ratio = mean / theta
    total = np.zeros_like(mean)
    step = _V[1] - _V[0]
    for v in _V:
        t = np.exp(v)
        hidden = -np.expm1(-s * np.float32(t))  # 1 - u
        total += np.float32(step * np.exp(-t)) * -np.expm1(-theta * np.log1p(ratio * hidden))
    return total
