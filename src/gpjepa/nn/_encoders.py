"""Encoders: cells, or part of their genes, to latent states.

Both take log1p counts per 10,000, shape (n_cells, n_genes), and a mask of the genes that are
visible, shape (n_genes,) or (n_cells, n_genes); a hidden or missing gene has no influence at all.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn


class _Encoder(nn.Module):
    """Standardises genes by the training cells before encoding them."""

    center: torch.Tensor
    scale: torch.Tensor

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))

    def standardise(self, values: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        standard = ((values - self.center) / self.scale).clamp(-8, 8)
        return standard if visible is None else standard * visible


class MLPEncoder(_Encoder):
    """Two hidden layers over standardised genes; a hidden gene counts as an average one.

    Parameters
    ----------
    n_genes, n_latent, n_hidden
        Sizes of input, output and the hidden layers.
    """

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


class PCAEncoder(_Encoder):
    """Principal components of standardised genes, fitted once: the control of a learned encoder.

    Parameters
    ----------
    n_genes, n_latent
        Sizes of input and output.
    """

    axes: torch.Tensor

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__(n_genes)
        self.register_buffer("axes", torch.zeros(n_genes, n_latent))

    @torch.no_grad()
    def fit(self, values: torch.Tensor) -> None:
        """Set the axes; states vary by 1 on average.

        Parameters
        ----------
        values
            log1p counts per 10,000 of training cells, shape (n_cells, n_genes).
        """
        x = self.standardise(values, None)
        n = min(self.axes.shape[1], *(d - 1 for d in x.shape))
        _, singular, axes = torch.pca_lowrank(x, n, niter=4)
        self.axes.zero_()
        self.axes[:, :n] = axes / (singular.square().mean() / len(x)).sqrt()

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        return self.standardise(values, visible) @ self.axes


class PerceiverEncoder(_Encoder):
    r"""Learned queries attend to all genes, each a token of identity and expression.

    The token of gene *g* with value *x* is :math:`E_g + W_\varphi\varphi(x)` with Fourier features
    φ. Its key and value split exactly into a part of the gene alone and a part in the small
    Fourier space, so no token is ever formed: logits are
    :math:`q\cdot K_g + (W_\varphi^\top W_k^\top q)\cdot\varphi(x)`, and values are summed in the
    same way (Jaegle et al. 2021 for the Perceiver).

    Parameters
    ----------
    n_genes, n_latent
        Sizes of input and output.
    n_queries, n_heads, width
        Learned queries, attention heads, and width of the tokens.
    n_fourier
        Frequencies of the Fourier features.
    """

    frequencies: torch.Tensor

    def __init__(
        self, n_genes: int, n_latent: int, n_queries: int = 16, n_heads: int = 4,
        width: int = 128, n_fourier: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(n_genes)
        if width % n_heads:
            raise ValueError(f"width={width} is not a multiple of n_heads={n_heads}.")
        self.n_heads = n_heads
        self.register_buffer("frequencies", 2.0 ** torch.arange(n_fourier) * math.pi / 8)
        self.gene = nn.Parameter(torch.randn(n_genes, width) / math.sqrt(width))
        self.queries = nn.Parameter(torch.randn(n_queries, width) / math.sqrt(width))
        self.expression = nn.Linear(2 * n_fourier + 1, width, bias=False)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.out = nn.Sequential(
            nn.LayerNorm(n_queries * width), nn.Linear(n_queries * width, n_latent)
        )

    def fourier(self, values: torch.Tensor) -> torch.Tensor:
        """φ(x): the value itself, sines and cosines; shape (..., 2 n_fourier + 1)."""
        angle = values.unsqueeze(-1) * self.frequencies
        return torch.cat([values.unsqueeze(-1), angle.sin(), angle.cos()], -1)

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        n, heads = values.shape[0], self.n_heads
        phi = self.fourier(self.standardise(values, None))  # (n, G, F)
        query = self.to_query(self.queries).unflatten(-1, (heads, -1))  # (Q, H, d)
        key = self.to_key(self.gene).unflatten(-1, (heads, -1))  # (G, H, d)
        value = self.to_value(self.gene).unflatten(-1, (heads, -1))
        key_map = (self.to_key.weight @ self.expression.weight).unflatten(0, (heads, -1))
        value_map = (self.to_value.weight @ self.expression.weight).unflatten(0, (heads, -1))

        by_gene = torch.einsum("qhd,ghd->hqg", query, key).flatten(0, 1)  # (HQ, G)
        by_value = torch.einsum("qhd,hdf->hqf", query, key_map).flatten(0, 1)  # (HQ, F)
        logits = (by_gene + by_value @ phi.transpose(1, 2)) / math.sqrt(query.shape[-1])
        if visible is not None:
            hidden = ~visible.bool()
            hidden = hidden if hidden.dim() == 1 else hidden.unsqueeze(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        attention = logits.softmax(-1)  # (n, HQ, G)
        seen = (attention @ phi).unflatten(1, (heads, -1))  # (n, H, Q, F)
        attention = attention.unflatten(1, (heads, -1))
        state = torch.einsum("nhqg,ghd->nqhd", attention, value)
        state = (state + torch.einsum("nhqf,hdf->nqhd", seen, value_map)).flatten(2)
        state = state + self.queries
        state = state + self.mix(state)
        return self.out(state.reshape(n, -1))


def make_encoder(
    kind: Literal["mlp", "perceiver", "pca"], n_genes: int, n_latent: int, n_hidden: int
) -> MLPEncoder | PerceiverEncoder | PCAEncoder:
    """Build an encoder by name."""
    if kind == "mlp":
        return MLPEncoder(n_genes, n_latent, n_hidden)
    if kind == "perceiver":
        return PerceiverEncoder(n_genes, n_latent)
    if kind == "pca":
        return PCAEncoder(n_genes, n_latent)
    raise ValueError(f"encoder={kind!r} is not known; choose 'mlp', 'perceiver' or 'pca'.")
