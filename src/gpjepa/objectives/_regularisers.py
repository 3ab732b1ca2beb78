from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def vicreg(z: torch.Tensor, spread: float | torch.Tensor = 1.0) -> torch.Tensor:
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


def sigreg(z: torch.Tensor, n_slices: int = 64) -> torch.Tensor:
    r"""Distance of embeddings from an isotropic standard Gaussian (SIGReg of LeJEPA, 2025).

    Mean over random directions of the Epps-Pulley statistic
    :math:`\int |\hat\varphi(t) - e^{-t^2/2}|^2\,\phi(t)\,dt` of the projected embeddings, with
    their empirical characteristic function and the standard normal density (Epps and Pulley 1983).

    Parameters
    ----------
    z
        Embeddings, shape (n_cells, n_latent).
    n_slices
        Directions.
    """
    directions = torch.randn(z.shape[1], n_slices).to(z)
    u = z @ (directions / directions.norm(dim=0))
    t = torch.linspace(0, 5, 26, dtype=z.dtype, device=z.device)
    angle = u.unsqueeze(-1) * t
    gaussian = torch.exp(-(t**2) / 2)
    gap = (angle.cos().mean(0) - gaussian).square() + angle.sin().mean(0).square()
    density = gaussian / math.sqrt(2 * math.pi)
    # The integrand is even.
    return 2 * torch.trapezoid(gap * density, t).mean()


def info_nce(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Contrastive loss between two views of the same cells (InfoNCE, van den Oord et al. 2018).

    Cosine similarities, both ways round (SimCLR, Chen et al. 2020).

    Parameters
    ----------
    first, second
        Embeddings of the views, shape (n_cells, n_latent).
    temperature
        Divides the similarities.
    """
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    same = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def effective_rank(z: torch.Tensor) -> torch.Tensor:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    # Their squares are eigenvalues of the smaller Gram matrix, a fraction of the work; in double
    # precision, or small ones would be lost. Apple's GPUs have neither.
    z = (z.cpu() if z.device.type == "mps" else z).double()
    z = z - z.mean(0)
    # States that diverged have no rank; who asks for it says so.
    gram = (z.T @ z if len(z) > z.shape[1] else z @ z.T).nan_to_num()
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().float()
    p = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum())


def gaussian_kl(
    mean_q: torch.Tensor,
    log_variance_q: torch.Tensor,
    mean_p: torch.Tensor,
    log_variance_p: torch.Tensor,
) -> torch.Tensor:
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
