"""GPJEPA, its module and its training plans."""

from ._gpjepa import GPJEPA
from ._held_out import REGIMES
from ._module import GPJEPAModule
from ._stage_a import Ablation, CollapseError, PretrainPlan
from ._stages_bc import ActionPlan

__all__ = [
    "REGIMES",
    "Ablation",
    "ActionPlan",
    "CollapseError",
    "GPJEPA",
    "GPJEPAModule",
    "PretrainPlan",
]
