"""How well measured effects were predicted when they were hidden: `GPJEPA.summary`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from gpjepa.response import METHODS, Judged
from gpjepa.splits import MIN_UNITS

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


def in_words(judged: Judged) -> str:
    """Three lines: what was hidden, how well it was predicted, what to expect."""
    if judged.errors.empty:
        default = " Of pairs whose targets were both measured alone, half of the network counts by default."
        return (
            "Too few perturbations were measured to hide some and predict them from the rest.\n"
            "There is therefore no estimate yet of how well new perturbations are predicted.\n"
            "To have one, measure at least five perturbations, or the same ones in two contexts."
            f"{default if 'seen2' in judged.gates else ''}"
        )
    relative = judged.relative()
    shown = ", ".join(f"{m} {_number(relative.loc['all', m])}" for m in METHODS)
    return (
        "Measured effects were hidden in turn, and predicted from the rest, against other controls.\n"
        f"Squared error on them, relative to predicting no change (0 is perfect): {shown}.\n"
        f"What to expect: {_expected(judged, relative)}"
    )


def _expected(judged: Judged, relative: pd.DataFrame) -> str:
    """The regimes by how well they are predicted."""
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for regime in relative.index[relative.index != "all"]:
        error = float(relative.loc[regime, "GP-JEPA"])
        n = int((judged.errors["regime"] == regime).sum())
        gate = judged.gates.get(regime)
        share = ""
        if gate is not None and gate.gate:
            default = " by default" if gate.n_units < MIN_UNITS else ""
            share = f", {gate.gate:.0%} of the network{default}"
        by_verdict[_verdict(error)].append(
            f"{REGIMES.get(regime, regime)} ({_number(error)}, {n} hidden{share})"
        )
    return "; ".join(f"{how}: {', '.join(of)}" for how, of in by_verdict.items() if of) + "."


def _verdict(error: float) -> str:
    if np.isnan(error):
        return _VERDICTS[3]
    return _VERDICTS[0] if error < 0.5 else _VERDICTS[1] if error < 0.95 else _VERDICTS[2]


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"
