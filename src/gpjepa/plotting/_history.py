"""Curves of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ._style import PALETTE, axes_of, new_figure

# Title of each panel, and its curves by name.
_PANELS: dict[str, dict[str, str]] = {
    "Stage A: loss": {
        "pretrain_loss": "training cells",
        "pretrain_validation_loss": "held-out cells",
    },
    "Stage A: effective rank of states": {"pretrain_effective_rank": "training cells"},
    "Stages B and C: loss": {"train_loss": "training cells"},
    "Stages B and C: error ÷ no change": {"holdout_error": "held-out perturbations"},
}


def history(history: Mapping[str, pd.DataFrame]) -> Any:
    """Curves of training by epoch, a panel per stage and quantity.

    Parameters
    ----------
    history
        A frame per metric, by epoch: ``model.history``.

    Returns
    -------
    matplotlib.figure.Figure
        Only what was trained has a panel.
    """
    panels = {
        title: {key: said for key, said in curves.items() if key in history}
        for title, curves in _PANELS.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise ValueError(f"The history has no curve that is known: {sorted(history)}.")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(3.7 * columns, 2.6 * rows)
    for place, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes_of(axes, 0, 0)
        for color, (key, said) in zip(PALETTE, curves.items(), strict=False):
            values = history[key].iloc[:, 0].astype(float)
            axes.plot(values.index + 1, values, color=color, label=said, marker=".", markersize=4)
            if key == "holdout_error":
                best = int(values.idxmin()) + 1
                axes.axvline(best, color="#999999", lw=0.8, ls=":")
                where: dict[str, Any] = {
                    "xycoords": ("data", "axes fraction"),
                    "textcoords": "offset points",
                }
                axes.annotate("kept", (best, 0.6), (3, 0), fontsize=8, **where)
        axes.set(title=title, xlabel="epoch")
        axes.legend(frameon=False, fontsize=8)
    return figure
