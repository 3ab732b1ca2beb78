from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from ._perturbation import Perturbation


class UnknownTargetError(KeyError):
    """A target that is neither perturbed in training nor known by any feature."""

    def __str__(self) -> str:
        return str(self.args[0])


class Vocabulary:
    """The targets a model can speak of: those perturbed in training, then those with features.

    Parameters
    ----------
    perturbed
        Targets of the training perturbations, in any order.
    featured
        Names that have features although they may never have been perturbed: the genes measured,
        and the targets that target features cover.
    """

    def __init__(self, perturbed: Iterable[str], featured: Sequence[str] = ()) -> None:
        self.perturbed = tuple(sorted(set(perturbed)))
        names = (*self.perturbed, *sorted(set(featured) - set(self.perturbed)))
        self.index = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.index)

    def check(self, perturbation: Perturbation) -> None:
        """Refuse targets about which nothing is known.

        Raises
        ------
        UnknownTargetError
            Naming the unknown targets and the nearest known names.
        """
        unknown = [t for t in perturbation.targets if t not in self.index]
        if not unknown:
            return
        by_lower = {name.lower(): name for name in self.index}
        said = []
        for target in unknown:
            near = [by_lower[n] for n in get_close_matches(target.lower(), by_lower, n=3)]
            said.append(f"{target!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
        raise UnknownTargetError(
            f"Unknown target {', '.join(said)} in {str(perturbation)!r}. Known are the "
            f"{len(self.perturbed)} targets perturbed in training and "
            f"{len(self) - len(self.perturbed)} measured genes and targets with "
            "features. If the name is correct, declare it: GPJEPA(adata, targets=[...])."
        )
