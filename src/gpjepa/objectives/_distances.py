"""Distances between two sets of states, shape (n, d) and (m, d), and their matching."""

from __future__ import annotations

import math

import numpy as np
import torch


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared energy distance, the unbiased U-statistic (Székely and Rizzo 2013).

    Zero in expectation, and negative as often as positive, for two samples of one distribution.
    """
    n, m = len(x), len(y)
    between = 2 * torch.cdist(x, y).mean()
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return between - within


def mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy, unbiased, RBF kernels at half, one and two times the
    median distance (Gretton et al. 2012).
    """  # noqa: D205
    n, m = len(x), len(y)
    both = torch.cdist(torch.cat([x, y]), torch.cat([x, y])).square()
    off = ~torch.eye(n + m, dtype=torch.bool, device=x.device)
    median = both[off].median().detach().clamp_min(1e-12)
    kernel = torch.stack([(-both / (2 * s * s * median)).exp() for s in (0.5, 1.0, 2.0)]).mean(0)
    kernel = kernel * off
    xx = kernel[:n, :n].sum() / (n * (n - 1))
    yy = kernel[n:, n:].sum() / (m * (m - 1))
    return xx + yy - 2 * kernel[:n, n:].mean()


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, n_slices: int = 64) -> torch.Tensor:
    """Squared sliced 2-Wasserstein distance between sets of equal size (Bonneel et al. 2015)."""
    if len(x) != len(y):
        raise ValueError(f"Sets of {len(x)} and {len(y)} points; sorting needs equal sizes.")
    directions = torch.randn(x.shape[1], n_slices, device=x.device)
    directions = directions / directions.norm(dim=0)
    return ((x @ directions).sort(0)[0] - (y @ directions).sort(0)[0]).square().mean()


def optimal_transport_pairs(x: torch.Tensor, y: torch.Tensor, epsilon: float = 0.05) -> np.ndarray:
    """Which row of ``y`` belongs to each row of ``x``, by entropic optimal transport.

    The mean shift is removed first, so that cells are matched by where they stand in their own
    set. Each row takes the column with most of its mass.

    Parameters
    ----------
    x, y
        Control and perturbed states.
    epsilon
        Entropic regularisation, as a share of the mean cost.
    """
    import ot

    a, b = (x - x.mean(0)).detach().cpu().numpy(), (y - y.mean(0)).detach().cpu().numpy()
    cost = ot.dist(a.astype(np.float64), b.astype(np.float64))
    scale = float(cost.mean())
    if not math.isfinite(scale) or scale == 0:
        return np.arange(len(a)) % len(b)
    plan = ot.sinkhorn([], [], cost / scale, reg=epsilon, method="sinkhorn_log", numItermax=200,
                       warn=False)  # fmt: skip
    return plan.argmax(1)
