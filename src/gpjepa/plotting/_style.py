"""What all figures share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for colour-blind readers as well.
COLORS = {
    "GP-JEPA": "#0072B2",
    "additive": "#E69F00",
    "mean": "#CC79A7",
    "no change": "#999999",
    "replicate": "#009E73",
    "measured": "#000000",
}
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#999999"]
OTHER = "#56B4E9"
UP, DOWN, NEITHER = "#D55E00", "#0072B2", "#BBBBBB"


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if "ipykernel" in sys.modules:
        _shown_by_notebooks(Figure)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shown_by_notebooks(kind: type) -> None:
    """Let a notebook draw figures also where nothing has used pyplot yet, which would arrange it."""
    from IPython.core.getipython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    shell: Any = get_ipython()
    if shell is None:
        return
    if not any(kind in known for known in shell.display_formatter.formatters.values()):
        select_figure_formats(shell, {"png"})


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes to draw into: those given, or those of a figure of its own."""
    axes = new_figure(width, height).add_subplot() if ax is None else ax
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def finished(axes: Axes, return_fig: bool) -> Any:
    """The figure, or the axes for more drawing."""
    return axes.figure if return_fig else axes


def label_points(axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> None:
    """Names beside points, moved until they do not overlap."""
    from adjustText import adjust_text

    if not len(names):
        return
    texts = [axes.text(a, b, name, fontsize=7) for a, b, name in zip(x, y, names, strict=True)]
    # Layout is settled first, as labels are moved in units of the final axes.
    axes.figure.canvas.draw()
    adjust_text(
        texts,
        x=x,
        y=y,
        ax=axes,
        time_lim=1,
        arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#666666"},
    )
