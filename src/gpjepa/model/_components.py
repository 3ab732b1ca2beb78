"""Components of cells in closed form, from which states start."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from gpjepa.nn import ComponentEncoder

from . import _random
from ._cells import Cells
from ._moments import CHUNK

_N_NUMBERS = 20_000_000  # cells times genes that are looked at


def fit_components(cells: Cells, where: np.ndarray, encoder: ComponentEncoder) -> None:
    """Fit an encoder to some of the cells, or to as many of those as are enough."""
    rng = _random.stream("components")
    n = min(len(where), _N_NUMBERS // cells.counts.shape[1])
    some = cells.take(where[rng.permutation(len(where))[:n]])
    x = torch.zeros(some.counts.shape, device=encoder.center.device)
    for part, seen in _chunks(some, encoder):
        x[part] = seen
    encoder.fit(x, partial(_halves, some, encoder, rng))


def _chunks(cells: Cells, encoder: ComponentEncoder) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """What an encoder sees of cells, a few of one data set at a time; unmeasured genes are 0."""
    for genes, mine in cells.by_dataset(np.arange(len(cells))):
        visible = torch.from_numpy(genes).to(encoder.center.device)
        for start in range(0, len(mine), CHUNK):
            part = mine[start : start + CHUNK]
            values = cells.tensors(part)["values"].to(visible.device)
            yield part, encoder.standardise(values, visible)


def _halves(
    cells: Cells, encoder: ComponentEncoder, rng: np.random.Generator, axes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both halves of the cells' counts on axes, centred in each data set."""
    first, second = (torch.zeros(len(cells), axes.shape[1], device=axes.device) for _ in range(2))
    for x, half in zip((first, second), cells.halves(rng), strict=True):
        for part, seen in _chunks(half, encoder):
            x[part] = seen @ axes
        for _, mine in cells.by_dataset(np.arange(len(cells))):
            x[mine] -= x[mine].mean(0)
    return first, second
