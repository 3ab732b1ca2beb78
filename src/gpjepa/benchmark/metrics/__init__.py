"""Metrics: each is declared once, with what it needs and what it cannot see."""

from ._cell_eval import cell_eval_config, cell_eval_version
from ._cells import energy_distance_unbiased
from ._effect import N_HIGHEST, correlation
from ._registry import DENOMINATORS, INTERVALS, METRICS, score
from ._scoring import Scoring
from ._spec import Metric
from ._states import avg_bio

__all__ = [
    "DENOMINATORS",
    "INTERVALS",
    "METRICS",
    "N_HIGHEST",
    "Metric",
    "Scoring",
    "avg_bio",
    "cell_eval_config",
    "cell_eval_version",
    "correlation",
    "energy_distance_unbiased",
    "score",
]
