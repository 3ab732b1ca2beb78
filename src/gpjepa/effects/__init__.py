"""Mean effects: the table, noise-corrected error, the baselines and the anchor."""

from ._anchor import AnchorPrediction, EffectAnchor, Explanation
from ._baselines import (
    Additive,
    Baseline,
    LargerSingle,
    MatchingMean,
    MeanEffect,
    NoChange,
    ShrunkenAdditive,
)
from ._cells import CellSums, effect_table
from ._denoised import denoise
from ._doses import OtherDose
from ._enrichment import enrichment, gene_set_scores
from ._experts import ROLES, ExpertPredictions
from ._features import coexpression_features, effect_features, gene_loadings
from ._gate import Gate, fit_gate
from ._halves import control_halves
from ._interactions import (
    interaction_recall,
    measured_interactions,
    significant_interactions,
)
from ._joint import JointEffects
from ._library import library_shift, library_shifts
from ._linear import LinearModel
from ._pairs import PairSums
from ._regimes import Regimes
from ._regression import KernelRidge, NearestPerturbation
from ._scales import PER, SCALES, Scale, check_scale, expected_log1p, log1p_rates
from ._table import EffectTable, noise_corrected_error
from ._transfer import Transfer
from ._unseen import ShrunkenMean, UnseenTargets

__all__ = [
    "PER",
    "ROLES",
    "SCALES",
    "Additive",
    "AnchorPrediction",
    "Baseline",
    "CellSums",
    "EffectAnchor",
    "EffectTable",
    "ExpertPredictions",
    "Explanation",
    "Gate",
    "JointEffects",
    "KernelRidge",
    "LargerSingle",
    "LinearModel",
    "MatchingMean",
    "MeanEffect",
    "NearestPerturbation",
    "NoChange",
    "OtherDose",
    "PairSums",
    "Regimes",
    "Scale",
    "ShrunkenAdditive",
    "ShrunkenMean",
    "Transfer",
    "UnseenTargets",
    "check_scale",
    "coexpression_features",
    "control_halves",
    "denoise",
    "effect_features",
    "effect_table",
    "enrichment",
    "expected_log1p",
    "fit_gate",
    "gene_loadings",
    "gene_set_scores",
    "interaction_recall",
    "library_shift",
    "library_shifts",
    "log1p_rates",
    "measured_interactions",
    "noise_corrected_error",
    "significant_interactions",
]
