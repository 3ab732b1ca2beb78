from __future__ import annotations

import torch
from torch import nn


def _gene_axes(module: nn.Module) -> dict[str, int]:
    """Names of the tensors that have an axis of genes, and which it is."""
    return {
        f"{place}.{name}" if place else name: axis
        for place, part in module.named_modules()
        for name, axis in getattr(part, "by_gene", {}).items()
    }


def load_genes(target: nn.Module, source: nn.Module, where: torch.Tensor) -> None:
    """Take over the weights of a module of the same kind that was built for other genes.

    Parameters
    ----------
    target, source
        Modules that say in ``by_gene`` which of their tensors have an axis of genes.
    where
        Place of each of the target's genes among the source's, -1 where it has no such gene, whose
        weights then stay as they are; shape (n_genes,).
    """
    axes, theirs = _gene_axes(target), source.state_dict()
    loaded, known = {}, where >= 0
    for name, mine in target.state_dict().items():
        if name not in axes:
            loaded[name] = theirs[name]
            continue
        rows = mine.clone()
        rows.movedim(axes[name], 0)[known] = theirs[name].movedim(axes[name], 0)[where[known]]
        loaded[name] = rows
    target.load_state_dict(loaded)
