"""Genes of a cell as tokens: what gene it is, and how much of it there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

_WORTH = 4_096  # places that more lists must save, as each has a cost of its own


class Tokenizer(nn.Module):
    r"""Token of gene *g* with value *x*: :math:`E_g + W_\varphi\varphi(x)`.

    φ are the value itself and Fourier features of it (Tancik et al. 2020).

    Parameters
    ----------
    n_genes
        Genes.
    width
        Width of the tokens.
    n_fourier
        Frequencies of the Fourier features.
    """

    by_gene: ClassVar[dict[str, int]] = {"gene": 0}
    frequencies: torch.Tensor

    def __init__(self, n_genes: int, width: int, n_fourier: int = 4) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(n_fourier) * math.pi / 8)
        self.gene = nn.Parameter(torch.randn(n_genes, width) / math.sqrt(width))
        self.expression = nn.Linear(2 * n_fourier + 1, width, bias=False)

    def fourier(self, values: torch.Tensor) -> torch.Tensor:
        """φ(x), shape (..., 2 n_fourier + 1)."""
        angle = values.unsqueeze(-1) * self.frequencies
        return torch.cat([values.unsqueeze(-1), angle.sin(), angle.cos()], -1)


@dataclass(frozen=True)
class Expressed:
    """The expressed genes of cells, as lists of equal length.

    Attributes
    ----------
    index
        Gene of each place, n_genes where there is none, shape (n_cells, n_places).
    values
        Its value, same shape.
    order, starts
        Places in the flattened lists sorted by gene, shape (n_expressed,), and where each gene
        begins among them, shape (n_genes,).
    """

    index: torch.Tensor
    values: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, expressed: torch.Tensor) -> Expressed:
        """List the values of the genes that are expressed, both of shape (n_cells, n_genes)."""
        n, n_genes = values.shape
        place = expressed.cumsum(1, dtype=torch.int32)  # half the memory of the default
        width = max(int(place[:, -1].max()), 1)
        gene, cell = expressed.t().nonzero(as_tuple=True)
        at = cell * n_genes + gene
        order = cell * width + place.take(at) - 1
        index = torch.full((n * width,), n_genes, device=values.device).scatter_(0, order, gene)
        listed = values.new_zeros(n * width).scatter_(0, order, values.take(at))
        per_gene = expressed.sum(0)
        starts = per_gene.cumsum(0) - per_gene
        return cls(index.view(n, width), listed.view(n, width), order, starts)


def expressed_alike(
    values: torch.Tensor, visible: torch.Tensor | None, most: int | None = None
) -> tuple[list[Expressed], torch.Tensor]:
    """Lists of the cells' expressed genes, cells with about as many of them in the same lists.

    Lists are as long as their longest, and depth varies from cell to cell many times over.

    Parameters
    ----------
    values
        Shape (n_cells, n_genes), 0 where a gene is not expressed.
    visible
        Mask of the genes that count, shape (n_genes,); all by default.
    most
        Cells are also kept apart where lists would have more places together.

    Returns
    -------
    tuple
        The lists, and where among the cells of all lists each cell is, shape (n_cells,).
    """
    expressed = values != 0
    if visible is not None:
        expressed = expressed & visible
    if values.device.type != "cpu":  # A GPU would wait once more to know how long the runs are.
        return [Expressed.of(values, expressed)], torch.arange(len(values), device=values.device)
    n_expressed, cells = expressed.sum(1).sort(descending=True, stable=True)
    runs = _runs(n_expressed.cpu().numpy(), most)
    if len(runs) == 1:
        return [Expressed.of(values, expressed)], torch.arange(len(cells), device=cells.device)
    lists = [Expressed.of(values[cells[run]], expressed[cells[run]]) for run in runs]
    return lists, cells.argsort()


def _runs(n_places: np.ndarray, most: int | None) -> list[slice]:
    """Runs of cells whose lists are long enough for the first; the longest come first."""
    todo, runs = [(0, len(n_places))], []
    while todo:
        start, stop = todo.pop()
        saved = np.arange(stop - start, 0, -1) * (n_places[start] - n_places[start:stop])
        cut = int(saved.argmax())
        if saved[cut] <= _WORTH:
            too_many = most is not None and (stop - start) * n_places[start] > most
            cut = (stop - start) // 2 if too_many else 0
        if cut:
            todo += [(start + cut, stop), (start, start + cut)]
        else:
            runs.append(slice(start, stop))
    return runs
