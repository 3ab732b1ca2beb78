"""Distances between two sets of states, shape (n, d) and (m, d), and their matching."""

from __future__ import annotations

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


def optimal_transport_pairs(
    x: torch.Tensor, y: torch.Tensor, epsilon: float = 0.05
) -> torch.Tensor:
    """Which row of ``y`` belongs to each row of ``x``, by entropic optimal transport.

    The mean shift is removed first, so that cells are matched by where they stand in their own
    set. Each row draws a column by its mass there, so that all columns are drawn equally often on
    average; the column with most of it would leave some out and take others several times.

    Parameters
    ----------
    x, y
        Control and perturbed states, shapes (..., n, d) and (..., m, d).
    epsilon
        Entropic regularisation, as a share of the mean cost.

    Returns
    -------
    torch.Tensor
        Rows of ``y``, shape (..., n).
    """
    import ot

    a, b = ((z - z.mean(-2, keepdim=True)).detach().float() for z in (x, y))
    cost = torch.cdist(a, b).square()
    cost = cost / cost.mean((-2, -1), keepdim=True).clamp_min(1e-12)
    plan = ot.solve_batch(
        cost.view(-1, *cost.shape[-2:]),
        reg=epsilon,
        max_iter=200,
        method="log_sinkhorn",
        grad="detach",
    ).plan
    return torch.multinomial(plan.flatten(0, 1), 1).view(x.shape[:-1])
