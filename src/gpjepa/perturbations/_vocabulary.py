from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from ._features import TargetFeatures
from ._perturbation import Perturbation


class UnknownTargetError(KeyError):
    """A target that is neither perturbed in training nor known by any feature."""

    def __str__(self) -> str:
        return str(self.args[0])


class Vocabulary:
    """The targets a model can speak of.

    Parameters
    ----------
    perturbed
        Targets of the training perturbations, in any order.
    named
        Further names: the genes measured, and those that the user declares.
    features
        Features of targets, which may never have been perturbed.

    Attributes
    ----------
    index
        Places of the perturbed targets, then of the other names.
    """

    def __init__(
        self,
        perturbed: Iterable[str],
        named: Iterable[str] = (),
        features: Sequence[TargetFeatures] = (),
    ) -> None:
        self._perturbed = set(perturbed)
        self.perturbed = tuple(sorted(self._perturbed))
        names = (*self.perturbed, *sorted(set(named) - set(self.perturbed)))
        self.index = {name: i for i, name in enumerate(names)}
        self.features = tuple(features)
        self._featured = {t for f in self.features for t in f.targets}
        # The same gene by another of its names would be taken for a target never perturbed.
        # What was perturbed comes first, as it does in the index.
        self._here: dict[str, str] = {}
        for kind in self.features:
            for name in self.index:
                if (symbol := kind.called(name)) is not None:
                    self._here.setdefault(symbol, name)

    def __len__(self) -> int:
        return len(self.index)

    def place(self, target: str) -> int:
        """Place of a target; the one after the last if only features know it."""
        return self.index.get(target, len(self.index))

    def _other_name(self, target: str) -> str | None:
        """What a target is called here, or by its symbol, if that is another name."""
        symbols = [s for f in self.features if (s := f.called(target)) is not None]
        if not symbols:
            return None
        name = self._here.get(symbols[0], symbols[0])
        # A measured gene is what it is called, unless the same gene was perturbed by another name.
        mine = name == target or (target in self.index and name not in self._perturbed)
        return None if mine else name

    def check(self, perturbation: Perturbation) -> None:
        """Refuse targets about which nothing is known.

        Raises
        ------
        UnknownTargetError
            Naming the unknown targets and the nearest known names.
        """
        unknown = []
        for target in perturbation.targets:
            if target in self._perturbed:
                continue
            if name := self._other_name(target):
                known = f"called {name!r} here" if name in self.index else f"symbol: {name!r}"
                unknown.append(f"{target!r} ({known})")
            elif target not in self.index and target not in self._featured:
                near = self._nearest(target)
                unknown.append(f"{target!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
        if not unknown:
            return
        n_featured = len(self._featured - set(self.index))
        raise UnknownTargetError(
            f"Unknown target {', '.join(unknown)} in {str(perturbation)!r}. Known are the "
            f"{len(self.perturbed)} targets perturbed in training and "
            f"{len(self) + n_featured - len(self.perturbed)} measured genes and targets with "
            "features. If the name is correct, declare it: GPJEPA(adata, targets=[...])."
        )

    def _nearest(self, target: str) -> list[str]:
        by_lower = {name.lower(): name for name in (*sorted(self._featured), *self.index)}
        return [by_lower[n] for n in get_close_matches(target.lower(), by_lower, n=3)]
