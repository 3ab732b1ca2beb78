"""What stage A hides together, where it is not random genes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from gpjepa.perturbations import read_gmt

from . import _random
from ._cells import Cells

if TYPE_CHECKING:
    from ._stage_a import Ablation

MASKS = ("random", "gene_sets", "regulons", "adversarial")
GeneSets = str | Path | Sequence[str | Path] | Mapping[str, Iterable[str]]

_PROBED = 5_000  # cells that the probe behind adversarial masks learns from, at most


def masks(
    ablation: Ablation, cells: Cells, genes: np.ndarray, where: np.ndarray
) -> dict[str, torch.Tensor]:
    """What :func:`gpjepa.objectives.gene_blocks` has to know of what is hidden together.

    Parameters
    ----------
    ablation
        Which masks.
    cells, where
        The cells of training; adversarial masks learn from them which genes tell perturbations.
    genes
        Names of the genes.

    Raises
    ------
    ValueError
        If what masks need shares no gene with the data, or lacks a column.
    """
    if ablation.gene_sets is not None:
        return {"groups": _groups(_read_sets(ablation.gene_sets), genes)}
    if ablation.regulons is not None:
        table = ablation.regulons
        edges = table if isinstance(table, pd.DataFrame) else pd.read_csv(table)
        absent = {"source", "target"} - set(edges)
        if absent:
            raise ValueError(f"regulons: columns {sorted(absent)} are missing: {list(edges)}.")
        found = {str(tf): {str(tf), *part["target"]} for tf, part in edges.groupby("source")}
        return {"groups": _groups(found, genes)}
    return {"weights": _telling(cells, where)} if ablation.masks == "adversarial" else {}


def _read_sets(sets: GeneSets) -> Mapping[str, Iterable[str]]:
    if isinstance(sets, Mapping):
        return sets
    paths = [sets] if isinstance(sets, str | Path) else list(sets)
    return {f"{p}: {name}": genes for p in paths for name, genes in read_gmt(p).items()}


def _groups(sets: Mapping[str, Iterable[str]], genes: np.ndarray) -> torch.Tensor:
    """Membership of the genes, sets of fewer than two measured genes left out."""
    place = {str(g): i for i, g in enumerate(genes)}
    found = [[place[g] for g in map(str, members) if g in place] for members in sets.values()]
    found = [f for f in found if len(f) > 1]
    if not found:
        raise ValueError(
            f"None of the {len(sets)} gene sets has two of the measured genes "
            f"({', '.join(map(str, genes[:3]))}, ...): are both gene symbols, of one species?"
        )
    groups = torch.zeros(len(found), len(genes), dtype=torch.bool)
    for row, members in zip(groups, found, strict=True):
        row[members] = True
    return groups.to_sparse()


def _telling(cells: Cells, where: np.ndarray) -> torch.Tensor:
    """How much each gene tells of the perturbation: size of a linear probe's coefficients."""
    from sklearn.linear_model import RidgeClassifier

    if cells.perturbations is None:
        raise ValueError("masks='adversarial' needs perturbations to predict; the cells have none.")
    order = _random.stream("probe").permutation(len(where))[:_PROBED]
    some = np.sort(where[order])
    labels = [str(cells.perturbations[i]) for i in some]
    if len(set(labels)) < 2:
        raise ValueError(
            f"masks='adversarial' needs cells of different perturbations; all are {labels[0]!r}."
        )
    values = cells.log1p_rates(some)
    told = np.zeros_like(values)
    for measured, mine in cells.by_dataset(some):  # what was not measured tells nothing
        own = np.ix_(mine, measured)
        told[own] = values[own] - values[own].mean(0)
        told[own] /= np.maximum(values[own].std(0), 0.1)
    probe = RidgeClassifier(alpha=values.shape[1]).fit(told, labels)
    return torch.from_numpy(np.abs(np.atleast_2d(probe.coef_)).mean(0).astype(np.float32))
