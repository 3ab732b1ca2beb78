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

__all__ = [
    "benchmark_overview",
    "benchmark_scores",
    "calibration",
    "effect_heatmap",
    "effect_scatter",
    "enrichment",
    "explanation",
    "history",
    "method_errors",
    "scaling",
    "top_genes",
    "volcano",
]
