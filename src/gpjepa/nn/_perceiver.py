"""Learned queries that attend to all genes of a cell, at a cost that follows the expressed ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._encoders import Encoder
from ._tokens import Expressed, Tokenizer

_PLACES = 4_096  # expressed genes worked on at a time, so that they stay in the processor's cache
_TINY = 1e-30
_LOST = 16.0  # what is subtracted may be this many times what is left


class PerceiverEncoder(Encoder):
    r"""Learned queries attend to all genes, each a token of identity and expression.

    Two identities make it fast, and neither is an approximation. A token
    :math:`E_g + W_\varphi\varphi(x)` is a part of the gene alone and a part in the small space of φ,
    so that no token is formed: logits are
    :math:`q\cdot K_g + (W_\varphi^\top W_k^\top q)\cdot\varphi(x)`, and a mean value is the map of a
    mean token, that of the mean :math:`E_g` and the mean φ. And all genes with value 0 share
    φ(0), so that their sum is that over all genes less that over the expressed ones: a cell costs
    what its expressed genes cost (Jaegle et al. 2021 for the Perceiver).

    A difference loses digits where the expressed genes held most of the sum; there, and where
    cells see different genes, all genes are summed one by one.

    Parameters
    ----------
    n_genes, n_latent
        Sizes of input and output.
    n_queries, n_heads, width
        Learned queries, attention heads, and width of the tokens.
    n_fourier
        Frequencies of the Fourier features.
    """

    def __init__(
        self, n_genes: int, n_latent: int, n_queries: int = 16, n_heads: int = 4,
        width: int = 128, n_fourier: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(n_genes)
        if width % n_heads:
            raise ValueError(f"width={width} is not a multiple of n_heads={n_heads}.")
        self.n_heads = n_heads
        self.tokens = Tokenizer(n_genes, width, n_fourier)
        self.queries = nn.Parameter(torch.randn(n_queries, width) / math.sqrt(width))
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.out = nn.Sequential(
            nn.LayerNorm(n_queries * width), nn.Linear(n_queries * width, n_latent)
        )

    def forward(self, values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Latent states, shape (n_cells, n_latent)."""
        heads, width = self.n_heads, self.queries.shape[1]
        query = self.to_query(self.queries).unflatten(1, (heads, -1))  # (Q, H, d)
        to_key = self.to_key.weight.unflatten(0, (heads, -1))  # (H, d, width)
        # Keys are only met by queries, so the queries go through the map of the keys instead.
        query = torch.einsum("qhd,hdw->hqw", query, to_key).flatten(0, 1)
        query = query * math.sqrt(heads / width)
        by_gene = self.tokens.gene @ query.T  # (G, HQ)
        by_value = query @ self.tokens.expression.weight  # (HQ, F)

        if visible is not None and visible.dim() == 1:
            visible = visible.bool()
        means = None
        if visible is None or visible.dim() == 1:
            means = self._over_expressed(values, visible, by_gene, by_value)
        if means is None:
            means = self._over_all(values, visible, by_gene, by_value)
        gene, phi = means  # (n, HQ, width), (n, HQ, F)
        token = (gene + self.tokens.expression(phi)).unflatten(1, (heads, -1))
        to_value = self.to_value.weight.unflatten(0, (heads, -1))
        state = torch.einsum("nhqw,hdw->nqhd", token, to_value).flatten(2) + self.queries
        state = state + self.mix(state)
        return self.out(state.flatten(1))

    def _over_expressed(
        self, values: torch.Tensor, visible: torch.Tensor | None, by_gene: torch.Tensor,
        by_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
        """Means of the genes' part and of φ under attention; None where digits would be lost."""
        with torch.no_grad():
            listed = Expressed.of(values, visible)
            phi = F.pad(self.tokens.fourier(listed.values), (0, 1), value=1.0)
            phi_zero = self.tokens.fourier(values.new_zeros(()))
        # Differences need the digits of the full precision, also where the rest does without.
        with torch.autocast(values.device.type, enabled=False):
            tables = (x.to(phi.dtype) for x in (by_gene, self.tokens.gene, by_value))
            *means, kept = _Attention.apply(*tables, phi, phi_zero, listed, visible)
        return tuple(means) if kept else None

    def _over_all(
        self, values: torch.Tensor, visible: torch.Tensor | None, by_gene: torch.Tensor,
        by_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The same, gene by gene."""
        phi = self.tokens.fourier(values)  # (n, G, F)
        logits = by_gene.T + by_value @ phi.transpose(1, 2)  # (n, HQ, G)
        if visible is not None:
            hidden = ~visible.bool()
            hidden = hidden if hidden.dim() == 1 else hidden.unsqueeze(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        attention = logits.softmax(-1)
        return attention @ self.tokens.gene, attention @ phi


class _Attention(torch.autograd.Function):
    """Means under softmax attention over all genes, and their gradients, by the expressed genes.

    With w the weight of an expressed gene, u the weight that it would have at value 0, and the sums
    over all visible genes at value 0 (tables, once per batch), the denominator is
    ``sum_all(u) + sum(w - u)``, and the numerators likewise.
    """

    @staticmethod
    def forward(
        ctx: Any, by_gene: torch.Tensor, gene: torch.Tensor, by_value: torch.Tensor,
        phi: torch.Tensor, phi_zero: torch.Tensor, listed: Expressed, visible: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:  # fmt: skip
        """Attention means.

        Parameters
        ----------
        by_gene
            Logits of the genes' own part, shape (n_genes, n_maps): a map is a query of a head.
        gene
            The genes' own part of the tokens, shape (n_genes, width).
        by_value
            Logits per feature of φ, shape (n_maps, n_features).
        phi
            φ of the listed genes and a column of ones, shape (n_cells, n_places, n_features + 1).
        phi_zero
            φ(0), shape (n_features,).
        listed, visible
            The expressed genes; the genes that count.

        Returns
        -------
        tuple
            Mean of the genes' own part, shape (n_cells, n_maps, width); mean φ, shape (n_cells,
            n_maps, n_features); whether no digits were lost.
        """
        (n, _, n_features), n_maps = phi.shape, len(by_value)
        at_zero = by_value @ phi_zero
        logits = phi[..., :-1] @ by_value.T  # (n, places, maps)
        # One shift for all cells, above every logit: the weights are then rows of tables.
        shift = by_gene.amax(0) + torch.maximum(logits.flatten(0, 1).amax(0), at_zero)
        # The last row is that of no gene: it weighs nothing.
        own = F.pad(by_gene - shift, (0, 0, 0, 1), value=-1e30)
        zero = (own + at_zero).exp_()
        gene = F.pad(gene, (0, 0, 0, 1))
        table = zero[:-1] if visible is None else zero[:-1] * visible.unsqueeze(1)
        total, total_gene = table.sum(0), table.T @ gene[:-1]

        mean_gene = total_gene.expand(n, -1, -1).clone()
        seen, change = phi.new_empty(n, n_maps, n_features), phi.new_empty(n, n_maps)
        saved, parts = [], listed.parts(_PLACES)
        for part in parts:
            index = listed.index[part]
            w = logits[part].add_(_rows(own, index)).exp_()
            u, tokens = (_rows(x, index) for x in (zero, gene))
            more = w - u
            mean_gene[part].baddbmm_(more.transpose(1, 2), tokens)
            torch.bmm(w.transpose(1, 2), phi[part], out=seen[part])
            torch.sum(more, 1, out=change[part])
            saved.append((w, u))
        weight = (total + change).unsqueeze(-1)  # (n, maps, 1)
        mean_gene /= weight
        rest = weight - seen[..., -1:]
        mean_phi = (seen[..., :-1] + rest * phi_zero) / weight
        # The shift is for all cells: far below the others, weights have no digits left either.
        kept = bool((total.unsqueeze(-1) <= _LOST * weight).all() & (weight > _TINY).all())
        ctx.parts, ctx.listed = list(zip(parts, saved, strict=True)), listed
        ctx.save_for_backward(gene, phi, phi_zero, table, mean_gene, mean_phi, weight)
        return mean_gene, mean_phi, kept

    @staticmethod
    def backward(ctx: Any, d_gene: torch.Tensor, d_phi: torch.Tensor, _: Any) -> tuple:
        """Gradients of by_gene, gene and by_value, in full precision as the sums are."""
        with torch.autocast(d_gene.device.type, enabled=False):
            return *_Attention._gradients(ctx, d_gene, d_phi), *[None] * 4

    @staticmethod
    def _gradients(
        ctx: Any, d_mean: torch.Tensor, d_phi: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gene, phi, phi_zero, table, mean_gene, mean_phi, weight = ctx.saved_tensors
        (n, places, _), n_maps, width = phi.shape, table.shape[1], gene.shape[1]
        inner = ((d_mean * mean_gene).sum(-1, True) + (d_phi * mean_phi).sum(-1, True)) / weight
        to_gene, to_phi = d_mean / weight, d_phi / weight
        zero_phi = (to_phi @ phi_zero).unsqueeze(-1) - inner  # (n, maps, 1)
        to_phi = torch.cat([to_phi, -inner], -1)

        # All genes at value 0, then each expressed one at its value instead.
        summed = to_gene.sum(0)
        d_zero = torch.addmm(zero_phi.sum(0).T, gene[:-1], summed.T).mul_(table)

        zero_phi = zero_phi.transpose(1, 2)
        d_own, d_listed = phi.new_empty(n, places, n_maps), phi.new_empty(n, places, width)
        d_features = phi.new_zeros(n_maps, phi.shape[2])
        for part, (w, u) in ctx.parts:
            at_zero = _rows(gene, ctx.listed.index[part]) @ to_gene[part].transpose(1, 2)
            at_value = torch.baddbmm(at_zero, phi[part], to_phi[part].transpose(1, 2)).mul_(w)
            d_features.addmm_(at_value.flatten(0, 1).T, phi[part].flatten(0, 1))
            at_zero.add_(zero_phi[part]).mul_(u)
            torch.sub(at_value, at_zero, out=d_own[part])
            torch.bmm(w - u, to_gene[part], out=d_listed[part])
        d_by_gene = _sum_by_gene(d_own, ctx.listed)
        d_at_zero = d_zero.sum(0) + d_by_gene.sum(0) - d_features[:, -1]
        d_by_value = d_features[:, :-1] + d_at_zero.unsqueeze(1) * phi_zero
        d_gene = _sum_by_gene(d_listed, ctx.listed).addmm_(table, summed)
        return d_by_gene + d_zero, d_gene, d_by_value


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a table, shape (*index.shape, n_columns)."""
    return table.index_select(0, index.flatten()).view(*index.shape, -1)


def _sum_by_gene(gradient: torch.Tensor, listed: Expressed) -> torch.Tensor:
    """Sums over the places of each gene, shape (n_genes, ·)."""
    rows = gradient.flatten(0, 1)
    return F.embedding_bag(listed.order, rows, listed.starts, mode="sum")
