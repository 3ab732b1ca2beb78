"""Learned queries that attend to all genes of a cell, at a cost that follows the expressed ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._encoders import Encoder
from ._tokens import Expressed, Tokenizer

_CELLS = 16  # cells whose lists are worked on at a time, so that they stay in the processor's cache
_TINY = 1e-30
_LOST = 16.0  # what is subtracted may be this many times what is left


class PerceiverEncoder(Encoder):
    r"""Learned queries attend to all genes, each a token of identity and expression.

    Two identities make it fast, and neither is an approximation. The key and the value of a token
    :math:`E_g + W_\varphi\varphi(x)` split into a part of the gene alone and a part in the small
    space of φ, so that no token is formed: logits are
    :math:`q\cdot K_g + (W_\varphi^\top W_k^\top q)\cdot\varphi(x)`. And all genes with value 0 share
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
        value = self.to_value(self.tokens.gene)  # (G, Hd)
        value_map = (self.to_value.weight @ self.tokens.expression.weight).unflatten(0, (heads, -1))

        if visible is not None and visible.dim() == 1:
            visible = visible.bool()
        found = None
        if visible is None or visible.dim() == 1:
            found = self._over_expressed(values, visible, by_gene, by_value, value)
        if found is None:
            found = self._over_all(values, visible, by_gene, by_value, value)
        state, seen = found  # (n, H, Q, d), (n, HQ, F)
        state = state + seen.unflatten(1, (heads, -1)) @ value_map.transpose(1, 2)
        state = state.transpose(1, 2).flatten(2) + self.queries
        state = state + self.mix(state)
        return self.out(state.flatten(1))

    def _over_expressed(
        self, values: torch.Tensor, visible: torch.Tensor | None, by_gene: torch.Tensor,
        by_value: torch.Tensor, value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
        """Attention means of the genes' values and of φ; None where digits would be lost."""
        with torch.no_grad():
            listed = Expressed.of(values, visible)
            phi = F.pad(self.tokens.fourier(listed.values), (0, 1), value=1.0)
            phi_zero = self.tokens.fourier(values.new_zeros(()))
        # Differences need the digits of the full precision, also where the rest does without.
        with torch.autocast(values.device.type, enabled=False):
            tables = (x.to(phi.dtype) for x in (by_gene, value, by_value))
            state, seen, kept = _Attention.apply(
                *tables, phi, phi_zero, listed, visible, self.n_heads
            )
        return (state, seen) if kept else None

    def _over_all(
        self, values: torch.Tensor, visible: torch.Tensor | None, by_gene: torch.Tensor,
        by_value: torch.Tensor, value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The same, gene by gene."""
        heads = self.n_heads
        phi = self.tokens.fourier(values)  # (n, G, F)
        logits = by_gene.T + by_value @ phi.transpose(1, 2)  # (n, HQ, G)
        if visible is not None:
            hidden = ~visible.bool()
            hidden = hidden if hidden.dim() == 1 else hidden.unsqueeze(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        attention = logits.softmax(-1)
        state = torch.einsum(
            "nhqg,ghd->nhqd", attention.unflatten(1, (heads, -1)), value.unflatten(1, (heads, -1))
        )
        return state, attention @ phi


class _Attention(torch.autograd.Function):
    """Means under softmax attention over all genes, and their gradients, by the expressed genes.

    With w the weight of an expressed gene, u the weight that it would have at value 0, and the sums
    over all visible genes at value 0 (tables, once per batch), the denominator is
    ``sum_all(u) + sum(w - u)``, and the numerators likewise.
    """

    @staticmethod
    def forward(
        ctx: Any, by_gene: torch.Tensor, value: torch.Tensor, by_value: torch.Tensor,
        phi: torch.Tensor, phi_zero: torch.Tensor, listed: Expressed,
        visible: torch.Tensor | None, heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:  # fmt: skip
        """Attention means.

        Parameters
        ----------
        by_gene
            Logits of the genes' own part, shape (n_genes, heads · queries).
        value
            Values of the genes' own part, shape (n_genes, heads · d).
        by_value
            Logits per feature of φ, shape (heads · queries, n_features).
        phi
            φ of the listed genes and a column of ones, shape (n_cells, n_places, n_features + 1).
        phi_zero
            φ(0), shape (n_features,).
        listed, visible, heads
            The expressed genes; the genes that count; attention heads.

        Returns
        -------
        tuple
            Mean value, shape (n_cells, heads, queries, d); mean φ, shape (n_cells, heads · queries,
            n_features); whether no digits were lost.
        """
        (n_genes, n_maps), width, n = by_gene.shape, value.shape[1], len(phi)
        at_zero = by_value @ phi_zero
        logits = phi[..., :-1] @ by_value.T  # (n, places, HQ)
        # One shift for all cells, above every logit: the weights are then rows of tables.
        shift = by_gene.amax(0) + torch.maximum(logits.flatten(0, 1).amax(0), at_zero)
        # The last row is that of no gene: it weighs nothing.
        own = F.pad(by_gene - shift, (0, 0, 0, 1), value=-1e30)
        zero = (own + at_zero).exp_()
        padded = F.pad(value, (0, 0, 0, 1))
        table = zero[:-1] if visible is None else zero[:-1] * visible.unsqueeze(1)
        total = table.sum(0)
        by_head = value.view(n_genes, heads, -1).transpose(0, 1)
        total_value = table.T.view(heads, -1, n_genes) @ by_head  # (H, Q, d)

        crossed = by_gene.new_empty(n, n_maps, width)  # every query with the values of every head
        seen, change = by_gene.new_empty(n, n_maps, phi.shape[2]), by_gene.new_empty(n, n_maps)
        saved = []
        for start in range(0, n, _CELLS):
            part = slice(start, start + _CELLS)
            index = listed.index[part]
            gene, shape = index.flatten(), (*index.shape, -1)
            w = logits[part].add_(own.index_select(0, gene).view(shape)).exp_()
            u = zero.index_select(0, gene).view(shape)
            v = padded.index_select(0, gene).view(shape)
            more = w - u
            torch.bmm(more.transpose(1, 2), v, out=crossed[part])
            torch.bmm(w.transpose(1, 2), phi[part], out=seen[part])
            torch.sum(more, 1, out=change[part])
            saved.append((w, u, v, more))
        weight = (total + change).unsqueeze(-1)  # (n, HQ, 1)
        rest = weight - seen[..., -1:]
        mean_phi = (seen[..., :-1] + rest * phi_zero) / weight
        of_head = crossed.view(n, heads, -1, heads, width // heads).diagonal(dim1=1, dim2=3)
        state = (of_head.permute(0, 3, 1, 2) + total_value) / weight.view(n, heads, -1, 1)
        # The shift is for all cells: far below the others, weights have no digits left either.
        kept = bool((total.unsqueeze(-1) <= _LOST * weight).all() & (weight > _TINY).all())
        ctx.chunks, ctx.listed = saved, listed
        ctx.save_for_backward(value, by_value, phi, phi_zero, table, state, mean_phi, weight)
        return state, mean_phi, kept

    @staticmethod
    def backward(ctx: Any, d_state: torch.Tensor, d_phi: torch.Tensor, _: Any) -> tuple:
        """Gradients of by_gene, value and by_value, in full precision as the sums are."""
        with torch.autocast(d_state.device.type, enabled=False):
            return *_Attention._gradients(ctx, d_state, d_phi), *[None] * 5

    @staticmethod
    def _gradients(
        ctx: Any, d_state: torch.Tensor, d_phi: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, by_value, phi, phi_zero, table, state, mean_phi, weight = ctx.saved_tensors
        (n, heads, queries, d), (n_genes, n_maps) = state.shape, table.shape
        inner = (d_state * state).sum(-1).view(n, n_maps, 1) + (d_phi * mean_phi).sum(-1, True)
        to_phi, to_value = d_phi / weight, d_state / weight.view(n, heads, queries, 1)
        inner = inner / weight
        zero_phi = (to_phi @ phi_zero).unsqueeze(-1) - inner  # (n, HQ, 1)
        to_phi = torch.cat([to_phi, -inner], -1)

        # All genes at value 0, then each expressed one at its value instead.
        summed = to_value.sum(0)  # (H, Q, d)
        by_head = value.view(n_genes, heads, d).transpose(0, 1)
        d_zero = (by_head @ summed.transpose(1, 2)).transpose(0, 1).reshape(n_genes, n_maps)
        d_zero = d_zero.add_(zero_phi.sum(0).T).mul_(table)
        d_value = table.view(n_genes, heads, queries).transpose(0, 1) @ summed
        d_value = d_value.transpose(0, 1).reshape(n_genes, heads * d)

        blocks = to_value.new_zeros(n, heads, queries, heads, d)
        blocks.diagonal(dim1=1, dim2=3).copy_(to_value.permute(0, 2, 3, 1))
        blocks = blocks.view(n, n_maps, heads * d)
        zero_phi = zero_phi.transpose(1, 2)
        places = phi.shape[1]
        d_own, d_listed = phi.new_empty(n, places, n_maps), phi.new_empty(n, places, heads * d)
        d_features = phi.new_zeros(n_maps, phi.shape[2])
        for start, (w, u, v, more) in zip(range(0, n, _CELLS), ctx.chunks, strict=True):
            part = slice(start, start + _CELLS)
            at_zero = v @ blocks[part].transpose(1, 2)
            at_value = torch.baddbmm(at_zero, phi[part], to_phi[part].transpose(1, 2)).mul_(w)
            d_features.addmm_(at_value.flatten(0, 1).T, phi[part].flatten(0, 1))
            at_zero.add_(zero_phi[part]).mul_(u)
            torch.sub(at_value, at_zero, out=d_own[part])
            torch.bmm(more, blocks[part], out=d_listed[part])
        d_gene = _sum_by_gene(d_own, ctx.listed)
        d_value = d_value + _sum_by_gene(d_listed, ctx.listed)
        d_at_zero = d_zero.sum(0) + d_gene.sum(0) - d_features[:, -1]
        d_by_value = d_features[:, :-1] + d_at_zero.unsqueeze(1) * phi_zero
        return d_gene + d_zero, d_value, d_by_value


def _sum_by_gene(gradient: torch.Tensor, listed: Expressed) -> torch.Tensor:
    """Sums over the places of each gene, shape (n_genes, ·)."""
    rows = gradient.flatten(0, 1)
    return F.embedding_bag(listed.order, rows, listed.starts, mode="sum")
