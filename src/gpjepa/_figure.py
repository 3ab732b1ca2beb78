"""What all figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
