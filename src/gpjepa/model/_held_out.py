"""How well held-out perturbations were predicted, and what that means: `GPJEPA.summary`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

REGIMES = {
    "seen2": "combinations of targets that were all measured alone",
    "seen1": "combinations of which some targets were measured alone",
    "seen0": "combinations of which no target was measured alone",
    "unseen": "targets never perturbed",
    "in combinations": "targets perturbed in combinations only",
    "new dose": "new doses of measured targets",
    "new context": "contexts in which a perturbation was not measured",
    "seen": "measured perturbations",
}
"""The regimes of predictions, in words."""
_VERDICTS = (
    "predicted well", "predicted in part", "no better than predicting no change",
    "no measurable effect",
)  # fmt: skip
METHODS = ("GP-JEPA", "anchor", "network", "additive", "mean effect")


@dataclass(frozen=True)
class HeldOut:
    """What training held out, and the errors there.

    Attributes
    ----------
    what
        What was held out.
    errors
        Noise-corrected squared errors, shape (n_rows, n_methods), of the methods and of ``no
        change``; indexed by regime. None where nothing was held out that could be measured.
    gate
        Gate of each regime.
    """

    what: str
    errors: pd.DataFrame | None
    gate: dict[str, float]

    def relative(self) -> pd.DataFrame:
        """Errors over that of no change, per regime and over all; NaN without a measurable effect."""
        assert self.errors is not None
        total = self.errors.groupby(level=0, sort=False).sum()
        total.loc["all"] = self.errors.sum()
        base = total.pop("no change")
        return total.div(base.where(base > 0), axis=0)

    def text(self) -> str:
        """Three lines: what was held out, how well it was predicted, what to expect."""
        if self.errors is None:
            return (
                f"Held out: {self.what}.\n"
                "There is therefore no estimate yet of how well new perturbations are predicted, and "
                "the network is switched off.\n"
                "Predictions come from the closed-form anchor; to measure them, hold some "
                "perturbations out yourself: gpjepa.benchmark.compare, or gpjepa demo DATA --hold-out."
            )
        relative = self.relative()
        shown = ", ".join(f"{m} {_number(relative.loc['all', m])}" for m in METHODS)
        return (
            f"Held out: {self.what} and half of the control cells.\n"
            f"Squared error on them, relative to predicting no change (0 is perfect): {shown}.\n"
            f"What to expect: {self._expected(relative)}"
        )

    def _expected(self, relative: pd.DataFrame) -> str:
        """The regimes by how well they are predicted."""
        assert self.errors is not None
        by_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
        for regime in relative.index[relative.index != "all"]:
            error = float(relative.loc[regime, "GP-JEPA"])
            n = int((self.errors.index == regime).sum())
            network = self.gate.get(regime, 0)
            share = f", {network:.0%} of the network" if network else ""
            by_verdict[_verdict(error)].append(
                f"{REGIMES.get(regime, regime)} ({_number(error)}, {n} held out{share})"
            )
        return "; ".join(f"{how}: {', '.join(of)}" for how, of in by_verdict.items() if of) + "."


def _verdict(error: float) -> str:
    if np.isnan(error):
        return _VERDICTS[3]
    return _VERDICTS[0] if error < 0.5 else _VERDICTS[1] if error < 0.95 else _VERDICTS[2]


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"
