from __future__ import annotations

import torch


def vicreg(z: torch.Tensor, spread: float = 1.0) -> torch.Tensor:
    """Variance and covariance terms of VICReg (Bardes, Ponce, LeCun 2022, eq. 1 and 4).

    Parameters
    ----------
    z
        Embeddings, shape (n_cells, n_latent).
    spread
        Standard deviation below which a dimension is penalised.
    """
    z = z - z.mean(0)
    deviation = (z.square().sum(0) / (len(z) - 1) + 1e-4).sqrt()
    covariance = z.T @ z / (len(z) - 1)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    return (spread - deviation).relu().mean() + 0.04 * off_diagonal.square().sum() / z.shape[1]


def effective_rank(z: torch.Tensor) -> torch.Tensor:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    singular = torch.linalg.svdvals(z - z.mean(0))
    p = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum())


def gaussian_kl(
    mean_q: torch.Tensor, log_variance_q: torch.Tensor,
    mean_p: torch.Tensor, log_variance_p: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """KL(q‖p) of diagonal Gaussians, summed over dimensions, shape (n_cells,)."""
    ratio = (log_variance_q - log_variance_p).exp()
    distance = (mean_q - mean_p).square() * (-log_variance_p).exp()
    return 0.5 * (log_variance_p - log_variance_q + ratio + distance - 1).sum(-1)


def negative_binomial_nll(
    counts: torch.Tensor, mean: torch.Tensor, dispersion: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of counts, summed over genes, shape (n_cells,).

    Parameters
    ----------
    counts, mean
        Shape (n_cells, n_genes).
    dispersion
        Inverse dispersion θ (variance μ + μ²/θ), shape (n_genes,).
    """
    mean = mean.clamp_min(1e-8)
    log_total = (dispersion + mean).log()
    nll = (dispersion + counts) * log_total - counts * mean.log() + torch.lgamma(counts + 1)
    nll = nll - torch.lgamma(dispersion + counts)
    constant = torch.lgamma(dispersion) - dispersion * dispersion.log()
    return (nll + constant).sum(-1)
