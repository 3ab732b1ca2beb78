"""Cells from mean effects: control cells with other rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.sparse as sp

from gpjepa.effects import PER, library_shift

from . import _random
from ._cells import Cells
from ._response import MeanEffects
from ._results import PredictedCells, PredictedEffect
from ._states import States

_AT_A_TIME = 4_000_000  # cells times genes held dense
_KEPT = 20_000_000  # the same, of all contexts together


@dataclass(frozen=True)
class _Rates:
    """What is known of the rates of some control cells, all of shape (n_cells, n_genes).

    A negative binomial is a Poisson whose rate is a gamma variable with shape θ and rate θ/μ; given
    the cell's own count k it is again gamma, with shape θ + k and rate θ/μ + 1. Genes that the data
    lack have no k, and keep the first.

    Attributes
    ----------
    share
        Share of each gene in the counts, decoded from the state.
    own, shape
        Mean rate per 10,000 by the state and the cell's own counts, and shape of the gamma variable.
    """

    share: np.ndarray
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

    def _share(self, part: slice) -> np.ndarray:
        share = self.states.decode(self.state[part], self.cells.batch[part]).astype(float)
        return np.maximum(share, 1e-12)

    def _rates_of(self, start: int, stop: int) -> _Rates:
        part = slice(start, stop)
        share, library = self._share(part), self.cells.library[part, None]
        theta = self.states.dispersion
        shape = theta + self.cells.counts[part].toarray()
        rate = shape / (theta / (share * self._correction * library) + self.cells.visible)
        return _Rates(share, rate * (PER / library), shape)


class Generation:
    """Cells of perturbations.

    Each predicted cell is a control cell with other rates: what its own counts say of its rates
    beyond its state is kept, the network's response of its state and the mean effect are added, and
    counts are drawn anew.

    Parameters
    ----------
    effects
        Mean effects, of which the network moves states.
    seed
        Seed of the draws.
    return_mean
        Give expected counts instead of sampled ones.
    """

    def __init__(self, effects: MeanEffects, seed: int, return_mean: bool) -> None:
        self.effects, self.seed, self.return_mean = effects, seed, return_mean

    def cells(self, effect: PredictedEffect, control: ControlCells) -> Iterator[PredictedCells]:
        """The predicted cells of one perturbation, a part of the control cells at a time."""
        parts = control.parts
        moved = self._moved(effect, control)
        each = (self._expected(effect, control, part, moved) for part in parts)
        if len(parts) == 1:
            (only,) = each
            total, again = only.sum(0), iter([only])
        else:
            total = sum(x.sum(0) for x in each)
            again = (self._expected(effect, control, part, moved) for part in parts)
        scale = effect.target_rate / np.maximum(total / len(control.cells), 1e-12)
        for part, expected in zip(parts, again, strict=True):
            expected *= scale
            yield self._drawn(effect, control, part, expected, moved[part])

    def _moved(self, effect: PredictedEffect, control: ControlCells) -> np.ndarray:
        noise = None
        if effect.gate:
            noise = _random.normal(
                control.cells.names, control.draws, control.state.shape[1], *self._stream(effect)
            )
        return self.effects.network.moved(
            control.state, effect.perturbation, effect.anchor["mean_log1p"], effect.gate, noise
        )

    def _stream(self, effect: PredictedEffect) -> tuple[int, str]:
        return self.seed, str(effect.perturbation)

    def _expected(
        self, effect: PredictedEffect, control: ControlCells, part: slice, moved: np.ndarray
    ) -> np.ndarray:
        """Rates per 10,000 before they are given the predicted mean."""
        rates = control.rates(part.start, part.stop)
        if not effect.gate:
            return rates.own.copy()  # without the network, cells keep their own rates
        share = self.effects.network.states.decode(moved[part], control.cells.batch[part])
        return rates.own * (share / rates.share)

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
        shifts = self.effects.network.library_shifts
        library = cells.library[part] * np.exp(library_shift(shifts, perturbation))
        counts = expected * (library / PER)[:, None]
        if not self.return_mean:
            shape = control.rates(part.start, part.stop).shape
            counts = _random.gamma_poisson(
                shape, counts / shape, names, draws, *self._stream(effect)
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
