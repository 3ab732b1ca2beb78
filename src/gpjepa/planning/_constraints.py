"""What a choice must not do, and what it may be made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np

from gpjepa.perturbations import Perturbation

from ._model import EffectModel, check_genes


@dataclass(frozen=True)
class Constraints:
    """Limits on what is chosen.

    Side effects are the root mean square of predicted changes over all genes that should be left
    alone, and over all genes in contexts that should not change.

    Parameters
    ----------
    leave_alone
        Genes that should not change where the goal is.
    unchanged_in
        Other contexts, in which nothing should change.
    max_change
        Largest side effect, in the model's units.
    weight
        What a unit of side effect takes off the score.
    max_targets
        Targets in a combination.
    allowed, forbidden
        Targets that may, or must not, be used.
    cost
        Cost of targets; 0 of those not named.
    max_cost
        Largest cost of a combination.
    min_dose, max_dose
        Doses that may be used.
    """

    leave_alone: Sequence[str] = ()
    unchanged_in: Sequence[str] = ()
    max_change: float | None = None
    weight: float = 0.0
    max_targets: int | None = None
    allowed: Collection[str] | None = None
    forbidden: Collection[str] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    max_cost: float | None = None
    min_dose: float | None = None
    max_dose: float | None = None

    def __post_init__(self) -> None:
        for name in ("leave_alone", "unchanged_in", "allowed", "forbidden"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise TypeError(f"{name}={given!r} is one name; give a list.")
            if given is not None:  # also of a generator; each once
                object.__setattr__(self, name, tuple(dict.fromkeys(given)))

    def check(self, model: EffectModel, context: str) -> None:
        """Refuse what contradicts itself, or names what the model does not know."""
        check_genes(model, self.leave_alone, "leave_alone")
        unknown = [c for c in self.unchanged_in if c not in model.contexts]
        if unknown or context in self.unchanged_in:
            raise ValueError(
                f"unchanged_in={list(self.unchanged_in)} must name contexts other than {context!r}, "
                f"where the goal is; known are {model.contexts}."
            )
        limits = {
            "max_change": self.max_change,
            "weight": self.weight,
            "max_cost": self.max_cost,
            "min_dose": self.min_dose,
            "max_dose": self.max_dose,
            **{f"cost of {target}": value for target, value in self.cost.items()},
        }
        wrong = [f"{k}={v}" for k, v in limits.items() if v is not None and not v >= 0]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: expected a number from 0.")
        if (self.max_change is not None or self.weight) and not self.protects:
            raise ValueError(
                "max_change and weight need something that should not change: name genes in "
                "leave_alone, or contexts in unchanged_in."
            )
        both = sorted({*(self.allowed or ())} & {*self.forbidden})
        if both:
            raise ValueError(f"Targets that are both allowed and forbidden: {both[:5]}.")
        if None not in (self.min_dose, self.max_dose) and self.min_dose > self.max_dose:  # type: ignore[operator]
            raise ValueError(f"min_dose={self.min_dose} is above max_dose={self.max_dose}.")

    def check_targets(self, known: Collection[str]) -> None:
        """Refuse names of targets that are none."""
        for name in ("allowed", "forbidden", "cost"):
            unknown = [t for t in getattr(self, name) or () if t not in known]
            if unknown:
                upper = {k.upper(): k for k in known}
                near = {
                    upper[c] for t in unknown[:5] for c in get_close_matches(t.upper(), upper, 1)
                }
                hint = f" Did you mean {', '.join(sorted(near))}?" if near else ""
                raise ValueError(
                    f"{name} names what is not a target here: {', '.join(unknown[:5])}"
                    f"{' ...' * (len(unknown) > 5)}.{hint}"
                )

    @property
    def protects(self) -> bool:
        """Whether anything should not change."""
        return bool(self.leave_alone or self.unchanged_in)

    def protected(self, model: EffectModel, context: str) -> dict[str, np.ndarray]:
        """Genes of each context that should not change."""
        found = {c: np.arange(len(model.genes)) for c in self.unchanged_in}
        if self.leave_alone:
            found[context] = check_genes(model, self.leave_alone, "leave_alone")
        return found

    def costs(self, perturbations: Sequence[Perturbation]) -> np.ndarray:
        """Cost of each, shape (n,)."""
        return np.array([sum(self.cost.get(t, 0.0) for t in p.targets) for p in perturbations])

    def permits(self, perturbation: Perturbation) -> bool:
        """Whether it is made of what may be used, whatever its effect."""
        low, high = self.min_dose or 0.0, np.inf if self.max_dose is None else self.max_dose
        return (
            (self.max_targets is None or len(perturbation.targets) <= self.max_targets)
            and (self.allowed is None or all(t in self.allowed for t in perturbation.targets))
            and not any(t in self.forbidden for t in perturbation.targets)
            and all(low <= d <= high for d in perturbation.doses)
            and (self.max_cost is None or self.costs([perturbation])[0] <= self.max_cost)
        )
