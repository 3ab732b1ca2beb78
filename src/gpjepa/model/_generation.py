"""Cells from mean effects: control cells with other rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import scipy.sparse as sp

from gpjepa.effects import PER, library_shift
from gpjepa.perturbations import Perturbation

from . import _random
from ._cells import Cells
from ._results import PredictedCells, PredictedEffect
from ._states import States

_AT_A_TIME = 4_000_000  # cells times genes held dense
_KEPT = 20_000_000  # the same, of all contexts together


@dataclass(frozen=True)
class _Rates:
    """What is known of the rates of some control cells, both of shape (n_cells, n_genes).

    A negative binomial is a Poisson whose rate is a gamma variable with shape θ and rate θ/μ; given
    the cell's own count k it is again gamma, with shape θ + k and rate θ/μ + 1. Genes that the data
    lack have no k, and keep the first.

    Attributes
    ----------
    own, shape
        Mean rate per 10,000 by the state and the cell's own counts, and shape of the gamma variable.
    """

    own: np.ndarray
    shape: np.ndarray


class ControlCells:
    """Control cells of one context, from which predictions start.

    Parameters
    ----------
    states
        Encoder and decoder, in double precision.
    cells
        The cells, in the order of their names.
    draws
        Which draw each of them stands for.
    rate
        Mean rate per 10,000 of the control in training, shape (n_genes,).
    n_contexts
        Contexts that are predicted, each of which keeps its rates.
    """

    def __init__(
        self, states: States, cells: Cells, draws: np.ndarray, rate: np.ndarray, n_contexts: int = 1
    ) -> None:
        self.states, self.cells, self.draws = states, cells, draws
        self.state = states.encode(cells)
        size = max(1, min(_AT_A_TIME, _KEPT // n_contexts) // cells.counts.shape[1])
        self.parts = [slice(i, min(i + size, len(cells))) for i in range(0, len(cells), size)]
        total = sum(self._share(part).sum(0) for part in self.parts)
        # The decoder's mean over the cells is put right before a cell's own counts are weighed in.
        self._correction = np.maximum(rate / PER, 1e-9) / (total / len(cells))
        self.rates = lru_cache(maxsize=1)(self._rates_of)

    @cached_property
    def mean_rate(self) -> np.ndarray:
        """Mean of the cells' own rates, shape (n_genes,)."""
        total = sum(self.rates(part.start, part.stop).own.sum(0) for part in self.parts)
        return total / len(self.cells)

    def _share(self, part: slice) -> np.ndarray:
        share = self.states.decode(self.state[part], self.cells.batch[part]).astype(float)
        return np.maximum(share, 1e-12)

    def _rates_of(self, start: int, stop: int) -> _Rates:
        part = slice(start, stop)
        share, library = self._share(part), self.cells.library[part, None]
        theta = self.states.dispersion
        shape = theta + self.cells.counts[part].toarray()
        rate = shape / (theta / (share * self._correction * library) + self.cells.visible)
        return _Rates(rate * (PER / library), shape)


class Generation:
    """Cells of perturbations.

    Each predicted cell is a control cell with other rates: what its own counts say of its rates
    beyond its state is kept, all rates of a gene are multiplied so that their mean is the predicted
    one, and counts are drawn anew.

    Parameters
    ----------
    library_shifts
        How perturbations change the mean log library size.
    seed
        Seed of the draws.
    return_mean
        Give expected counts instead of sampled ones.
    """

    def __init__(
        self, library_shifts: Mapping[Perturbation, float], seed: int, return_mean: bool
    ) -> None:
        self.library_shifts, self.seed, self.return_mean = library_shifts, seed, return_mean

    def cells(self, effect: PredictedEffect, control: ControlCells) -> Iterator[PredictedCells]:
        """The predicted cells of one perturbation, a part of the control cells at a time."""
        scale = effect.target_rate / np.maximum(control.mean_rate, 1e-12)
        moved = control.states.moved(control.state, effect.effect["mean_log1p"])
        for part in control.parts:
            rates = control.rates(part.start, part.stop)
            yield self._drawn(effect, control, part, rates.own * scale, moved[part])

    def _drawn(
        self,
        effect: PredictedEffect,
        control: ControlCells,
        part: slice,
        expected: np.ndarray,
        moved: np.ndarray,
    ) -> PredictedCells:
        cells, draws = control.cells, control.draws[part]
        names, perturbation = cells.names[part], effect.perturbation
        library = cells.library[part] * np.exp(library_shift(self.library_shifts, perturbation))
        counts = expected * (library / PER)[:, None]
        if not self.return_mean:
            shape = control.rates(part.start, part.stop).shape
            counts = _random.gamma_poisson(
                shape, counts / shape, names, draws, self.seed, str(perturbation)
            )
        labels = cells.labels if perturbation.is_control else None
        return PredictedCells(
            effect,
            sp.csr_matrix(counts, dtype=np.float32),
            expected,
            moved.astype(np.float32),
            library,
            names,
            draws,
            None if labels is None else labels[part],
        )
