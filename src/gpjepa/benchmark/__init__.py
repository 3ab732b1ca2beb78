"""Methods, metrics and splits that nobody can call unfair; predictions beside baselines."""

from ._compare import COMPARED, Comparison, compare
from ._config import BenchmarkConfig, presets
from ._result import BenchmarkResult
from ._runner import run
from ._statistics import calibration, risk_coverage, summarise, verdicts
from .methods import METHODS, NEGATIVE, ORACLES, Method, Prediction
from .metrics import INTERVALS, METRICS, Metric, Scoring, avg_bio, energy_distance_unbiased, score
from .tasks import CellSet, Task, Truth, calibrated, standard_cells

__all__ = [
    "COMPARED",
    "INTERVALS",
    "METHODS",
    "METRICS",
    "NEGATIVE",
    "ORACLES",
    "BenchmarkConfig",
    "BenchmarkResult",
    "CellSet",
    "Comparison",
    "Method",
    "Metric",
    "Prediction",
    "Scoring",
    "Task",
    "Truth",
    "avg_bio",
    "calibrated",
    "calibration",
    "compare",
    "energy_distance_unbiased",
    "presets",
    "risk_coverage",
    "run",
    "score",
    "standard_cells",
    "summarise",
    "verdicts",
]
