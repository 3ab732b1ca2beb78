"""GPJEPA, its module and its training plans."""

from ._gpjepa import GPJEPA
from ._held_out import REGIMES
from ._module import GPJEPAModule
from ._plans import ActionPlan
from ._pretrain import CollapseError, PretrainPlan

__all__ = ["REGIMES", "GPJEPA", "ActionPlan", "CollapseError", "GPJEPAModule", "PretrainPlan"]
