"""Learned queries that attend to all genes of a cell, at a cost that follows the expressed ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ._encoders import Encoder
from ._tokens import Expressed, Tokenizer, expressed_alike

_PLACES = 32_768  # expressed genes worked on at a time, so that they stay in the processor's cache
_LOST = 16.0  # what is subtracted may be this many times what is left
_STEEP = 60.0  # and no value may raise a logit by more, or weights leave the range of floats


class PerceiverEncoder(Encoder):
    r"""Learned queries attend to all genes, each a token of identity and expression.

    Two identities make it fast, and neither is an approximation. A token
    :math:`E_g + W_\varphi\varphi(x)` is a part of the gene alone and a part in the small space of φ,
    so that no token is formed: logits are
    :math:`q\cdot K_g + (W_\varphi^\top W_k^\top q)\cdot\varphi(x)`, and a mean value is the mean of
    the genes' own values and the map of the mean φ. And all genes with value 0 share φ(0), so that
    their sum is that over all genes less that over the expressed ones: a cell costs what its
    expressed genes cost (Jaegle et al. 2021 for the Perceiver).

    A difference loses digits where the expressed genes held most of the sum, or where values raise
    logits by a lot; there, where cells see different genes, and on a GPU, which would wait for the
    lists, all genes are summed one by one.
    Gradients reach the parameters, not the values.

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
        self,
        n_genes: int,
        n_latent: int,
        n_queries: int = 16,
        n_heads: int = 4,
        width: int = 128,
        n_fourier: int = 4,
    ) -> None:
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
        heads, width, values = self.n_heads, self.queries.shape[1], values.detach()
        to_key, to_value = (
            x.weight.unflatten(0, (heads, -1)) for x in (self.to_key, self.to_value)
        )  # (H, d, width)
        query = self.to_query(self.queries).unflatten(1, (heads, -1)).transpose(0, 1)
        # Keys are only met by queries, so the queries go through the map of the keys instead.
        query = query @ to_key * math.sqrt(heads / width)  # (H, Q, width)
        by_gene, value = (
            F.linear(self.tokens.gene, x.flatten(0, 1)).unflatten(1, (heads, -1)).transpose(0, 1)
            for x in (query, to_value)
        )  # (H, G, Q), (H, G, d)
        by_phi = query @ self.tokens.expression.weight  # (H, Q, F)

        visible = None if visible is None else visible.bool()
        means = None
        # Loops over few genes pay where there are few processors.
        if values.device.type == "cpu" and (visible is None or visible.dim() == 1):
            means = self._over_expressed(values, visible, by_gene, value, by_phi)
        if means is None:
            means = self._over_all(values, visible, by_gene, value, by_phi)
        own, phi = means  # (H, n, Q, d), (H, n, Q, F)
        of_phi = (to_value @ self.tokens.expression.weight).transpose(1, 2)
        mean = torch.baddbmm(own.flatten(1, 2), phi.flatten(1, 2), of_phi)
        state = mean.view_as(own).permute(1, 2, 0, 3).flatten(2) + self.queries
        state = state + self.mix(state)
        return self.out(state.flatten(1))

    def _over_expressed(
        self, values: torch.Tensor, visible: torch.Tensor | None, *tables: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Means of the genes' values and of φ under attention; None where digits would be lost."""
        with torch.no_grad():
            lists, where = expressed_alike(values, visible, _PLACES)
            phi_zero = self.tokens.fourier(values.new_zeros(()))
            phi = [self.tokens.fourier(listed.values) - phi_zero for listed in lists]
        # Differences need the digits of the full precision, also where the rest does without.
        with torch.autocast(values.device.type, enabled=False):
            tables = tuple(x.to(phi_zero.dtype) for x in tables)
            own, change, kept = _Attention.apply(*tables, phi, lists, visible)
        if not kept:
            return None
        if len(lists) > 1:
            own, change = (x.index_select(1, where) for x in (own, change))
        return own, phi_zero + change

    def _over_all(
        self,
        values: torch.Tensor,
        visible: torch.Tensor | None,
        by_gene: torch.Tensor,
        value: torch.Tensor,
        by_phi: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, gene by gene."""
        phi = self.tokens.fourier(values)  # (n, G, F)
        logits = (by_phi.flatten(0, 1) @ phi.transpose(1, 2)).unflatten(1, by_phi.shape[:2])
        logits = logits + by_gene.transpose(1, 2)  # (n, H, Q, G)
        if visible is not None:
            hidden = ~visible if visible.dim() == 1 else ~visible[:, None, None]
            logits = logits.masked_fill(hidden, -torch.inf)
        attention = logits.softmax(-1)
        by_head = attention.transpose(0, 1)
        own = (by_head.flatten(1, 2) @ value).unflatten(1, by_head.shape[1:3])
        mean_phi = (attention.flatten(1, 2) @ phi).unflatten(1, by_phi.shape[:2])
        return own, mean_phi.transpose(0, 1)


class _Attention(torch.autograd.Function):
    """Means under softmax attention over all genes, and their gradients, by the expressed genes.

    With w the weight of an expressed gene, u the weight that it would have at value 0, and the sums
    over all visible genes at value 0 (tables, once per batch), the denominator is
    ``sum_all(u) + sum(w - u)``, and the numerators likewise. One head after the other, as what one
    needs is small enough for the cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        by_gene: torch.Tensor,
        value: torch.Tensor,
        by_phi: torch.Tensor,
        phi: list[torch.Tensor],
        lists: list[Expressed],
        visible: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Attention means.

        Parameters
        ----------
        by_gene
            Logits of genes with value 0, shape (n_heads, n_genes, n_queries); what all genes have
            in common may be left out.
        value
            Values of the genes, shape (n_heads, n_genes, width of a head).
        by_phi
            Logits per feature of φ, shape (n_heads, n_queries, n_features).
        phi
            φ of the listed genes less φ(0), shapes (n_cells, n_places, n_features).
        lists, visible
            The expressed genes; the genes that count.

        Returns
        -------
        tuple
            Mean of the genes' values, shape (n_heads, n_cells, n_queries, width of a head); mean φ
            less φ(0), shape (n_heads, n_cells, n_queries, n_features); whether no digits were lost.
        """
        # Above the logits of all visible genes with value 0, so that one of them weighs 1.
        top = by_gene if visible is None else by_gene.masked_fill(~visible.unsqueeze(1), -torch.inf)
        zero = (by_gene - top.amax(1, True)).clamp_max_(0).exp_()  # exp(-inf) is slow
        if visible is not None:
            zero *= visible.unsqueeze(1)
        # The last row is that of no gene: it weighs nothing.
        zero, value = (F.pad(x, (0, 0, 0, 1)) for x in (zero, value))
        total, total_value = zero.sum(1), zero.transpose(1, 2) @ value

        sizes, saved, logits = [len(x) for x in phi], [], []
        mean_value = total_value.unsqueeze(1).repeat(1, sum(sizes), 1, 1)
        mean_phi = by_phi.new_empty(*mean_value.shape[:3], by_phi.shape[-1])
        weight = total.unsqueeze(1).repeat(1, sum(sizes), 1)
        # Written over and over, as memory that was not used before is slow.
        for_own, for_u = _rooms(lists, value, zero)
        for head in range(len(value)):
            sums = (x[head].split(sizes) for x in (weight, mean_phi, mean_value))
            each = zip(phi, lists, *sums, strict=True)
            for features, listed, its_weight, its_phi, its_value in each:
                u = _rows(zero[head], listed.index, for_u)
                w = features @ by_phi[head].T
                logits.append(w.amax())
                w.exp_().mul_(u)
                torch.bmm(w.transpose(1, 2), features, out=its_phi)
                more = torch.sub(w, u, out=u)
                its_weight += more.sum(1)
                own = _rows(value[head], listed.index, for_own)
                its_value.baddbmm_(more.transpose(1, 2), own)
                if any(ctx.needs_input_grad):
                    saved.append(w)
        kept = (total.unsqueeze(1) <= _LOST * weight).all() & weight.isfinite().all()
        kept &= torch.stack(logits).amax() <= _STEEP
        weight = weight.unsqueeze(-1)
        mean_value /= weight
        mean_phi /= weight
        ctx.phi, ctx.lists = phi, lists
        ctx.save_for_backward(value, zero, mean_value, mean_phi, weight, *saved)
        return mean_value, mean_phi, bool(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_value: torch.Tensor, d_phi: torch.Tensor, _: Any) -> tuple:
        """Gradients of by_gene, value and by_phi, in full precision as the sums are."""
        with torch.autocast(d_value.device.type, enabled=False):
            return *_Attention._gradients(ctx, d_value, d_phi), *[None] * 3

    @staticmethod
    def _gradients(
        ctx: Any, d_value: torch.Tensor, d_phi: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, zero, mean_value, mean_phi, weight, *rest = ctx.saved_tensors
        inner = ((d_value * mean_value).sum(-1, True) + (d_phi * mean_phi).sum(-1, True)) / weight
        to_value, to_phi = d_value / weight, d_phi / weight
        inner = inner.transpose(2, 3)  # (H, n, 1, Q)

        # All genes at value 0, then each expressed one at its value instead.
        summed = to_value.sum(1)  # (H, Q, d)
        d_by_gene = (value @ summed.transpose(1, 2) - inner.sum(1)).mul_(zero)[:, :-1]
        d_own = (zero @ summed)[:, :-1]
        d_by_phi = mean_phi.new_zeros(*zero.shape[::2], mean_phi.shape[-1])
        saved = iter(rest)
        for_u, at_zero, at_value, of_value = _rooms(ctx.lists, zero, zero, zero, value)
        sizes = [len(x) for x in ctx.phi]
        for head in range(len(value)):
            given = (x[head].split(sizes) for x in (to_value, to_phi, inner))
            each = zip(ctx.phi, ctx.lists, *given, strict=True)
            for features, listed, to, its_phi, its_inner in each:
                w, u = next(saved), _rows(zero[head], listed.index, for_u)
                zeros, values = (_shaped(x, listed.index) for x in (at_zero, at_value))
                own = _rows(value[head], listed.index, of_value)
                torch.bmm(own, to.transpose(1, 2), out=zeros).sub_(its_inner)
                torch.baddbmm(zeros, features, its_phi.transpose(1, 2), out=values)
                values *= w
                d_by_phi[head] += torch.bmm(values.transpose(1, 2), features).sum(0)
                values.addcmul_(zeros, u, value=-1)
                torch.bmm(torch.sub(w, u, out=zeros), to, out=own)
                d_by_gene[head] += _sum_by_gene(values, listed)
                d_own[head] += _sum_by_gene(own, listed)
        return d_by_gene, d_own, d_by_phi


def _rooms(lists: list[Expressed], *tables: torch.Tensor) -> list[torch.Tensor]:
    """Memory for a row of each table at every place of any of the lists."""
    most = max(listed.index.numel() for listed in lists)
    return [x.new_empty(most, x.shape[-1]) for x in tables]


def _shaped(room: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """So much of the room as is needed, shape (*index.shape, n_columns)."""
    return room[: index.numel()].view(*index.shape, -1)


def _rows(table: torch.Tensor, index: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Rows of a table, shape (*index.shape, n_columns)."""
    torch.index_select(table, 0, index.flatten(), out=room[: index.numel()])
    return _shaped(room, index)


def _sum_by_gene(gradient: torch.Tensor, listed: Expressed) -> torch.Tensor:
    """Sums over the places of each gene, shape (n_genes, ·)."""
    rows = gradient.flatten(0, 1)
    return F.embedding_bag(listed.order, rows, listed.starts, mode="sum")
