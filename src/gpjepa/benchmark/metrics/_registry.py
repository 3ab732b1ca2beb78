"""The metrics of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from . import _calibration as calibration
from . import _cells as cells
from . import _effect as effect
from . import _states as states
from ._scoring import Scoring
from ._spec import Metric

INTERVALS = (50, 80, 95)
CELL_EVAL = "cell-eval2 (Arc Institute 2026)"

METRICS: dict[str, Metric] = {
    "squared_error": Metric(
        "error ÷ no change",
        "effect",
        "lower",
        0.0,
        "wrong size or direction of the mean effect; sampling noise is taken off",
        "gpjepa.effects.noise_corrected_error",
        effect.squared_error,
        "squared_effect",
    ),
    "expr_mse_unbiased_capped_norm": Metric(
        "normalised MSE",
        "effect",
        "lower",
        0.0,
        "the same on pseudobulks of 50,000 counts, bounded per perturbation",
        CELL_EVAL,
        effect.from_cell_eval("expr_mse_unbiased_capped"),
        "expr_distance_unbiased",
        needs=("counts",),
    ),
    "l2_top1000": Metric(
        "L2, 1,000 highest genes",
        "effect",
        "lower",
        0.0,
        "error on the genes with most counts; sampling noise counts as error",
        "Ahlmann-Eltze, Huber, Anders 2025",
        effect.l2_highest,
        needs=("controls",),
    ),
    "pearson_delta": Metric(
        "Pearson delta",
        "effect",
        "higher",
        1.0,
        "wrong direction; blind to size, and high for any prediction of what all share",
        "Roohani, Huang, Leskovec 2023",
        effect.pearson_delta,
    ),
    "pearson_centroid": Metric(
        "Pearson delta, centroid",
        "effect",
        "higher",
        1.0,
        "what sets a perturbation apart from the mean response; blind to size, and high for all "
        "where the mean response is mostly noise, which both sides then share",
        "Systema, Viñas Torné et al. 2025",
        effect.pearson_centroid,
    ),
    "r2_top20": Metric(
        "R², top 20 genes",
        "effect",
        "higher",
        1.0,
        "error on the genes that respond most; dominated by expression levels",
        "scGen, Lotfollahi, Wolf, Theis 2019",
        effect.r2_top_genes,
        needs=("controls",),
    ),
    "interaction_recall": Metric(
        "interactions, recall at 20% false",
        "effect",
        "higher",
        1.0,
        "combinations taken for the sum of their singles; the noise of the measured singles is in "
        "prediction and truth alike, so that no change finds some",
        "Norman 2019; Ahlmann-Eltze, Huber, Anders 2025",
        effect.recall_of_interactions,
        per_task=True,
    ),
    "pds_cosine": Metric(
        "PDS, cosine",
        "effect",
        "higher",
        1.0,
        "predictions that are alike for different perturbations; blind to size",
        CELL_EVAL,
        effect.from_cell_eval("pds_cosine"),
        needs=("counts",),
    ),
    "de_wilcoxon_direction_fidelity_yield_raw": Metric(
        "direction fidelity",
        "differential expression",
        "higher",
        1.0,
        "genes called with the wrong sign, or not called",
        CELL_EVAL,
        effect.from_cell_eval("de_wilcoxon_direction_fidelity_yield_raw"),
        needs=("counts",),
    ),
    "de_wilcoxon_direction_reach_raw": Metric(
        "direction reach",
        "differential expression",
        "higher",
        1.0,
        "how deep into the ranking directions stay right",
        CELL_EVAL,
        effect.from_cell_eval("de_wilcoxon_direction_reach_raw"),
        needs=("counts",),
    ),
    "de_wilcoxon_sig_jaccard": Metric(
        "significant genes, Jaccard",
        "differential expression",
        "higher",
        1.0,
        "too many or too few responding genes; depends on the numbers of cells",
        CELL_EVAL,
        effect.from_cell_eval("de_wilcoxon_sig_jaccard"),
        needs=("counts",),
    ),
    "de_wilcoxon_lfc_nmae": Metric(
        "fold-change error",
        "differential expression",
        "lower",
        0.0,
        "wrong size of fold changes of responding genes",
        CELL_EVAL,
        effect.from_cell_eval("de_wilcoxon_lfc_nmae"),
        needs=("counts",),
    ),
    "energy_distance_unbiased": Metric(
        "energy distance",
        "cells",
        "lower",
        0.0,
        "cells of another distribution, on components fitted to training cells",
        "Székely and Rizzo 2013, U-statistic; Peidli et al. 2024",
        cells.energy_distances,
        version="2.0.0",
    ),
    "variance_log_ratio": Metric(
        "|log variance ratio|",
        "cells",
        "lower",
        0.0,
        "cells too alike or too scattered; blind to the mean",
        "total variance of log1p counts per 10,000",
        cells.variance_log_ratio,
    ),
    "gene_correlation_error": Metric(
        "gene correlation error",
        "cells",
        "lower",
        0.0,
        "genes that no longer vary together; blind to the mean",
        "root mean square over pairs of the 50 most variable genes",
        cells.gene_correlation_error,
    ),
    "embedding_cosine": Metric(
        "embedding, cosine distance",
        "embedding",
        "lower",
        0.0,
        "wrong direction on the principal components; blind to size",
        "cosine, on components fitted to training cells",
        states.embedding_cosine,
    ),
    "embedding_retrieval": Metric(
        "embedding, retrieval",
        "embedding",
        "higher",
        1.0,
        "predictions nearer to other perturbations than to their own; blind to size",
        "normalised rank of the cosine",
        states.embedding_retrieval,
    ),
    "neighbour_retrieval": Metric(
        "retrieval among cells",
        "embedding",
        "higher",
        1.0,
        "predicted cells whose ten nearest measured cells had other perturbations or none; chance "
        "is one over the number of perturbations and control",
        "k nearest neighbours, in the method's own states, else principal components",
        states.neighbour_retrieval,
        needs=("countable states",),
        own_space=True,
        version="2.0.0",
    ),
    "own_embedding_cosine": Metric(
        "own embedding, cosine distance",
        "embedding",
        "lower",
        0.0,
        "predicted cells that lie elsewhere in the method's own space than measured ones; blind to "
        "size, and to how good the space is",
        "the JEPA's own metric",
        states.own_embedding_cosine,
        needs=("embed", "counts"),
        own_space=True,
        version="2.0.0",
    ),
    "probe_error": Metric(
        "linear probe, error ÷ no change",
        "embedding",
        "lower",
        0.0,
        "states that do not hold the effect; of measured cells, so it judges the representation "
        "(principal components where a method has none), not the prediction",
        "ridge regression from states to effects of training perturbations",
        states.probe_error,
        denominator="squared_effect",
        needs=("countable states",),
        version="2.0.0",
    ),
    "avg_bio": Metric(
        "AvgBIO",
        "embedding",
        "higher",
        1.0,
        "states that mix cell types; of measured cells, so it judges the representation; needs "
        "cell_type_key",
        "mean of ARI, NMI and scaled silhouette (scGPT, Cui et al. 2024)",
        states.cell_type_separation,
        per_task=True,
        needs=("cell_types",),
        version="2.0.0",
    ),
    "gene_set_agreement": Metric(
        "gene sets, rank correlation",
        "decision",
        "higher",
        1.0,
        "other pathways than those that respond; needs gene_sets",
        "Spearman over sets of decoupler's ULM scores (Badia-i-Mompel et al. 2022)",
        states.gene_set_agreement,
        needs=("gene_sets",),
    ),
    "signature_ranking": Metric(
        "signatures, ranking of perturbations",
        "decision",
        "higher",
        1.0,
        "perturbations chosen for a signature that do not have it; needs gene_sets",
        "Spearman over perturbations of each set's ULM score, mean over sets",
        states.signature_ranking,
        per_task=True,
        needs=("gene_sets",),
    ),
    **{
        f"coverage_{level}": Metric(
            f"coverage of {level}% intervals",
            "calibration",
            "closest",
            level / 100,
            "intervals too narrow (below) or too wide (above)",
            "of the measured effect: interval and sampling noise together",
            calibration.coverage(level),
            needs=("sd",),
        )
        for level in INTERVALS
    },
    "crps": Metric(
        "CRPS",
        "calibration",
        "lower",
        0.0,
        "uncertainty that does not fit the errors",
        "Gneiting and Raftery 2007",
        calibration.crps,
        needs=("sd",),
    ),
}

DENOMINATORS: dict[str, Callable[[Scoring], np.ndarray]] = {
    "squared_effect": effect.squared_effect,
    "expr_distance_unbiased": effect.from_cell_eval("expr_distance_unbiased"),
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
    values = {name: metric.applied(scoring, metric.function) for name, metric in wanted.items()}
    divide = {m.denominator: m for m in wanted.values() if m.denominator is not None}
    for name, metric in sorted(divide.items()):
        values[name] = metric.applied(scoring, DENOMINATORS[name])
    return pd.DataFrame(values)
