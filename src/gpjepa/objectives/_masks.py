from __future__ import annotations

import torch


def gene_blocks(
    n_genes: int,
    n_blocks: int = 4,
    hidden: float = 0.5,
    *,
    overlap: float = 0.0,
    size_spread: float = 0.0,
    groups: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    """Blocks of genes to hide from the context, drawn anew at every call.

    Genes are put into an order and cut into blocks: a random one, or group by group, or with the
    heavier genes more often first.

    Parameters
    ----------
    n_genes
        Genes to choose from.
    n_blocks
        Blocks.
    hidden
        Share of the genes that can be hidden which all blocks hide together. Were it one of all
        genes, few weights above 0 would always hide the same ones, and leave nothing to see.
    overlap
        Share of its own size that a block takes over from the next one.
    size_spread
        Standard deviation of the logarithm of the blocks' sizes; 0 for equal ones.
    groups
        Gene sets or regulons, boolean, shape (n_groups, n_genes), better sparse: a block is made of
        whole groups, as far as its size allows, and a gene in no group is never hidden.
    weights
        How readily each gene is hidden, shape (n_genes,).
    among
        The genes that there are to hide or to see, boolean, shape (n_genes,); all by default.

    Returns
    -------
    torch.Tensor
        Boolean, shape (n_blocks, n_genes), on the device of ``among``, ``groups`` or ``weights``.

    Raises
    ------
    ValueError
        If no gene is left visible, there are fewer genes to hide than blocks, or a number makes no
        sense, such as an overlap of a single block.
    """
    _check(n_blocks, hidden, overlap, size_spread)
    on = next((x.device for x in (among, groups, weights) if x is not None), None)
    order = _order(n_genes, groups, weights, on)
    if among is not None:
        order = order[among[order]]
    n_hidden = int(hidden * len(order))
    if n_hidden >= len(order) or n_hidden < n_blocks:
        raise ValueError(
            f"{n_blocks} blocks that hide {hidden:.0%} of the {len(order)} genes that can be hidden: "
            "every block needs a gene, and one must stay visible."
        )
    size = (size_spread * torch.randn(n_blocks)).exp()
    # Every block has one gene; the rest is shared out by size.
    cuts = (size.cumsum(0) / size.sum() * (n_hidden - n_blocks)).round().long()
    ends = [int(c) + k + 1 for k, c in enumerate(cuts)]
    slices = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    blocks = torch.zeros(n_blocks, n_genes, dtype=torch.bool, device=on)
    for k, own in enumerate(slices):
        blocks[k, own] = True
        blocks[k, slices[(k + 1) % n_blocks][: int(overlap * len(own))]] = True
    return blocks


def _check(n_blocks: int, hidden: float, overlap: float, size_spread: float) -> None:
    if n_blocks < 1 or not 0 < hidden < 1 or not 0 <= overlap <= 1 or size_spread < 0:
        raise ValueError(
            f"n_blocks={n_blocks}, hidden={hidden}, overlap={overlap}, size_spread={size_spread}: "
            "expected at least one block, a share of hidden genes between 0 and 1 (one must stay "
            "visible), an overlap from 0 to 1, and a spread from 0."
        )
    if n_blocks == 1 and (overlap or size_spread):
        raise ValueError(
            f"overlap={overlap}, size_spread={size_spread}: a single block has no other to differ "
            "from. Give n_blocks of 2 or more."
        )


def _order(
    n_genes: int,
    groups: torch.Tensor | None,
    weights: torch.Tensor | None,
    on: torch.device | None,
) -> torch.Tensor:
    """Genes that may be hidden, in the order in which they are."""
    if groups is not None:
        place = torch.randperm(len(groups), device=on)
        # As a list of members: a table is slow to go through for every mini-batch.
        members = groups if groups.is_sparse else groups.to_sparse()
        group, gene = members.coalesce().indices()
        first = torch.full((n_genes,), len(groups), device=on)
        first = first.scatter_reduce_(0, gene, place[group], "amin")
        order = (first + torch.rand(n_genes, device=on)).argsort()
        return order[: int((first < len(groups)).sum())]
    if weights is not None:
        # The largest of log-weights with Gumbel noise are a draw without replacement.
        noise = -torch.log(-torch.log(torch.rand(n_genes, device=on)))
        order = (weights.clamp_min(1e-12).log() + noise).argsort(descending=True)
        return order[: int((weights > 0).sum())]
    return torch.randperm(n_genes, device=on)
