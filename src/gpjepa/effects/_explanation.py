"""What a prediction of the anchor is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from gpjepa._figure import COLORS, new_figure

from ._scales import Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Explanation:
    """What an anchor's prediction is made of.

    Attributes
    ----------
    perturbation, context, regime, scale
        What was predicted.
    genes
        Names of the genes.
    experts
        One row per expert: the part of the perturbation it speaks of, its weight, and the size
        (Euclidean norm) of what it contributes.
    sources
        Weight of each measured effect in the prediction, largest first.
    contributions
        What each expert contributes to the effect of each gene, shape (n_experts, n_genes); their
        sum is the prediction.
    mean, sd
        The prediction and its standard deviation, shape (n_genes,).
    """

    perturbation: str
    context: str
    regime: str
    scale: Scale
    genes: np.ndarray
    experts: pd.DataFrame
    sources: pd.DataFrame
    contributions: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    def plot(self, n_genes: int = 15) -> Figure:
        """Draw what each expert contributes to the genes that are predicted to move most.

        Parameters
        ----------
        n_genes
            Genes to show.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from scipy.stats import norm

        figure = new_figure(9, 4.2)
        axes = figure.add_subplot()
        top = np.argsort(-np.abs(self.mean), kind="stable")[:n_genes]
        top = top[np.argsort(self.mean[top], kind="stable")]
        x = np.arange(len(top))
        above, below = np.zeros(len(top)), np.zeros(len(top))
        palette = list(COLORS.values())[:3] + [
            "#009E73",
            "#56B4E9",
            "#D55E00",
            "#F0E442",
            "#999999",
        ]
        for i, expert in self.experts.iterrows():
            part = self.contributions[int(i)][top]
            bottom = np.where(part >= 0, above, below)
            what = f"{expert['part']}: {expert['expert']}" if expert["part"] else expert["expert"]
            axes.bar(x, part, bottom=bottom, width=0.7, color=palette[int(i) % len(palette)],
                     label=f"{what} × {expert['weight']:.2f}")  # fmt: skip
            above = above + np.maximum(part, 0)
            below = below + np.minimum(part, 0)
        error = norm.ppf(0.975) * self.sd[top]
        axes.errorbar(x, self.mean[top], yerr=error, fmt="o", color="black", markersize=4,
                      elinewidth=1, label="prediction, 95% interval")  # fmt: skip
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_xticks(x, self.genes[top], rotation=60, ha="right", fontsize=8)
        unit = "mean log1p" if self.scale == "mean_log1p" else "log1p mean"
        axes.set_ylabel(f"effect ({unit} counts per 10,000)")
        where = "" if self.context == "all" else f" in {self.context}"
        axes.set_title(f"{self.perturbation}{where} ({self.regime}): who says what",
                       loc="left")  # fmt: skip
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        axes.spines[["top", "right"]].set_visible(False)
        return figure
