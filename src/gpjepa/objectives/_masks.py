from __future__ import annotations

import torch


def random_blocks(
    n_genes: int, n_blocks: int, hidden: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Disjoint random blocks of genes to hide from the context.

    Parameters
    ----------
    n_genes
        Genes to choose from.
    n_blocks
        Blocks.
    hidden
        Share of the genes that all blocks hide together.

    Returns
    -------
    torch.Tensor
        Boolean, shape (n_blocks, n_genes).
    """
    size = max(1, int(hidden * n_genes / n_blocks))
    if size * n_blocks >= n_genes:
        raise ValueError(
            f"{n_blocks} blocks that hide {hidden:.0%} of {n_genes} genes leave none visible."
        )
    order = torch.randperm(n_genes, generator=generator)[: size * n_blocks]
    blocks = torch.zeros(n_blocks, n_genes, dtype=torch.bool)
    blocks[torch.arange(n_blocks).repeat_interleave(size), order] = True
    return blocks
