"""What measured rows say of predictions when they are hidden: gates, and errors of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from gpjepa.effects import (
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

from ._networks import PRIOR, Networks
from ._tuned import HiddenPairs, tuned

METHODS = ("GP-JEPA", "anchor", "network", "additive", "mean effect")
NO_CHANGE = "no change"
_NO_ERRORS = pd.DataFrame(columns=["regime", *METHODS, NO_CHANGE])
_N_FOLDS = 5
_BLOCK = 2_000_000  # rows times genes predicted at a time


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
    """

    gates: Mapping[str, Gate]
    errors: pd.DataFrame
    network: ResponseNetwork | None

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


def judge(
    anchor: EffectAnchor,
    network: ResponseNetwork | None,
    tunes: bool,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Judged:
    """Hide rows of the table in turn, fit everything anew on the others, and predict them.

    Where the network is trained on the screen (``tunes``), it is so without the rows that it predicts.

    Predictions know one half of the controls' noise and are judged by the other
    (:func:`gpjepa.effects.control_halves`); the halves are swapped from fold to fold.
    """
    effects = anchor.effects_
    [on, *_] = effects.scales
    halves = control_halves(effects, on, seed)
    found: list[_Hidden] = []
    each_fold = [
        _Fold(anchor, hidden, *halves[:: 1 if fold % 2 else -1])
        for fold, hidden in enumerate(folds(anchor))
    ]
    pairs = [HiddenPairs.of(f.anchor, f.judged_by, f.rows) for f in each_fold if tunes]
    for fold in each_fold:
        mine = network
        if network is not None and tunes:
            mine = tuned(network, [p.without(fold.rows) for p in pairs], seed)
        found += _predicted(fold, mine, seed)
        progress()
    if network is not None and tunes:
        network = tuned(network, pairs, seed)
    gates = {}
    possible = Networks(network, anchor, on, seed).regimes if network is not None else []
    for regime in possible:
        nothing = np.zeros((0, len(effects.genes)))
        parts: list[tuple[np.ndarray, ...]] = [(np.array([], int), *[nothing] * 3)]
        parts += [each.of_network(regime) for each in found]
        rows, with_network, without, measured = map(np.concatenate, zip(*parts, strict=True))
        table = replace(halves[0].subset(rows), effect={on: measured})
        gates[regime] = fit_gate(with_network, without, table, range(len(rows)), on, PRIOR[regime])
    errors = [each.errors(gates) for each in found]
    return Judged(gates, pd.concat(errors, ignore_index=True) if errors else _NO_ERRORS, network)


class _Fold:
    """What is known while some rows are hidden.

    Parameters
    ----------
    anchor
        That of the whole table.
    hidden
        Mask of the hidden rows.
    known, judged_by
        The table with either half of the controls.
    """

    def __init__(
        self, anchor: EffectAnchor, hidden: np.ndarray, known: EffectTable, judged_by: EffectTable
    ) -> None:
        self.anchor = EffectAnchor(anchor.features, "mean").fit(known.subset(~hidden))
        self.judged_by, self.rows = judged_by, np.flatnonzero(hidden)


@dataclass(frozen=True)
class _Hidden:
    """Some rows that were hidden, and their effects as predicted without them.

    Attributes
    ----------
    table
        Their effects as measured, against the other half of the controls.
    rows
        Which rows of the whole table they are.
    regime
        Their regimes.
    available
        For which of them there is a network.
    effects
        Effects by method; ``network`` only where it is available.
    """

    table: EffectTable
    rows: np.ndarray
    regime: np.ndarray
    available: np.ndarray
    anchor: np.ndarray
    network: np.ndarray
    simple: Mapping[str, np.ndarray]

    def of_network(self, regime: str) -> tuple[np.ndarray, ...]:
        """Rows of a regime with a network: where they are, N, A and what was measured."""
        mine = self.available & (self.regime == regime)
        measured = self.table.effect[self.table.scales[0]]
        return (
            self.rows[mine],
            self.network[mine[self.available]],
            self.anchor[mine],
            measured[mine],
        )

    def errors(self, gates: Mapping[str, Gate]) -> pd.DataFrame:
        """Errors of every method on each row."""
        network, predicted = self.anchor.copy(), self.anchor.copy()
        network[self.available] = self.network
        gate = np.array([gates[r].gate if r in gates else 0.0 for r in self.regime])[:, None]
        predicted += gate * (network - predicted)
        nothing = np.zeros_like(predicted)
        effects = (predicted, self.anchor, network, *self.simple.values(), nothing)
        [on] = self.table.scales
        measured = self.table.effect[on], self.table.noise(on)
        scored = ~self.table.targeted(range(len(self.rows)))
        errors = {
            name: noise_corrected_error(effect, *measured, scored)
            for name, effect in zip((*METHODS, NO_CHANGE), effects, strict=True)
        }
        return pd.DataFrame({"regime": self.regime, **errors})


def _predicted(fold: _Fold, network: ResponseNetwork | None, seed: int) -> Iterator[_Hidden]:
    """Predictions of rows by what is known without them."""
    anchor, judged_by, rows = fold.anchor, fold.judged_by, fold.rows
    [on] = judged_by.scales
    networks = None if network is None else Networks(network, anchor, on, seed)
    simple = {"additive": Additive(on), "mean effect": MeanEffect(on)}
    simple = {name: method.fit(anchor.effects_) for name, method in simple.items()}
    at_a_time = max(1, _BLOCK // len(judged_by.genes))
    for start in range(0, len(rows), at_a_time):
        some = rows[start : start + at_a_time]
        asked = [judged_by.rows[i][1] for i in some], [judged_by.rows[i][0] for i in some]
        said = anchor.predict(*asked, on)
        available, mean = np.zeros(len(some), bool), said.mean
        if networks is not None:
            found = networks.predict(list(zip(*asked, strict=True)), said)
            available, mean = found.available, found.mean
        yield _Hidden(
            judged_by.subset(some),
            some,
            np.array(said.regime, dtype=object),
            available,
            said.mean,
            mean[available],
            {name: method.predict(*asked) for name, method in simple.items()},
        )
