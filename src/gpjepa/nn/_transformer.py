from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ._encoders import Encoder
from ._tokens import Expressed, Tokenizer, expressed_alike


class TransformerEncoder(Encoder):
    """Self-attention among the expressed genes of a cell; those with value 0 are not seen.

    Its cost grows with the square of the expressed genes. Gradients reach the parameters, not the
    values.

    Parameters
    ----------
    n_genes, n_latent
        Sizes of input and output.
    n_layers, n_heads, width
        Layers (pre-norm, Xiong et al. 2020), attention heads, width of the tokens.
    """

    def __init__(
        self, n_genes: int, n_latent: int, n_layers: int = 2, n_heads: int = 4, width: int = 128
    ) -> None:
        super().__init__(n_genes)
        self.tokens = Tokenizer(n_genes, width)
        self.cell = nn.Parameter(torch.randn(1, 1, width) / width**0.5)
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_latent))

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        with torch.no_grad():
            lists, where = expressed_alike(values, None if visible is None else visible.bool())
        genes = F.pad(self.tokens.gene, (0, 0, 0, 1))
        return torch.cat([self._states(genes, listed) for listed in lists])[where]

    def _states(self, genes: torch.Tensor, listed: Expressed) -> torch.Tensor:
        tokens = genes[listed.index] + self.tokens.expression(self.tokens.fourier(listed.values))
        tokens = torch.cat([self.cell.expand(len(tokens), -1, -1), tokens], 1)
        empty = F.pad(listed.index == len(genes) - 1, (1, 0))
        return self.out(self.layers(tokens, src_key_padding_mask=empty)[:, 0])
