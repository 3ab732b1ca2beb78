"""Components of cells in closed form, from which states start."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from gpjepa.nn import ComponentEncoder

from . import _random
from ._cells import Cells
from ._moments import CHUNK

_N_NUMBERS = 20_000_000  # cells times genes that are looked at
_N_JUDGES = 5_000  # cells by which components are judged, at most


def fit_components(cells: Cells, where: np.ndarray, encoder: ComponentEncoder) -> None:
    """Fit an encoder to some of the cells, or to as many of those as are enough."""
    rng = _random.stream("components")
    n = min(len(where), _N_NUMBERS // cells.counts.shape[1])
    some = cells.take(where[rng.permutation(len(where))[:n]])
    x = torch.zeros(some.counts.shape, device=encoder.center.device)
    for part, seen in _chunks(some, encoder):
        x[part] = seen
    encoder.fit(x, partial(_halves, some, encoder, rng))


def worth_keeping(cells: Cells, where: np.ndarray, encoder: ComponentEncoder) -> bool:
    """Whether components say at least as much of these cells as those fitted to them would.

    They are judged on half of the cells, and the others fitted to the other half.
    """
    if len(where) < 2 * encoder.axes.shape[1]:
        return True  # too few to fit any to
    order = where[_random.stream("worth").permutation(len(where))]
    mine, test = order[: len(order) // 2], cells.take(order[len(order) // 2 :][:_N_JUDGES])
    fitted = copy.deepcopy(encoder)
    fit_components(cells, mine, fitted)
    kept, other = (_information(test, x) for x in (encoder, fitted))
    return not other > kept  # also where they are NaN


def _information(cells: Cells, encoder: ComponentEncoder) -> float:
    r"""Nats that states say of cells, by what half of the counts says otherwise than the other.

    With :math:`a, b` the states of both halves, each the signal and noise of its own, it is
    :math:`\tfrac12\log\det\operatorname{cov}(a + b) - \tfrac12\log\det\operatorname{cov}(a - b)`:
    the capacity of a Gaussian channel.
    """
    halves = _halves(cells, encoder, _random.stream("information"), encoder.axes)
    # Apple's GPUs know no double precision.
    a, b = (x.cpu().double() / float(encoder.axes.norm()) for x in halves)
    ridge = 1e-8 * torch.eye(a.shape[1])  # well above what rounding leaves
    both, apart = (torch.logdet(x.T @ x / len(x) + ridge) for x in (a + b, a - b))
    return float(both - apart) / 2


def _chunks(cells: Cells, encoder: ComponentEncoder) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """What an encoder sees of cells, a few of one data set at a time; unmeasured genes are 0."""
    for genes, mine in cells.by_dataset(np.arange(len(cells))):
        visible = torch.from_numpy(genes).to(encoder.center.device)
        for start in range(0, len(mine), CHUNK):
            part = mine[start : start + CHUNK]
            values = torch.from_numpy(cells.log1p_rates(part)).to(visible.device)
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
