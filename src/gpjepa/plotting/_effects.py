from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._style import (
    COLORS,
    DOWN,
    NEITHER,
    OTHER,
    PALETTE,
    UP,
    axes_of,
    finished,
    label_points,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIT = "effect (difference from control,\nmean log1p counts per 10,000)"


def method_errors(scores: pd.DataFrame, *, ax: Axes | None = None, return_fig: bool = True) -> Any:
    """Error of each method, relative to no change: a point per held-out perturbation.

    Parameters
    ----------
    scores
        One row per method × perturbation, with the columns ``method`` and ``squared_error``, and
        the method ``no change`` among them: :attr:`gpjepa.benchmark.Comparison.scores`.
    ax
        Where to draw; a figure of its own by default.
    return_fig
        Return the figure; else the axes.
    """
    axes = axes_of(ax, 7.5, 3.4)
    total = scores.groupby("method", sort=False)["squared_error"].sum()
    base = total["no change"]
    n = scores["method"].eq("no change").sum()
    order = list(total.sort_values(ascending=False).index)
    rng = np.random.default_rng(0)
    for y, method in enumerate(order):
        color = COLORS.get(method, OTHER)
        axes.barh(y, total[method] / base, color=color, alpha=0.35, height=0.7)
        points = scores.loc[scores["method"] == method, "squared_error"] * n / base
        jitter = rng.uniform(-0.18, 0.18, len(points))
        axes.scatter(points, y + jitter, s=14, color=color, edgecolor="white", linewidth=0.4)
        axes.text(
            1.01,
            y,
            f"{total[method] / base:.2f}",
            transform=axes.get_yaxis_transform(),
            va="center",
        )
    axes.set_yticks(range(len(order)), order)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(
        "noise-corrected squared error ÷ that of no change (0 is perfect)\n"
        "bar: all held-out perturbations; dot: one of them"
    )
    axes.set_title("Error of each method on perturbations it has not seen", loc="left")
    return finished(axes, return_fig)


def effect_scatter(
    effects: pd.DataFrame,
    methods: Sequence[str] = ("GP-JEPA", "additive", "mean"),
    *,
    title: str = "",
    n_labels: int = 5,
) -> Any:
    """Predicted against measured effect: a dot per gene, a panel per method.

    Parameters
    ----------
    effects
        One row per gene: ``gene``, ``measured``, and the prediction of each method
        (:meth:`gpjepa.benchmark.Comparison.effects_of`).
    methods
        Columns to show.
    title
        What was perturbed.
    n_labels
        Genes to name, those that moved most.
    """
    figure = new_figure(3.1 * len(methods), 3.8)
    panels = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
    measured = effects["measured"].to_numpy(float)
    limit = 1.05 * np.abs(effects[["measured", *methods]].to_numpy(float)).max()
    top = np.argsort(-np.abs(measured), kind="stable")[:n_labels]
    names = effects["gene"].to_numpy()[top]
    for axes, method in zip(panels, methods, strict=True):
        predicted = effects[method].to_numpy(float)
        axes.plot([-limit, limit], [-limit, limit], color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.scatter(
            measured, predicted, s=7, alpha=0.5, color=COLORS.get(method, OTHER), linewidth=0
        )
        how = "constant"
        if predicted.std():
            how = f"r = {np.corrcoef(measured, predicted)[0, 1]:.2f}"
        axes.set_title(f"{method} ({how})", loc="left", fontsize=10)
        axes.set_xlabel("measured effect (a dot is a gene)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("predicted effect")
    figure.suptitle(f"{title}: difference from control, mean log1p counts per 10,000")
    for axes, method in zip(panels, methods, strict=True):
        label_points(axes, measured[top], effects[method].to_numpy(float)[top], names)
    return figure


def top_genes(
    effects: pd.DataFrame,
    n: int = 20,
    *,
    title: str = "",
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """The genes that moved most: measured effect, prediction with its 95% interval, additive.

    Parameters
    ----------
    effects
        One row per gene: ``gene``, ``measured``, ``GP-JEPA``, its ``sd``, and ``additive``
        (:meth:`gpjepa.benchmark.Comparison.effects_of`).
    n
        Genes to show.
    title
        What was perturbed.
    ax, return_fig
        As in :func:`method_errors`.
    """
    axes = axes_of(ax, 8, 4)
    measured = effects["measured"].to_numpy(float)
    top = effects.iloc[np.argsort(-np.abs(measured), kind="stable")[:n]].sort_values(
        "measured", kind="stable"
    )
    x = np.arange(len(top))
    axes.errorbar(
        x,
        top["GP-JEPA"],
        yerr=1.96 * top["sd"],
        fmt="o",
        markersize=5,
        color=COLORS["GP-JEPA"],
        elinewidth=1.2,
        label="GP-JEPA, 95% interval",
    )
    axes.scatter(
        x, top["additive"], marker="_", s=90, color=COLORS["additive"], label="additive", zorder=3
    )
    axes.scatter(
        x, top["measured"], marker="D", s=22, color=COLORS["measured"], label="measured", zorder=4
    )
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xticks(x, top["gene"], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel(UNIT)
    axes.set_title(f"{title}: the {len(top)} genes that changed most", loc="left")
    axes.legend(frameon=False, fontsize=8)
    return finished(axes, return_fig)


def volcano(
    effects: pd.DataFrame,
    *,
    n_labels: int = 12,
    title: str | None = None,
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """Predicted effect of each gene against how sure it is: a dot per gene.

    The height is the two-sided p-value of the mean effect over its standard deviation, so that
    coloured dots are the genes whose 95% interval excludes no change.

    Parameters
    ----------
    effects
        Effects of one perturbation in one context: ``gene``, ``effect``, ``sd``
        (:meth:`gpjepa.GPJEPA.predict_effects`).
    n_labels
        Genes to name, those of the largest effects among the coloured ones.
    title
        By default the perturbation and the context.
    ax, return_fig
        As in :func:`method_errors`.

    Raises
    ------
    ValueError
        If there are several perturbations or contexts.
    """
    from scipy.stats import norm

    frame = _single(effects)
    effect, sd = frame["effect"].to_numpy(float), frame["sd"].to_numpy(float)
    z = effect / np.maximum(sd, 1e-12)
    height = -(np.log(2) + norm.logsf(np.abs(z))) / np.log(10)
    sure = np.abs(z) > norm.ppf(0.975)
    axes = axes_of(ax, 5.6, 4.4)
    color = np.where(~sure, NEITHER, np.where(effect > 0, UP, DOWN))
    axes.scatter(effect, height, s=9, color=color, linewidth=0, alpha=0.8)
    axes.axhline(-np.log10(0.05), color="#999999", linewidth=0.8, linestyle="--")
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel(UNIT)
    axes.set_ylabel("−log10 p of no change\n(a dot is a gene)")
    up, down = int((sure & (effect > 0)).sum()), int((sure & (effect < 0)).sum())
    axes.set_title(
        f"{_title(frame) if title is None else title}\n{up} genes up, {down} down (95% intervals)",
        loc="left",
        fontsize=10,
    )
    top = np.flatnonzero(sure)
    top = top[np.argsort(-np.abs(effect[top]), kind="stable")[:n_labels]]
    label_points(axes, effect[top], height[top], frame["gene"].to_numpy()[top])
    return finished(axes, return_fig)


def effect_heatmap(
    effects: pd.DataFrame,
    *,
    n_genes: int = 40,
    title: str | None = None,
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """Genes × perturbations: the effects of the genes that change most, similar ones together.

    Parameters
    ----------
    effects
        Effects of several perturbations: ``perturbation``, ``context``, ``gene``, ``effect``
        (:meth:`gpjepa.GPJEPA.predict_effects`).
    n_genes
        Genes to show.
    title
        By default what is shown.
    ax, return_fig
        As in :func:`method_errors`.
    """
    where = effects["context"].nunique() > 1
    column = effects["perturbation"].astype(str) + (
        " in " + effects["context"].astype(str) if where else ""
    )
    wide = effects.assign(column=column).pivot(index="gene", columns="column", values="effect")
    wide = wide.loc[wide.abs().max(axis=1).sort_values(ascending=False).index[:n_genes]]
    wide = wide.iloc[_similar(wide.to_numpy()), _similar(wide.to_numpy().T)]
    axes = axes_of(ax, 2.2 + 0.32 * wide.shape[1], 1.2 + 0.17 * wide.shape[0])
    limit = float(np.nanmax(np.abs(wide.to_numpy()))) or 1.0
    shown = axes.imshow(
        wide.to_numpy(),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xticks(range(wide.shape[1]), wide.columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(wide.shape[0]), wide.index, fontsize=7)
    axes.set_title(
        f"The {wide.shape[0]} genes that change most" if title is None else title,
        loc="left",
        fontsize=10,
    )
    axes.figure.colorbar(shown, ax=axes, label=UNIT, shrink=0.6)
    return finished(axes, return_fig)


def enrichment(
    table: pd.DataFrame,
    *,
    n_sets: int = 15,
    title: str | None = None,
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """Gene sets that a predicted effect raises or lowers: a bar per set.

    Parameters
    ----------
    table
        Of one perturbation in one context: ``set``, ``score``, ``padj``
        (:func:`gpjepa.effects.enrichment`).
    n_sets
        Sets to show, those with the largest scores.
    title
        By default the perturbation and the context.
    ax, return_fig
        As in :func:`method_errors`.
    """
    frame = _single(table)
    top = frame.loc[frame["score"].abs().sort_values(ascending=False).index[:n_sets]]
    top = top.sort_values("score", kind="stable")
    axes = axes_of(ax, 7, 1 + 0.26 * len(top))
    color = np.where(top["padj"] > 0.05, NEITHER, np.where(top["score"] > 0, UP, DOWN))
    axes.barh(range(len(top)), top["score"], color=color, height=0.7)
    axes.set_yticks(range(len(top)), [_short(name) for name in top["set"]], fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("score: t of the set's genes against the others\n(grey: adjusted p above 0.05)")
    axes.set_title(_title(frame) if title is None else title, loc="left", fontsize=10)
    return finished(axes, return_fig)


def explanation(
    contributions: pd.DataFrame,
    mean: pd.Series,
    sd: pd.Series,
    *,
    n_genes: int = 15,
    title: str = "",
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """What each part of a prediction adds to the genes that are predicted to change most.

    Parameters
    ----------
    contributions
        One row per part, one column per gene; their sum is the prediction.
    mean, sd
        The prediction and its standard deviation, by gene.
    n_genes
        Genes to show.
    title
        What was predicted.
    ax, return_fig
        As in :func:`method_errors`.
    """
    axes = axes_of(ax, 9, 4.4)
    top = mean.abs().sort_values(ascending=False, kind="stable").index[:n_genes]
    top = mean[top].sort_values(kind="stable").index
    x = np.arange(len(top))
    above, below = np.zeros(len(top)), np.zeros(len(top))
    for i, (name, row) in enumerate(contributions[top].iterrows()):
        part = row.to_numpy(float)
        bottom = np.where(part >= 0, above, below)
        label = textwrap.fill(str(name), 36)
        axes.bar(x, part, bottom=bottom, width=0.7, color=PALETTE[i % len(PALETTE)], label=label)
        above, below = above + np.maximum(part, 0), below + np.minimum(part, 0)
    axes.errorbar(
        x,
        mean[top],
        yerr=1.96 * sd[top],
        fmt="o",
        color="black",
        markersize=4,
        elinewidth=1,
        label="anchor, 95% interval",
    )
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xticks(x, top, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel(UNIT)
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return finished(axes, return_fig)


def _single(frame: pd.DataFrame) -> pd.DataFrame:
    pairs = frame[["perturbation", "context"]].drop_duplicates()
    if len(pairs) != 1:
        raise ValueError(
            f"Expected one perturbation in one context, found {len(pairs)}, such as "
            f"{pairs.iloc[0].tolist() if len(pairs) else 'none'}: select one of them first."
        )
    return frame.reset_index(drop=True)


def _title(frame: pd.DataFrame) -> str:
    perturbation, context = frame[["perturbation", "context"]].iloc[0]
    return f"{perturbation}" + ("" if context == "all" else f" in {context}")


def _short(name: str, n: int = 60) -> str:
    name = str(name).replace("_", " ")
    return name if len(name) <= n else name[: n - 1] + "…"


def _similar(rows: np.ndarray) -> np.ndarray:
    """An order in which similar rows are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    known = np.nan_to_num(rows)
    return leaves_list(linkage(known, "average")) if len(rows) > 2 else np.arange(len(rows))
