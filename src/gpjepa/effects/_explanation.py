"""What a prediction of the anchor is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

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
    features
        For a target never perturbed, one row per kind of features: whether it covers the target,
        and its weight (:meth:`gpjepa.effects.EffectAnchor.feature_weights`). Else without rows.
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
    features: pd.DataFrame

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
        from gpjepa.plotting import explanation

        names = [
            (f"{e['part']}: " if e["part"] else "") + f"{e['expert']} × {e['weight']:.2f}"
            for _, e in self.experts.iterrows()
        ]
        genes = pd.Index(self.genes.astype(str))
        where = "" if self.context == "all" else f" in {self.context}"
        return explanation(
            pd.DataFrame(self.contributions, names, genes), pd.Series(self.mean, genes),
            pd.Series(self.sd, genes), n_genes=n_genes,
            title=f"{self.perturbation}{where} ({self.regime}): what each expert contributes",
        )  # fmt: skip
