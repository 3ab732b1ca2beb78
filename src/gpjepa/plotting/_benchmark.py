"""Figures over a benchmark. Each returns a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._style import COLORS, OTHER, PALETTE, axes_of, finished, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = (  # of a replicate, the mean response, the best other method and the focus
    ("|", COLORS["replicate"], 9),
    ("|", COLORS["mean"], 9),
    ("D", COLORS["additive"], 4),
    ("o", COLORS["GP-JEPA"], 6),
)
BETTER = {"higher": "more is better", "lower": "less is better", "closest": "closest is best"}


def benchmark_scores(table: pd.DataFrame, metric: str = "squared_error") -> Figure:
    """One metric of every method, with 95% intervals: a panel per data set and kind of split.

    Parameters
    ----------
    table
        :meth:`gpjepa.benchmark.BenchmarkResult.table`.
    metric
        A metric of it.

    Raises
    ------
    ValueError
        If the table does not hold the metric.
    """
    part = table[table["metric"] == metric]
    if part.empty:
        raise ValueError(f"The table has no values of {metric!r}.")
    label, direction, best = part[["label", "direction", "best"]].iloc[0]
    groups = list(part.groupby(["data", "kind"], sort=False))
    height = sum(0.24 * len(g) + 0.7 for _, g in groups)
    figure = new_figure(7, height + 0.3)
    panels = figure.subplots(
        len(groups), 1, squeeze=False, height_ratios=[len(g) for _, g in groups]
    )[:, 0]
    for axes, (name, group) in zip(panels, groups, strict=True):
        group = group.sort_values("value", ascending=direction == "higher")
        for y, (_, row) in enumerate(group.iterrows()):
            color = COLORS.get(row["method"], OTHER)
            axes.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.6)
            axes.plot(row["value"], y, "o", color=color, markersize=5)
        axes.set_yticks(range(len(group)), group["method"])
        axes.axvline(best, color="black", linewidth=0.8)
        axes.set_title(
            f"{name[0]}: {name[1]} ({int(group['n_rows'].iloc[0])} rows)", loc="left", fontsize=10
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        # One method that fails by far would squeeze the others into a line.
        ends = group[["value", "low", "high"]].to_numpy()
        ends = ends[np.isfinite(ends)]
        most = np.quantile(ends, 0.9)
        far = most + 1.5 * ends[ends <= most].std()
        if direction == "lower" and ends.max() > 2 * far > 0:
            axes.set_xlim(right=far)
    panels[-1].set_xlabel(f"{label} ({BETTER[direction]}; line: perfect)")
    return figure


COSTS = {"seconds_fit": "seconds to fit", "peak_memory_gb": "peak memory, GB"}


def scaling(table: pd.DataFrame, runs: pd.DataFrame, metric: str = "squared_error") -> Figure:
    """One metric over the seconds and the memory that it cost, a line per model over its sizes.

    Parameters
    ----------
    table
        :meth:`gpjepa.benchmark.BenchmarkResult.table`.
    runs
        :attr:`gpjepa.benchmark.BenchmarkResult.runs`: entries of one ``family`` are the sizes of a
        model, from small to large as they were named in the configuration.
    metric
        A metric of the table.

    Raises
    ------
    ValueError
        If no model was run in two sizes.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    part = _sizes(table[table["metric"] == metric], runs)
    if part.empty:
        raise ValueError("No model was run in two sizes.")
    panels = list(part.groupby(["data", "kind"], sort=False))
    families = list(dict.fromkeys(part["family"]))
    figure = new_figure(1.2 + 2.4 * len(panels), 5.0)
    axes = figure.subplots(len(COSTS), len(panels), squeeze=False, sharey=True, sharex="row")
    for (cost, words), line in zip(COSTS.items(), axes, strict=True):
        for ax, ((data, _), group) in zip(line, panels, strict=True):
            for family, mine in group.groupby("family", sort=False):
                i = families.index(family)
                color = PALETTE[i % len(PALETTE)]
                ax.plot(mine[cost], mine["value"], color=color, linewidth=1.2)
                marks = 20 + 30 * np.arange(len(mine))
                ax.scatter(mine[cost], mine["value"], marks, color=color, zorder=3)
            ax.set_xlabel(words)
            if cost == "seconds_fit":
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_title(data, loc="left", fontsize=9)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", alpha=0.25)
        line[0].set_ylabel(part["label"].iloc[0])
    handles = [
        axes[0, 0].plot([], [], "o-", color=PALETTE[i % len(PALETTE)], label=family)[0]
        for i, family in enumerate(families)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    return figure


def _sizes(part: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Values beside costs, of the families with several sizes; empty if no sizes are known."""
    key, numbers = ["data", "kind", "method"], [*COSTS, "parameters"]
    runs = runs.reindex(columns=[*key, "family", *numbers]).dropna(subset="seconds_fit")
    costs = runs.groupby([*key, "family"], sort=False)[numbers].mean()
    found = costs.reset_index().merge(part, on=key)
    found = found[found.groupby("family")["method"].transform("nunique") > 1]
    # Peers do not count their parameters. Variants of a model that do not grow are no sizes.
    grows = [
        p.notna().all() and (p.diff().dropna() > 0).all()
        for _, p in found.groupby(["data", "kind", "family"])["parameters"]
    ]
    return found if any(grows) else found[:0]


def calibration(table: pd.DataFrame) -> Figure:
    """Share of measured effects inside the intervals of each stated level.

    Parameters
    ----------
    table
        :meth:`gpjepa.benchmark.BenchmarkResult.table`.

    Raises
    ------
    ValueError
        If no method states an uncertainty.
    """
    part = table[table["metric"].str.startswith("coverage_")]
    if part.empty:
        raise ValueError("No method states how sure it is.")
    groups = list(part.groupby(["data", "kind"], sort=False))
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = new_figure(3.1 * columns, 3.0 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    methods = list(dict.fromkeys(part["method"]))
    color = {m: PALETTE[i % len(PALETTE)] for i, m in enumerate(methods)}
    for axes, (name, group) in zip(panels, groups, strict=False):
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
        for method, mine in group.groupby("method", sort=False):
            axes.plot(mine["best"], mine["value"], "o-", color=color[str(method)], markersize=4)
        axes.set(xlim=(0.4, 1.0), ylim=(0, 1.02), xlabel="stated", ylabel="measured inside")
        axes.set_title(f"{name[0]}: {name[1]}", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    handles = [panels[0].plot([], [], "o-", color=color[m], label=m)[0] for m in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def benchmark_overview(
    table: pd.DataFrame,
    focus: str,
    metric: str = "squared_error",
    *,
    ax: Axes | None = None,
    return_fig: bool = True,
) -> Any:
    """One method beside the best other one, the mean response and a replicate, a line per data set.

    Parameters
    ----------
    table
        :meth:`gpjepa.benchmark.BenchmarkResult.table`.
    focus
        The method.
    metric
        A metric of it.
    ax
        Where to draw; a figure of its own by default.
    return_fig
        Return the figure; else the axes.

    Raises
    ------
    ValueError
        If the table does not hold the metric, or the method.
    """
    part = table[table["metric"] == metric]
    if part.empty or focus not in set(part["method"]):
        raise ValueError(f"The table has no values of {metric!r} for {focus!r}.")
    label, direction, best = part[["label", "direction", "best"]].iloc[0]
    keys = part[["data", "kind"]].drop_duplicates()[::-1]
    names = list(keys.itertuples(index=False, name=None))
    height = {name: y for y, name in enumerate(names)}
    axes = axes_of(ax, 5.8, 0.46 * len(names) + 1.0)
    good = -(part["value"] - best).abs() if direction == "closest" else part["value"]
    parts = _overview_parts(part, focus, -good if direction == "lower" else good)
    limit = _far(pd.concat(parts.values()), label)
    drawn = []
    for (name, rows), (marker, color, size) in zip(parts.items(), MARKS, strict=True):
        y = [height[key] for key in zip(rows["data"], rows["kind"], strict=True)]
        x = rows["value"].where(rows["value"] <= limit)
        drawn += axes.plot(
            x, y, marker, color=color, markersize=size, markeredgewidth=2, linestyle="", label=name
        )
        above = 0.22 * {"replicate": -1, "mean response": 1}.get(name, 0)  # of each other
        for value, line in zip(rows["value"], y, strict=True):
            if value > limit:  # an arrow to where it would be
                text = f"{value:.3g} ▸"
                axes.text(limit, line + above, text, fontsize=7, color=color, ha="right")
        if name == focus:
            axes.hlines(y, rows["low"], rows["high"], color=color, linewidth=1.6)
        elif name == "best other method":
            for method, at, line in zip(rows["method"], rows["value"], y, strict=True):
                axes.text(
                    min(at, limit), line + 0.16, method, fontsize=7, ha="center", color="#555555"
                )
    axes.set_yticks(range(len(names)), [f"{d}\n{k}" for d, k in names], fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.axvline(best, color="black", linewidth=0.8)
    if label.endswith("no change"):
        axes.axvline(1, color=COLORS["no change"], linewidth=0.8, linestyle="--")
    axes.set_xlim(right=limit * 1.03)
    axes.set_xlabel(
        f"{label} ({BETTER[direction]})\nsolid line: perfect; bars: 95% intervals", fontsize=8
    )
    axes.figure.legend(
        handles=drawn[::-1], loc="outside upper left", ncols=4, frameon=False, fontsize=8
    )
    return finished(axes, return_fig)


def _overview_parts(part: pd.DataFrame, focus: str, goodness: pd.Series) -> dict[str, pd.DataFrame]:
    """Rows of the table by what they are called, a row per data set; drawn in this order."""
    others = part[~part["role"].isin(["ceiling", "oracle"]) & (part["entry"] != focus)]
    best = goodness[others.index].groupby([others["data"], others["kind"]]).idxmax()
    return {
        "replicate": part[part["role"] == "ceiling"],
        "mean response": part[part["role"] == "floor"],
        "best other method": part.loc[best.dropna()],
        focus: part[part["method"] == focus],
    }


def _far(rows: pd.DataFrame, label: str) -> float:
    """Where the axis ends: one method that fails by far would squeeze the others into a line."""
    ends = rows[["value", "high"]].to_numpy()
    largest = float(ends[np.isfinite(ends)].max())
    return max(1.15, min(largest, 2.0)) if label.endswith("no change") else largest
