"""Which perturbation comes nearest to a goal, and what to measure next."""

from ._constraints import Constraints
from ._design import Design, Power, design, power
from ._goals import CellState, Goal, Objective, Score, Signature, TowardsCells, TowardsEffect
from ._latent import latent_energy
from ._model import EffectModel, OfFunction, OfPredictor, as_model
from ._plan import Plan, plan
from ._rank import rank
from ._result import Ranking, Why
from ._reverse import Reversal, reverse

__all__ = [
    "CellState",
    "Constraints",
    "Design",
    "EffectModel",
    "Goal",
    "Objective",
    "OfFunction",
    "OfPredictor",
    "Plan",
    "Power",
    "Ranking",
    "Reversal",
    "Score",
    "Signature",
    "TowardsCells",
    "TowardsEffect",
    "Why",
    "as_model",
    "design",
    "latent_energy",
    "plan",
    "power",
    "rank",
    "reverse",
]
