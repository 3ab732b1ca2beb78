"""GPJEPA, its module and its training plans."""

from ._gpjepa import GPJEPA
from ._module import GPJEPAModule
from ._stage_a import Ablation, CollapseError, PretrainPlan
from ._stages_bc import ActionPlan
from ._summary import REGIMES

__all__ = [
    "REGIMES",
    "Ablation",
    "ActionPlan",
    "CollapseError",
    "GPJEPA",
    "GPJEPAModule",
    "PretrainPlan",
]
