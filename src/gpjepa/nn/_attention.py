from __future__ import annotations

import torch
from torch import nn

_FLOOR = 0.02  # of similarities, whose logarithm is taken
_NULL = 0.3  # similarity that saying nothing starts from
_SHARPEST = 12.0


class SimilarityAttention(nn.Module):
    r"""Predict the effect of a target from those of measured ones, by attention.

    Head *h* gives the measured target *j* the weight

    .. math:: \mathrm{softmax}_j\bigl(\tau_h \log \textstyle\sum_m w_{hm} K_m(i, j) + q_{hi} \cdot k_{hj}\bigr)

    for similarities *K* of several kinds, and may also give it to nobody. Without the second term,
    this is a kernel smoother with a learned sharpness; the second, of coordinates of the targets,
    starts near 0.

    Parameters
    ----------
    n_kinds
        Kinds of similarities.
    n_coordinates
        Coordinates of a target.
    n_values
        Values of a target.
    n_heads, n_dim
        Heads, and the length of their queries and keys.
    """

    def __init__(
        self, n_kinds: int, n_coordinates: int, n_values: int, n_heads: int = 4, n_dim: int = 16
    ) -> None:
        super().__init__()
        self.kinds = nn.Parameter(0.3 * torch.randn(n_heads, n_kinds))
        self.sharpness = nn.Parameter(torch.linspace(1, 4, n_heads))
        self.query, self.key = (
            nn.Linear(n_coordinates, n_heads * n_dim, bias=False) for _ in range(2)
        )
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
        self.null = nn.Parameter(torch.zeros(n_heads))
        self.out = nn.Parameter(torch.full((n_heads, n_values), 1 / n_heads))
        self.shape = n_heads, n_dim

    def forward(
        self,
        similarity: torch.Tensor,
        asked: torch.Tensor,
        measured: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted values, shape (n_asked, n_values).

        Parameters
        ----------
        similarity
            Of the targets asked for to those measured, shape (n_kinds, n_asked, n_measured).
        asked, measured
            Coordinates of both, shape (n, n_coordinates).
        values
            Of those measured, shape (n_measured, n_values).
        """
        mixed = torch.einsum("hm,mij->hij", self.kinds.softmax(1), similarity.clamp_min(0))
        sharpness = self.sharpness.clamp(0.2, _SHARPEST)[:, None, None]
        query, key = (
            layer(x).view(len(x), *self.shape)
            for layer, x in ((self.query, asked), (self.key, measured))
        )
        logits = sharpness * torch.log(mixed + _FLOOR) + torch.einsum("ihd,jhd->hij", query, key)
        nobody = self.null[:, None, None] + sharpness * torch.log(torch.tensor(_NULL))
        logits = torch.cat([logits, nobody.expand(-1, len(asked), 1)], 2)
        weights = logits.softmax(2)[..., :-1]
        return torch.einsum("hij,jv,hv->iv", weights, values, self.out)
