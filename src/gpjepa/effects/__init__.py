"""Mean effects: the table, noise-corrected error, the baselines and the anchor."""

from ._anchor import AnchorPrediction, EffectAnchor
from ._baselines import Additive, MeanEffect, NoChange
from ._library import library_shift, library_shifts
from ._scales import PER, SCALES, Scale, check_scale, expected_log1p, log1p_rates
from ._table import EffectTable, effect_table, noise_corrected_error

__all__ = [
    "PER",
    "SCALES",
    "Additive",
    "AnchorPrediction",
    "EffectAnchor",
    "EffectTable",
    "MeanEffect",
    "NoChange",
    "Scale",
    "check_scale",
    "effect_table",
    "expected_log1p",
    "library_shift",
    "library_shifts",
    "log1p_rates",
    "noise_corrected_error",
]
