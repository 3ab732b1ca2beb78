from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._style import COLORS, DOWN, NEITHER, UP, axes_of, finished, label_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def ranking(
    frame: pd.DataFrame,
    *,
    n: int = 20,
    unit: str = "score",
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """Scores of the best candidates, with their 95% intervals.

    Parameters
    ----------
    frame
        One row per candidate, best first: ``perturbation, score, expected, lower, upper``, and
        ``extrapolated`` for those that are drawn in grey.
    n
        Candidates to show.
    unit
        What the score is.
    ax
        Where to draw; a figure of its own by default.
    return_fig
        Return the figure; else the axes.
    """
    shown = frame.head(n).iloc[::-1].reset_index(drop=True)
    axes = axes_of(ax, 6.4, 1.2 + 0.24 * len(shown))
    far = shown.get("extrapolated", pd.Series(False, shown.index)).astype(bool)
    for y, row in shown.iterrows():
        color = NEITHER if far[y] else COLORS["GP-JEPA"]
        axes.plot([row["lower"], row["upper"]], [y, y], color=color, linewidth=2, alpha=0.5)
        axes.plot(row["score"], y, "o", color=color, markersize=5, fillstyle="none")
        axes.plot(row.get("expected", row["score"]), y, "o", color=color, markersize=5)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(shown)), list(shown["perturbation"]), fontsize=8)
    said = "\n".join(textwrap.wrap(unit, 60))
    axes.set_xlabel(
        f"{said}\nring: of the predicted effect\ndot, line: of the true effect, mean and 95% interval"
    )
    if far.any() and not far.all():
        axes.set_title("grey: a target was never measured here", loc="left", fontsize=9)
    return finished(axes, return_fig)


def trade_off(
    frame: pd.DataFrame,
    *,
    n: int = 10,
    unit: str = "score",
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """Score against side effects, and the candidates that no other beats in both.

    Parameters
    ----------
    frame
        One row per candidate: ``perturbation, score, side_effect``.
    n
        Candidates to name, of those that no other beats.
    unit, ax, return_fig
        As in :func:`ranking`.
    """
    axes = axes_of(ax, 6.4, 4.4)
    best = frame[unbeaten(frame["score"].to_numpy(), frame["side_effect"].to_numpy())]
    best = best.sort_values("side_effect")
    axes.scatter(frame["side_effect"], frame["score"], s=10, color=NEITHER, linewidth=0)
    axes.plot(best["side_effect"], best["score"], "-o", color=COLORS["GP-JEPA"], markersize=4)
    axes.axhline(0, color="#999999", linewidth=0.8)
    named = best.nlargest(n, "score")
    label_points(
        axes,
        named["side_effect"].to_numpy(),
        named["score"].to_numpy(),
        list(named["perturbation"]),
    )
    axes.set_xlabel("side effect (root mean square change of what should not change)")
    axes.set_ylabel("\n".join(textwrap.wrap(unit, 45)))
    return finished(axes, return_fig)


def unbeaten(score: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Mask of the candidates than which none has a better score for no more side effect."""
    found = np.zeros(len(score), bool)
    best = -np.inf
    for i in np.lexsort((-score, side)):
        if score[i] > best:
            best, found[i] = score[i], True
    return found


def goal_scatter(
    effect: pd.Series,
    goal: pd.Series,
    *,
    title: str = "",
    n_labels: int = 10,
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """A predicted effect against the wanted one: a dot per gene.

    Parameters
    ----------
    effect, goal
        By gene; genes that the goal does not name are left out.
    title
        Name of the perturbation.
    n_labels
        Genes to name, those that the goal changes most.
    ax, return_fig
        As in :func:`ranking`.
    """
    axes = axes_of(ax, 4.8, 4.8)
    goal = goal.dropna()
    effect = effect[goal.index]
    colors = np.where(goal > 0, UP, DOWN)
    axes.scatter(goal, effect, s=9, c=colors, alpha=0.6, linewidth=0)
    ends = [min(goal.min(), effect.min()), max(goal.max(), effect.max())]
    axes.plot(ends, ends, color="#999999", linewidth=0.8, linestyle="--")
    axes.axhline(0, color="#999999", linewidth=0.6)
    named = goal.abs().nlargest(n_labels).index
    label_points(axes, goal[named].to_numpy(), effect[named].to_numpy(), [str(g) for g in named])
    axes.set_xlabel("wanted effect")
    axes.set_ylabel("predicted effect")
    axes.set_title(title, loc="left")
    return finished(axes, return_fig)


def design(
    frame: pd.DataFrame,
    *,
    measure: str = "reached",
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """What a design reaches with each further perturbation, beside random choices.

    Parameters
    ----------
    frame
        In the order of choice: ``reached, random, lower, upper``.
    measure
        What is reached.
    ax, return_fig
        As in :func:`ranking`.
    """
    axes = axes_of(ax, 6.0, 3.6)
    n = np.arange(1, len(frame) + 1)
    axes.fill_between(n, frame["lower"], frame["upper"], color=NEITHER, alpha=0.4, linewidth=0)
    axes.plot(n, frame["random"], color="#777777", label="random, with 95% of choices")
    axes.plot(n, frame["reached"], "-o", color=COLORS["GP-JEPA"], markersize=3, label="design")
    axes.set_xlabel("perturbations measured")
    axes.set_ylabel("\n".join(textwrap.wrap(measure, 40)))
    axes.legend(frameon=False)
    return finished(axes, return_fig)
