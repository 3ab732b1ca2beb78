"""Predictions beside simple baselines, the truth and a replicate."""

from ._compare import Comparison, compare
from ._metrics import METRICS, Metric, score

__all__ = ["METRICS", "Comparison", "Metric", "compare", "score"]
