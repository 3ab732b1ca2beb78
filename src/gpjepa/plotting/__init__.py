"""Figures over frames and arrays. Those with one panel draw into ``ax`` if it is given."""

from ._benchmark import benchmark_overview, benchmark_scores, calibration, scaling
from ._effects import (
    effect_heatmap,
    effect_scatter,
    enrichment,
    explanation,
    method_errors,
    top_genes,
    volcano,
)
from ._history import history
from ._planning import design, goal_scatter, ranking, trade_off

__all__ = [
    "benchmark_overview",
    "benchmark_scores",
    "calibration",
    "design",
    "effect_heatmap",
    "effect_scatter",
    "enrichment",
    "explanation",
    "goal_scatter",
    "history",
    "method_errors",
    "ranking",
    "scaling",
    "top_genes",
    "trade_off",
    "volcano",
]
