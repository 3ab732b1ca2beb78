"""Encoders: cells, or part of their genes, to latent states.

All take log1p counts per 10,000, shape (n_cells, n_genes), and a mask of the genes that are
visible, shape (n_genes,) or (n_cells, n_genes); a hidden or missing gene has no influence at all.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

_N_BASIS = 128  # principal components, or two for each that is wanted, among which to look


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


class ComponentEncoder(Encoder):
    r"""The directions of expression that half of a cell's counts tells best of the other half.

    A JEPA in closed form. Let :math:`x` be the centred square roots of counts per 10,000, in which
    the noise of counting is nearly the same for all genes, and :math:`a, b` those of two halves of
    the counts, drawn at random (count splitting, Neufeld et al. 2024), all on the first :math:`r`
    principal components of :math:`x`. What both halves share is
    :math:`S = (a^\top b + b^\top a)/2`, what they do not is the noise
    :math:`N = (a - b)^\top (a - b)/2`, and the components are

    .. math::
        S v = \lambda\,(N + \tfrac1r \operatorname{tr}(N)\, I)\,v

    with the largest :math:`\lambda` (the maximum noise fraction of Green et al. 1988, with a ridge).

    Parameters
    ----------
    n_genes, n_latent
        Sizes of input and output.
    """

    by_gene: ClassVar[dict[str, int]] = {**Encoder.by_gene, "mean": 0, "axes": 0}
    mean: torch.Tensor
    axes: torch.Tensor

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__(n_genes)
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("axes", torch.zeros(n_genes, n_latent))

    @torch.no_grad()
    def fit(self, whole: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
        """Set the axes; states vary by 1 on average.

        Parameters
        ----------
        whole, first, second
            Training cells, and two halves of their counts: log1p counts per 10,000, shape (n_cells,
            n_genes), not a number where a gene was not measured.
        """
        roots = [_root(x) for x in (whole, first, second)]
        self.mean.copy_(roots[0].nanmean(0).nan_to_num())
        x, a, b = ((r - r.nanmean(0)).nan_to_num() for r in roots)
        n_basis = min(max(_N_BASIS, 2 * self.axes.shape[1]), *(d - 1 for d in x.shape))
        # A few more than are kept, or the last ones would not have settled.
        basis = torch.pca_lowrank(x, min(n_basis + 16, *x.shape), niter=6)[2][:, :n_basis]
        x, a, b = (y @ basis for y in (x, a, b))
        noise = (a - b).T @ (a - b) / 2
        size, directions = torch.linalg.eigh(noise)
        size = size.clamp_min(0) + size.mean().clamp_min(torch.finfo(size.dtype).tiny)
        white = directions / size.sqrt()
        shared = white.T @ (a.T @ b + b.T @ a) @ white
        axes = white @ torch.linalg.eigh(shared)[1].flip(1)[:, : self.axes.shape[1]]
        axes /= (x @ axes).square().mean().sqrt()
        self.axes.zero_()
        self.axes[:, : axes.shape[1]] = basis @ axes

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        centred = _root(values) - self.mean
        return (centred if visible is None else centred * visible) @ self.axes


def _root(values: torch.Tensor) -> torch.Tensor:
    """Square roots of counts per 10,000; values below 0 are noise that was added to them."""
    return values.clamp_min(0).expm1().sqrt()


class ResidualEncoder(Encoder):
    """The closed-form components, and what another encoder adds to them.

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
        self.components, self.residual = ComponentEncoder(n_genes, n_latent), residual
        last = [m for m in residual.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        return self.components(values, visible) + self.residual(values, visible)
