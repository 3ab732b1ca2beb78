from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

_PER_EXPERT, _PER_ROW = 4, 6  # scalars that come with an expert, and with a row
_OF_EXPERTS, _OF_GENES, _OF_ROWS = 5, 7, 5


@dataclass(frozen=True)
class ResponseInputs:
    """What the response network reads of some rows; every length is in units of the row's scale.

    Attributes
    ----------
    experts, noise
        What each expert predicts, and the standard deviation of its noise, shape
        (n_rows, n_experts, n_genes).
    roles
        What each expert is, -1 for none, shape (n_rows, n_experts).
    per_expert
        Its weight in the anchor, the weight of the controls in it, its cosine with the anchor and
        its length over the anchor's, shape (n_rows, n_experts, 4).
    per_gene
        The anchor, its standard deviation, the control profile, its standard deviation, and whether
        the perturbation targets the gene, shape (n_rows, n_genes, 5).
    per_row
        What the row is and how much is known, shape (n_rows, 6).
    """

    experts: torch.Tensor
    noise: torch.Tensor
    roles: torch.Tensor
    per_expert: torch.Tensor
    per_gene: torch.Tensor
    per_row: torch.Tensor

    def genes(self, chosen: torch.Tensor) -> ResponseInputs:
        """Of some genes only."""
        return ResponseInputs(
            self.experts[..., chosen],
            self.noise[..., chosen],
            self.roles,
            self.per_expert,
            self.per_gene[:, chosen],
            self.per_row,
        )

    def rows(self, chosen: torch.Tensor | slice) -> ResponseInputs:
        """Of some rows only."""
        return ResponseInputs(*(getattr(self, f.name)[chosen] for f in fields(self)))


class ResponseNetwork(nn.Module):
    r"""A mean effect from what the experts of a closed form say of it, the same for every gene.

    Of each gene it reads the predictions of all experts, with their noise; the genes of a row, and
    the experts, are sets, so that neither their order nor their number matters. The result is

    .. math:: A + \sum_k \gamma_{kg} (e_{kg} - A_g) + \gamma_{0g} A_g + r_g

    with the anchor *A*, the experts :math:`e_k`, weights γ that depend on gene and row, and a small
    free part *r*. At the start all of these are 0: it is the anchor.

    Parameters
    ----------
    n_roles
        What an expert can be.
    n_hidden, n_expert
        Width of what is known of a gene, and of what an expert says of it.
    """

    def __init__(self, n_roles: int, n_hidden: int = 48, n_expert: int = 16) -> None:
        super().__init__()
        self.n_roles, self.n_hidden, self.n_expert = n_roles, n_hidden, n_expert
        h = n_hidden
        self.role = nn.Embedding(n_roles, n_expert)
        self.of_expert = nn.Linear(_OF_EXPERTS + _PER_EXPERT, n_expert)
        self.of_gene = nn.Sequential(
            nn.Linear(2 * n_expert + _OF_GENES, h), nn.GELU(), nn.Linear(h, h), nn.GELU()
        )
        self.of_row = nn.Sequential(
            nn.Linear(3 * h + _OF_ROWS + _PER_ROW, h), nn.GELU(), nn.Linear(h, h), nn.GELU()
        )
        self.in_row = nn.Sequential(nn.Linear(2 * h, h), nn.GELU())
        self.weigh, self.weigh_whole = (_Weigher(n_expert, h) for _ in range(2))
        self.own = nn.Linear(h, 3)  # weight of the anchor, free part, log variance
        self.own_whole = nn.Linear(h, 2)
        for last in self._last():
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def untrained(self) -> bool:
        """Whether it is as it was at the start, where it is the anchor."""
        return not any(last.weight.any() or last.bias.any() for last in self._last())

    def _last(self) -> tuple[nn.Linear, ...]:
        return self.weigh.out, self.weigh_whole.out, self.own, self.own_whole

    def forward(self, x: ResponseInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean effects, and the log of their variance over the anchor's, shape (n_rows, n_genes)."""
        anchor, sd, level, level_sd, targeted = x.per_gene.unbind(-1)
        there = (x.roles >= 0).to(anchor)
        apart = (x.experts - anchor[:, None]) * there[..., None]
        said = self._of_experts(x, apart)
        # Sums and the largest say of a set what does not depend on its order.
        some = said.masked_fill(there[..., None, None] == 0, -1.0).amax(1)
        pooled = (said * there[..., None, None]).sum(1) / 3
        of_gene = torch.stack(
            [
                _squashed(anchor),
                _squashed(sd),
                _squashed(level),
                _squashed(level_sd),
                targeted,
                (anchor / level.clamp_min(1e-3)).clamp(-2, 4),
                (anchor / sd.clamp_min(1e-6)).clamp(-6, 6) / 2,
            ],
            -1,
        )
        genes = self.of_gene(torch.cat([pooled, some, of_gene], -1))
        row = self._of_row(x, genes, anchor)
        genes = self.in_row(torch.cat([genes, row[:, None].expand_as(genes)], -1))

        weights = 0.3 * self.weigh(said, genes[:, None])
        weights = weights + 0.5 * self.weigh_whole(said.mean(2, keepdim=True), row[:, None, None])
        own, own_whole = self.own(genes), self.own_whole(row)[:, None]
        of_anchor = 0.3 * own[..., 0] + 0.5 * own_whole[..., 0]
        mean = anchor + (weights * apart).sum(1) + of_anchor * anchor + 0.1 * own[..., 1]
        return mean, own[..., 2] + own_whole[..., 1]

    def _of_experts(self, x: ResponseInputs, apart: torch.Tensor) -> torch.Tensor:
        """Each expert on each gene, shape (n_rows, n_experts, n_genes, n_expert)."""
        noise = x.noise.clamp_min(1e-6)
        values = torch.stack(
            [
                _squashed(x.experts),
                _squashed(apart),
                _squashed(x.noise),
                (x.experts / noise).clamp(-6, 6) / 2,
                (apart / noise).clamp(-6, 6) / 2,
            ],
            -1,
        )
        weight = self.of_expert.weight
        of_values = values @ weight[:, :_OF_EXPERTS].T
        of_expert = x.per_expert @ weight[:, _OF_EXPERTS:].T + self.role(x.roles.clamp_min(0))
        return torch.relu(of_values + of_expert[:, :, None] + self.of_expert.bias)

    def _of_row(self, x: ResponseInputs, genes: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        """All genes of a row, shape (n_rows, n_hidden)."""
        size = anchor.abs() + 1e-3
        pools = [
            genes.mean(1),
            *(
                (genes * (w / w.sum(1, keepdim=True))[..., None]).sum(1)
                for w in (size, size.square())
            ),
        ]
        _, sd, level, level_sd, _ = x.per_gene.unbind(-1)
        lengths = [v.square().mean(1).sqrt() for v in (anchor, sd, level, level_sd)]
        of_row = torch.stack([*map(_squashed, lengths), anchor.abs().amax(1).log1p()], -1)
        return self.of_row(torch.cat([*pools, of_row, x.per_row], -1))


class _Weigher(nn.Module):
    """Weights of experts, from each of them and from what it is among."""

    def __init__(self, n_expert: int, n_hidden: int) -> None:
        super().__init__()
        self.expert, self.among = nn.Linear(n_expert, n_expert), nn.Linear(n_hidden, n_expert)
        self.out = nn.Linear(n_expert, 1)

    def forward(self, expert: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.expert(expert) + self.among(among)))[..., 0]


def _squashed(x: torch.Tensor) -> torch.Tensor:
    return torch.asinh(3 * x).clamp(-6, 6)
