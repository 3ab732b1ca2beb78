"""Figures over a comparison or a benchmark. Each returns a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gpjepa._figure import COLORS, new_figure

from ._benchmark import benchmark_scores, calibration, scaling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gpjepa.benchmark import Comparison

__all__ = [
    "benchmark_scores",
    "calibration",
    "effect_scatter",
    "method_errors",
    "scaling",
    "top_genes",
]


def method_errors(scores: pd.DataFrame) -> Figure:
    """Error of each method, relative to no change: a point per held-out perturbation.

    Parameters
    ----------
    scores
        :attr:`gpjepa.benchmark.Comparison.scores`, of one run or several.
    """
    figure = new_figure(7, 3.2)
    axes = figure.add_subplot()
    total = scores.groupby("method", sort=False)["squared_error"].sum()
    base = total["no change"]
    n = scores["method"].eq("no change").sum()
    order = list(total.sort_values(ascending=False).index)
    rng = np.random.default_rng(0)
    for y, method in enumerate(order):
        color = COLORS.get(method, "#56B4E9")
        axes.barh(y, total[method] / base, color=color, alpha=0.35, height=0.7)
        points = scores.loc[scores["method"] == method, "squared_error"] * n / base
        jitter = rng.uniform(-0.18, 0.18, len(points))
        axes.scatter(points, y + jitter, s=14, color=color, edgecolor="white", linewidth=0.4)
        axes.text(1.01, y, f"{total[method] / base:.2f}", transform=axes.get_yaxis_transform(),
                  va="center")  # fmt: skip
    axes.set_yticks(range(len(order)), order)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle="--")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("noise-corrected squared error ÷ that of no change (0 is perfect)")
    axes.set_title("How far off is each method on perturbations it has not seen?", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def effect_scatter(result: Comparison, row: int = 0) -> Figure:
    """Predicted against measured effect of every gene, for one held-out perturbation.

    Parameters
    ----------
    result
        A comparison.
    row
        Which of ``result.rows``.
    """
    figure = new_figure(9, 3.6)
    methods = ["GP-JEPA", "additive", "mean"]
    axes = figure.subplots(1, len(methods), sharex=True, sharey=True)
    measured = result.effects["measured"][row]
    limit = 1.05 * max(
        np.abs(measured).max(), *(np.abs(result.effects[m][row]).max() for m in methods)
    )
    for ax, method in zip(axes, methods, strict=True):
        predicted = result.effects[method][row]
        ax.plot([-limit, limit], [-limit, limit], color="#bbbbbb", linewidth=0.8, zorder=0)
        ax.scatter(measured, predicted, s=7, alpha=0.5, color=COLORS[method], linewidth=0)
        for g in np.argsort(-np.abs(measured))[:5]:
            ax.annotate(result.genes[g], (measured[g], predicted[g]), fontsize=7,
                        xytext=(3, 3), textcoords="offset points")  # fmt: skip
        r = np.corrcoef(measured, predicted)[0, 1] if predicted.std() else float("nan")
        ax.set_title(f"{method} (r = {r:.2f})", loc="left", fontsize=10)
        ax.set_xlabel("measured effect")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("predicted effect")
    context, perturbation = result.rows[row]
    where = "" if context == "all" else f" in {context}"
    figure.suptitle(f"{perturbation}{where}: difference from control, mean log1p counts per 10,000")
    return figure


def top_genes(result: Comparison, row: int = 0, n: int = 20) -> Figure:
    """The genes that moved most: measured effect, prediction with its 95% interval, additive.

    Parameters
    ----------
    result
        A comparison.
    row
        Which of ``result.rows``.
    n
        Genes to show.
    """
    from scipy.stats import norm

    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    measured = result.effects["measured"][row]
    top = np.argsort(-np.abs(measured), kind="stable")[:n]
    top = top[np.argsort(measured[top], kind="stable")]
    x = np.arange(len(top))
    error = norm.ppf(0.975) * result.sd[row][top]
    axes.errorbar(x, result.effects["GP-JEPA"][row][top], yerr=error, fmt="o", markersize=5,
                  color=COLORS["GP-JEPA"], elinewidth=1.2, label="GP-JEPA, 95% interval")  # fmt: skip
    axes.scatter(x, result.effects["additive"][row][top], marker="_", s=90, color=COLORS["additive"],
                 label="additive", zorder=3)  # fmt: skip
    axes.scatter(x, measured[top], marker="D", s=22, color=COLORS["measured"], label="measured",
                 zorder=4)  # fmt: skip
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xticks(x, result.genes[top], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("effect (mean log1p counts per 10,000)")
    context, perturbation = result.rows[row]
    where = "" if context == "all" else f" in {context}"
    axes.set_title(f"{perturbation}{where}: the {n} genes that moved most", loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
