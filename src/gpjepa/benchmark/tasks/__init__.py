"""What a method may see of a split, and what its predictions are held against."""

from ._calibrate import calibrated
from ._cells import CellSet, data_hash, measured_rows, standard_cells
from ._tables import standard_effects
from ._task import MIN_CELLS, SCALE, VERSION, Task, Truth, effects_of, too_small

__all__ = [
    "MIN_CELLS",
    "SCALE",
    "VERSION",
    "CellSet",
    "Task",
    "Truth",
    "calibrated",
    "data_hash",
    "measured_rows",
    "effects_of",
    "standard_cells",
    "standard_effects",
    "too_small",
]
