"""What measured rows say of predictions when they are hidden: gates, and errors of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from gpjepa.effects import (
    ROLES,
    Additive,
    EffectAnchor,
    EffectTable,
    Gate,
    MeanEffect,
    control_halves,
    fit_gate,
    noise_corrected_error,
)
from gpjepa.nn import ResponseNetwork

from ._networks import PRIOR, Networks, in_blocks
from ._tuned import HiddenPairs, enough_pairs, tuned

METHODS = ("GP-JEPA", "anchor", "network", "additive", "mean effect")
NO_CHANGE = "no change"
_NO_ERRORS = pd.DataFrame(columns=["regime", *METHODS, NO_CHANGE])
_N_FOLDS = 5


@dataclass(frozen=True)
class Judged:
    """How well effects are predicted that were measured, and then hidden.

    Attributes
    ----------
    gates
        Gate of each regime in which there is a network.
    errors
        Noise-corrected squared errors of ``METHODS`` and of no change on the scale that was judged,
        one row for each time that a measured row was hidden, with the column ``regime``. ``network``
        is the anchor's where there is none.
    network
        The response network, trained on the pairs of the screen if there are enough of them.
    roles
        What it knows experts by.
    """

    gates: Mapping[str, Gate]
    errors: pd.DataFrame
    network: ResponseNetwork | None
    roles: tuple[str, ...] = ROLES

    def relative(self) -> pd.DataFrame:
        """Errors over that of no change, per regime and over all; NaN without a measurable effect."""
        total = self.errors.groupby("regime", sort=False).sum()
        total.loc["all"] = total.sum()
        base = total.pop(NO_CHANGE)
        return total.div(base.where(base > 0), axis=0)


def folds(anchor: EffectAnchor) -> list[np.ndarray]:
    """Masks of the rows that are hidden together: targets, combinations, contexts in turn."""
    found = [hidden for _, hidden in anchor.folds(_N_FOLDS)]
    context = np.array([c for c, _ in anchor.effects_.rows], dtype=object)
    contexts = sorted(set(context))
    if len(contexts) > 1:
        k = min(_N_FOLDS, len(contexts))
        found += [np.isin(context, contexts[i::k]) for i in range(k)]
    distinct = {hidden.tobytes(): hidden for hidden in found if not hidden.all()}
    return list(distinct.values())


class Judge:
    """Hides rows of a table in turn, fits everything anew on the others, and predicts them.

    Predictions know one half of the controls' noise and are judged by the other
    (:func:`gpjepa.effects.control_halves`); the halves are swapped from fold to fold.

    Parameters
    ----------
    anchor
        Fitted on the whole table.
    network
        The response network; None for the anchor alone.
    tunes
        Whether the network is trained on the screen, if there are enough pairs.
    seed
        Of all that is random.
    """

    def __init__(
        self, anchor: EffectAnchor, network: ResponseNetwork | None, tunes: bool, seed: int = 0
    ) -> None:
        self.anchor, self.network, self.seed = anchor, network, seed
        self.effects = anchor.effects_
        [self.on, *_] = self.effects.scales
        self.folds = folds(anchor)
        self.tunes = tunes and network is not None and enough_pairs(self.effects)

    @property
    def n_refits(self) -> int:
        """How often everything is fitted anew: where the network is trained on the screen, twice."""
        return len(self.folds) * (1 + self.tunes)

    def judge(self, progress: Callable[[], object] = lambda: None) -> Judged:
        """Gates and errors; progress is called after each refit."""
        by_fold: list[list[HiddenPairs]] = []
        if self.tunes:
            for fold in self._each_fold(progress):
                by_fold.append(list(HiddenPairs.of(fold.anchor, fold.judged_by, fold.rows)))
        pairs = [each for mine in by_fold for each in mine]
        units = {self.effects.rows[i][1].targets for each in pairs for i in each.rows}
        network, learns = self.network, enough_pairs(units)
        found: list[_Hidden] = []
        for k, fold in enumerate(self._each_fold(progress)):
            # Where it reads none of the hidden rows, any network will do.
            if learns and by_fold[k] and self.network is not None:
                network = tuned(self.network, pairs, fold.rows, self.seed)
            found += self._predicted(fold, network)
        if learns and self.network is not None:
            network = tuned(self.network, pairs, (), self.seed)
        gates = self._gates(found, network)
        errors = [each.scored(gates) for each in found]
        return Judged(
            gates, pd.concat(errors, ignore_index=True) if errors else _NO_ERRORS, network
        )

    def _each_fold(self, progress: Callable[[], object]) -> Iterator[_Fold]:
        """One at a time: of a large screen, each takes as much memory as the table."""
        halves = control_halves(self.effects, self.on, self.seed)
        for k, hidden in enumerate(self.folds):
            known, judged_by = halves[:: 1 if k % 2 else -1]
            anchor = EffectAnchor(self.anchor.features, "mean").fit(known.subset(~hidden))
            yield _Fold(anchor, judged_by, np.flatnonzero(hidden))
            progress()

    def _predicted(self, fold: _Fold, network: ResponseNetwork | None) -> Iterator[_Hidden]:
        """Predictions of rows by what is known without them."""
        anchor, table = fold.anchor, fold.judged_by
        networks = None if network is None else Networks(network, anchor, self.on, self.seed)
        simple = [each.fit(anchor.effects_) for each in (Additive(self.on), MeanEffect(self.on))]
        for some in in_blocks(fold.rows, len(table.genes)):
            asked = [table.rows[i][1] for i in some], [table.rows[i][0] for i in some]
            said = anchor.predict(*asked, self.on, own_genes=False)
            available, mean = np.zeros(len(some), bool), said.mean
            if networks is not None:
                found = networks.predict(list(zip(*asked, strict=True)), said)
                available, mean = found.available, found.mean
            effects = [said.mean, said.mean, mean, *(each.predict(*asked) for each in simple)]
            measured = table.subset(some)
            yield _Hidden(
                some,
                np.array(said.regime, dtype=object),
                available,
                pd.DataFrame(
                    {
                        name: _errors(effect, measured, self.on)
                        for name, effect in zip(
                            (*METHODS, NO_CHANGE), [*effects, 0 * mean], strict=True
                        )
                    }
                ),
                said.mean[available],
                mean[available],
                measured.subset(available),
            )

    def _gates(self, found: list[_Hidden], network: ResponseNetwork | None) -> dict[str, Gate]:
        if network is None:
            return {}
        gates, n_genes = {}, len(self.effects.genes)
        half, _ = control_halves(self.effects, self.on, self.seed)
        for regime in Networks(network, self.anchor, self.on, self.seed).regimes:
            nothing = np.zeros((0, n_genes))
            parts: list[tuple[np.ndarray, ...]] = [(np.array([], int), *[nothing] * 3)]
            parts += [each.of_network(regime) for each in found]
            rows, with_network, without, measured = map(np.concatenate, zip(*parts, strict=True))
            table = replace(half.subset(rows), effect={self.on: measured})
            gates[regime] = fit_gate(
                with_network, without, table, range(len(rows)), self.on, PRIOR[regime]
            )
        return gates


@dataclass(frozen=True)
class _Fold:
    """An anchor that knows one half of the controls and not some rows, and the table to judge by."""

    anchor: EffectAnchor
    judged_by: EffectTable
    rows: np.ndarray


@dataclass(frozen=True)
class _Hidden:
    """Some rows that were hidden, and how well they were predicted without them.

    Attributes
    ----------
    rows, regime
        Which rows of the whole table they are, and their regimes, shape (n_rows,).
    available
        For which of them there is a network, shape (n_rows,).
    errors
        Of every method; that of GP-JEPA before there are gates is the anchor's.
    anchor, network
        A and N where there is a network, shape (n_available, n_genes).
    measured
        The effects there, against the other half of the controls.
    """

    rows: np.ndarray
    regime: np.ndarray
    available: np.ndarray
    errors: pd.DataFrame
    anchor: np.ndarray
    network: np.ndarray
    measured: EffectTable

    def of_network(self, regime: str) -> tuple[np.ndarray, ...]:
        """Rows of a regime with a network: where they are, N, A and what was measured."""
        mine = self.regime[self.available] == regime
        [measured] = self.measured.effect.values()
        return (
            self.rows[self.available][mine],
            self.network[mine],
            self.anchor[mine],
            measured[mine],
        )

    def scored(self, gates: Mapping[str, Gate]) -> pd.DataFrame:
        """Errors of every method on each row."""
        errors = self.errors.copy()
        regimes = self.regime[self.available]
        gate = np.array([gates[r].gate if r in gates else 0.0 for r in regimes])[:, None]
        predicted = self.anchor + gate * (self.network - self.anchor)
        [on] = self.measured.scales
        errors.loc[self.available, METHODS[0]] = _errors(predicted, self.measured, on)
        errors.insert(0, "regime", self.regime)
        return errors


def _errors(predicted: np.ndarray, measured: EffectTable, on: str) -> np.ndarray:
    scored = ~measured.targeted(range(len(measured.rows)))
    return noise_corrected_error(predicted, measured.effect[on], measured.noise(on), scored)
