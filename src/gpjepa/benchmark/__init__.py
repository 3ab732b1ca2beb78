"""Methods, metrics and splits that nobody can call unfair; predictions beside baselines."""

from ._compare import COMPARED, Comparison, compare
from ._config import BenchmarkConfig, presets
from ._measures import energy_distance_unbiased, risk_coverage
from ._methods import METHODS, NEGATIVE, ORACLES, Method
from ._metrics import INTERVALS, METRICS, Metric, score
from ._peers import PEERS, make_environment
from ._runner import BenchmarkResult, run
from ._scoring import Prediction, Scoring
from ._summary import calibration, summarise, verdicts
from ._tasks import CellSet, Task, Truth, moved, standard_cells

__all__ = [
    "COMPARED",
    "INTERVALS",
    "METHODS",
    "METRICS",
    "NEGATIVE",
    "ORACLES",
    "PEERS",
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
    "calibration",
    "compare",
    "energy_distance_unbiased",
    "make_environment",
    "moved",
    "presets",
    "risk_coverage",
    "run",
    "score",
    "standard_cells",
    "summarise",
    "verdicts",
]
