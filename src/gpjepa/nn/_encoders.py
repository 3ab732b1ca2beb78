"""Encoders: cells, or part of their genes, to latent states.

All take log1p counts per 10,000, shape (n_cells, n_genes), and a mask of the genes that are
visible, shape (n_genes,) or (n_cells, n_genes); a hidden or missing gene has no influence at all.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


class Encoder(nn.Module):
    """What all have: mean and spread of each gene over the training cells."""

    by_gene: ClassVar[dict[str, int]] = {"center": 0, "scale": 0}
    center: torch.Tensor
    scale: torch.Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))

    @torch.no_grad()
    def set_standard(self, center: torch.Tensor, scale: torch.Tensor) -> None:
        """Say what is average and what is one unit, here and in every part.

        Parameters
        ----------
        center, scale
            Mean and spread of each gene, shape (n_genes,).
        """
        for part in self.modules():
            if isinstance(part, Encoder):
                part.center.copy_(center)
                part.scale.copy_(scale)

    def standardise(self, values: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        standard = ((values - self.center) / self.scale).clamp(-8, 8)
        return standard if visible is None else standard * visible


class MLPEncoder(Encoder):
    """Two hidden layers over standardised genes; a hidden gene counts as an average one.

    Parameters
    ----------
    n_genes, n_latent, n_hidden
        Sizes of input, output and the hidden layers.
    """

    by_gene: ClassVar[dict[str, int]] = {**Encoder.by_gene, "net.0.weight": 1}

    def __init__(self, n_genes: int, n_latent: int, n_hidden: int = 256) -> None:
        super().__init__(n_genes)
        self.net = nn.Sequential(
            nn.Linear(n_genes, n_hidden),
            nn.LayerNorm(n_hidden),
            nn.GELU(),
            nn.Linear(n_hidden, n_hidden),
            nn.LayerNorm(n_hidden),
            nn.GELU(),
            nn.Linear(n_hidden, n_latent),
        )

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        return self.net(self.standardise(values, visible))


class PCAEncoder(Encoder):
    """Principal components of standardised genes, fitted once: the control of a learned encoder.

    Parameters
    ----------
    n_genes, n_latent
        Sizes of input and output.
    """

    by_gene: ClassVar[dict[str, int]] = {**Encoder.by_gene, "axes": 0}
    axes: torch.Tensor

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__(n_genes)
        self.register_buffer("axes", torch.zeros(n_genes, n_latent))

    @torch.no_grad()
    def fit(self, x: torch.Tensor) -> None:
        """Set the axes; states vary by 1 on average.

        Parameters
        ----------
        x
            Standardised expression of training cells, shape (n_cells, n_genes).
        """
        n = min(self.axes.shape[1], *(d - 1 for d in x.shape))
        # A few more than are kept, or the last ones would not have settled.
        _, singular, axes = torch.pca_lowrank(x, min(n + 16, *x.shape), niter=6)
        self.axes.zero_()
        self.axes[:, :n] = axes[:, :n] / (singular[:n].square().mean() / len(x)).sqrt()

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        return self.standardise(values, visible) @ self.axes


class ResidualEncoder(Encoder):
    """Principal components, and what another encoder adds to them.

    The other's last layer starts at 0, and so does what it adds.

    Parameters
    ----------
    n_genes, n_latent
        Sizes of input and output.
    residual
        Encoder of the same sizes.
    """

    def __init__(self, n_genes: int, n_latent: int, residual: Encoder) -> None:
        super().__init__(n_genes)
        self.components, self.residual = PCAEncoder(n_genes, n_latent), residual
        last = [m for m in residual.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        return self.components(values, visible) + self.residual(values, visible)
