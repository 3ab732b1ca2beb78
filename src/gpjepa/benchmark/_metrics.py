"""Metrics: each is declared once, with its direction, its best value and what it catches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from . import _measures as measures
from . import _representation as representation
from ._scoring import Scoring

INTERVALS = (50, 80, 95)


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes
    ----------
    label
        What figures and tables call it.
    axis
        What it looks at; a report shows all of them.
    direction
        Whether more is better, less is better, or the value closest to ``best``.
    best
        Value of a perfect prediction.
    catches
        What a bad value means, and what the metric cannot see.
    reference
        Paper or package it comes from.
    function
        One value per row of the task; NaN where it is not defined.
    denominator
        Column whose sum divides the sum of this one; means are taken if None.
    per_task
        Whether all rows of a task, or of a context, share one value, which has no interval then.
    """

    label: str
    axis: Literal[
        "effect", "differential expression", "cells", "embedding", "decision", "calibration"
    ]
    direction: Literal["higher", "lower", "closest"]
    best: float
    catches: str
    reference: str
    function: Callable[[Scoring], np.ndarray]
    denominator: str | None = None
    per_task: bool = False


CELL_EVAL = "cell-eval2 (Arc Institute 2026)"

METRICS: dict[str, Metric] = {
    "squared_error": Metric(
        "error ÷ no change", "effect", "lower", 0.0,
        "wrong size or direction of the mean effect; sampling noise is taken off",
        "gpjepa.effects.noise_corrected_error", measures.squared_error, "squared_effect",
    ),
    "expr_mse_unbiased_capped_norm": Metric(
        "normalised MSE", "effect", "lower", 0.0,
        "the same on pseudobulks of 50,000 counts, bounded per perturbation",
        CELL_EVAL, measures.from_cell_eval("expr_mse_unbiased_capped"), "expr_distance_unbiased",
    ),
    "l2_top1000": Metric(
        "L2, 1,000 highest genes", "effect", "lower", 0.0,
        "error on the genes with most counts; sampling noise counts as error",
        "Ahlmann-Eltze, Huber, Anders 2025", measures.l2_highest,
    ),
    "pearson_delta": Metric(
        "Pearson delta", "effect", "higher", 1.0,
        "wrong direction; blind to size, and high for any prediction of what all share",
        "Roohani, Huang, Leskovec 2023", measures.pearson_delta,
    ),
    "pearson_centroid": Metric(
        "Pearson delta, centroid", "effect", "higher", 1.0,
        "what sets a perturbation apart from the mean response; blind to size, and high for all "
        "where the mean response is mostly noise, which both sides then share",
        "Systema, Viñas Torné et al. 2025", measures.pearson_centroid,
    ),
    "r2_top20": Metric(
        "R², top 20 genes", "effect", "higher", 1.0,
        "error on the genes that respond most; dominated by expression levels",
        "scGen, Lotfollahi, Wolf, Theis 2019", measures.r2_top_genes,
    ),
    "interaction_recall": Metric(
        "interactions, recall at 20% false", "effect", "higher", 1.0,
        "combinations taken for the sum of their singles; the noise of the measured singles is in "
        "prediction and truth alike, so that no change finds some",
        "Norman 2019; Ahlmann-Eltze, Huber, Anders 2025", measures.recall_of_interactions,
        per_task=True,
    ),
    "pds_cosine": Metric(
        "PDS, cosine", "effect", "higher", 1.0,
        "predictions that do not tell perturbations apart; blind to size",
        CELL_EVAL, measures.from_cell_eval("pds_cosine"),
    ),
    "de_wilcoxon_direction_fidelity_yield_raw": Metric(
        "direction fidelity", "differential expression", "higher", 1.0,
        "genes called with the wrong sign, or not called",
        CELL_EVAL, measures.from_cell_eval("de_wilcoxon_direction_fidelity_yield_raw"),
    ),
    "de_wilcoxon_direction_reach_raw": Metric(
        "direction reach", "differential expression", "higher", 1.0,
        "how deep into the ranking directions stay right",
        CELL_EVAL, measures.from_cell_eval("de_wilcoxon_direction_reach_raw"),
    ),
    "de_wilcoxon_sig_jaccard": Metric(
        "significant genes, Jaccard", "differential expression", "higher", 1.0,
        "too many or too few responding genes; depends on the numbers of cells",
        CELL_EVAL, measures.from_cell_eval("de_wilcoxon_sig_jaccard"),
    ),
    "de_wilcoxon_lfc_nmae": Metric(
        "fold-change error", "differential expression", "lower", 0.0,
        "wrong size of fold changes of responding genes",
        CELL_EVAL, measures.from_cell_eval("de_wilcoxon_lfc_nmae"),
    ),
    "energy_distance_unbiased": Metric(
        "energy distance", "cells", "lower", 0.0,
        "cells of another distribution, on components fitted to training cells",
        "Székely and Rizzo 2013, U-statistic; Peidli et al. 2024", measures.energy_distances,
    ),
    "variance_log_ratio": Metric(
        "|log variance ratio|", "cells", "lower", 0.0,
        "cells too alike or too scattered; blind to the mean",
        "total variance of log1p counts per 10,000", measures.variance_log_ratio,
    ),
    "gene_correlation_error": Metric(
        "gene correlation error", "cells", "lower", 0.0,
        "genes that no longer vary together; blind to the mean",
        "root mean square over pairs of the 50 most variable genes", measures.gene_correlation_error,
    ),
    "embedding_cosine": Metric(
        "embedding, cosine distance", "embedding", "lower", 0.0,
        "wrong direction on the principal components; blind to size",
        "cosine, on components fitted to training cells", representation.embedding_cosine,
    ),
    "embedding_retrieval": Metric(
        "embedding, retrieval", "embedding", "higher", 1.0,
        "predictions nearer to other perturbations than to their own; blind to size",
        "normalised rank of the cosine", representation.embedding_retrieval,
    ),
    "neighbour_retrieval": Metric(
        "retrieval among cells", "embedding", "higher", 1.0,
        "predicted cells whose ten nearest measured cells had other perturbations or none; chance "
        "is one over the number of perturbations and control",
        "k nearest neighbours, in the method's own states, else principal components",
        representation.neighbour_retrieval,
    ),
    "own_embedding_cosine": Metric(
        "own embedding, cosine distance", "embedding", "lower", 0.0,
        "predicted cells that lie elsewhere in the method's own space than measured ones; blind to "
        "size, and to how good the space is",
        "the JEPA's own metric", representation.own_embedding_cosine,
    ),
    "probe_error": Metric(
        "linear probe, error ÷ no change", "embedding", "lower", 0.0,
        "states that do not hold the effect; of measured cells, so it judges the representation "
        "(principal components where a method has none), not the prediction",
        "ridge regression from states to effects of training perturbations", representation.probe_error,
        "squared_effect",
    ),
    "avg_bio": Metric(
        "AvgBIO", "embedding", "higher", 1.0,
        "states that mix cell types; of measured cells, so it judges the representation; needs "
        "cell_type_key",
        "mean of ARI, NMI and scaled silhouette (scGPT, Cui et al. 2024)", representation.avg_bio,
        per_task=True,
    ),
    "gene_set_agreement": Metric(
        "gene sets, rank correlation", "decision", "higher", 1.0,
        "other pathways than those that respond; needs gene_sets",
        "Spearman over sets of decoupler's ULM scores (Badia-i-Mompel et al. 2022)",
        representation.gene_set_agreement,
    ),
    "signature_ranking": Metric(
        "signatures, ranking of perturbations", "decision", "higher", 1.0,
        "perturbations chosen for a signature that do not have it; needs gene_sets",
        "Spearman over perturbations of each set's ULM score, mean over sets",
        representation.signature_ranking,
        per_task=True,
    ),
    **{
        f"coverage_{level}": Metric(
            f"coverage of {level}% intervals", "calibration", "closest", level / 100,
            "intervals too narrow (below) or too wide (above)",
            "of the measured effect: interval and sampling noise together", measures.coverage(level),
        )
        for level in INTERVALS
    },
    "crps": Metric(
        "CRPS", "calibration", "lower", 0.0,
        "uncertainty that does not fit the errors",
        "Gneiting and Raftery 2007", measures.crps,
    ),
}  # fmt: skip

DENOMINATORS: dict[str, Callable[[Scoring], np.ndarray]] = {
    "squared_effect": measures.squared_effect,
    "expr_distance_unbiased": measures.from_cell_eval("expr_distance_unbiased"),
}
"""Columns that are not metrics, but divide the sum of one."""


def score(scoring: Scoring, names: Iterable[str] = tuple(METRICS)) -> pd.DataFrame:
    """Metrics of a prediction beside one half of the truth.

    Parameters
    ----------
    scoring
        The pair.
    names
        Metrics to compute; all of them by default.

    Returns
    -------
    pandas.DataFrame
        One row per row of the task, a column per metric and per denominator of one.
    """
    wanted = {name: METRICS[name] for name in names}
    values = {name: metric.function(scoring) for name, metric in wanted.items()}
    divide = {m.denominator for m in wanted.values() if m.denominator is not None}
    values |= {name: DENOMINATORS[name](scoring) for name in sorted(divide)}
    return pd.DataFrame(values)
