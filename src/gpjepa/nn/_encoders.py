"""Encoders: cells, or part of their genes, to latent states.

All take log1p counts per 10,000, shape (n_cells, n_genes), and a mask of the genes that are
visible, shape (n_genes,) or (n_cells, n_genes); a hidden or missing gene has no influence at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

_N_BASIS = 128  # principal components, or two for each that is wanted, among which to look


class Encoder(nn.Module):
    """What all have: the mean of each gene over the training cells, and one unit for all genes.

    Both are of square roots of counts per 10,000. The noise of counting has nearly the same size in
    all of them; in genes scaled to equal spread, those that hold nothing else would count most.
    """

    by_gene: ClassVar[dict[str, int]] = {"center": 0}
    center: torch.Tensor
    scale: torch.Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def set_standard(self, center: torch.Tensor, scale: float) -> None:
        """Say what is average and what is one unit, here and in every part.

        Parameters
        ----------
        center
            Mean root of each gene, shape (n_genes,).
        scale
            Root mean square of what genes differ from it.
        """
        for part in self.modules():
            if isinstance(part, Encoder):
                part.center.copy_(center)
                part.scale.fill_(scale)

    def standardise(self, values: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """Square roots of counts per 10,000, centred and in one unit, 0 for hidden genes.

        Parameters
        ----------
        values
            log1p of counts per 10,000, shape (n_cells, n_genes).
        visible
            Mask of the genes that count, shape (n_genes,) or that of ``values``; None for all.
        """
        standard = (_root(values) - self.center) / self.scale
        return standard if visible is None else standard * visible


def _root(values: torch.Tensor) -> torch.Tensor:
    """Square roots of counts per 10,000; values below 0 are noise that was added to them."""
    # Not of 0 itself, which takes some libraries fifty times as long.
    return values.expm1().clamp_min(1e-12).sqrt()


class MLPEncoder(Encoder):
    """Two hidden layers over roots of counts; a hidden gene counts as an average one.

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
        return self.of_standard(self.standardise(values, visible))

    def of_standard(self, standard: torch.Tensor) -> torch.Tensor:
        """States of cells that were standardised already."""
        return self.net(standard)


class ComponentEncoder(Encoder):
    r"""The directions of expression that half of a cell's counts tells best of the other half.

    A JEPA in closed form. Let :math:`x` be the centred square roots of counts per 10,000, and
    :math:`a, b` those of two halves of the counts, drawn at random (count splitting, Neufeld et al.
    2024), all on the first :math:`r` principal components of :math:`x`. What both halves share is
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

    by_gene: ClassVar[dict[str, int]] = {**Encoder.by_gene, "axes": 0}
    axes: torch.Tensor

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__(n_genes)
        self.register_buffer("axes", torch.zeros(n_genes, n_latent))

    @torch.no_grad()
    def fit(
        self,
        x: torch.Tensor,
        halves: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Set the axes; states vary by 1 on average.

        Parameters
        ----------
        x
            Training cells as :meth:`standardise` gives them, shape (n_cells, n_genes).
        halves
            What gives both halves of the cells on axes of shape (n_genes, r), each of shape
            (n_cells, r) and centred.
        """
        n_basis = min(max(_N_BASIS, 2 * self.axes.shape[1]), *(d - 1 for d in x.shape))
        # A few more than are kept, or the last ones would not have settled.
        basis = torch.pca_lowrank(x, min(n_basis + 16, *x.shape), niter=6)[2][:, :n_basis]
        a, b = halves(basis)
        size, directions = torch.linalg.eigh((a - b).T @ (a - b) / 2)
        size = size.clamp_min(0) + size.mean().clamp_min(torch.finfo(size.dtype).tiny)
        white = directions / size.sqrt()
        shared = white.T @ (a.T @ b + b.T @ a) @ white / 2
        axes = basis @ white @ torch.linalg.eigh(shared)[1].flip(1)[:, : self.axes.shape[1]]
        self.axes.zero_()
        self.axes[:, : axes.shape[1]] = axes / (x @ axes).square().mean().sqrt()

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        return self.standardise(values, visible) @ self.axes


class ResidualEncoder(ComponentEncoder):
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
        super().__init__(n_genes, n_latent)
        self.residual = residual
        self.add_nothing()

    def add_nothing(self) -> None:
        """Put the last layer of the other encoder to 0, where it starts."""
        last = [m for m in self.residual.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        standard = self.standardise(values, visible)
        if isinstance(self.residual, MLPEncoder):  # which would standardise alike
            return standard @ self.axes + self.residual.of_standard(standard)
        return standard @ self.axes + self.residual(values, visible)
