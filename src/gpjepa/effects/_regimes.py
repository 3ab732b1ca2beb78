"""How far a prediction goes from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from gpjepa.perturbations import Perturbation
from gpjepa.splits import MIN_UNITS


class Regimes:
    """What measured perturbations say of others: their regimes.

    Parameters
    ----------
    rows
        The (context, perturbation) pairs that were measured, without controls.

    Attributes
    ----------
    alone
        Targets that were perturbed alone.
    perturbed
        Targets that were perturbed, also in combinations only.
    """

    def __init__(self, rows: Sequence[tuple[str, Perturbation]]) -> None:
        self.rows = tuple(rows)
        self._measured = set(self.rows)
        self._contexts = {c for c, _ in self.rows}
        self.perturbed = {t for _, p in self.rows for t in p.targets}
        self._alone_here: dict[str, set[str]] = {c: set() for c in self._contexts}
        for c, p in self.rows:
            if len(p.targets) == 1:
                self._alone_here[c].update(p.targets)
        self.alone = {t for targets in self._alone_here.values() for t in targets}

    @cached_property
    def measured_in(self) -> dict[Perturbation, tuple[str, ...]]:
        """Contexts of each perturbation, in the order of the rows."""
        found: dict[Perturbation, list[str]] = {}
        for context, perturbation in self.rows:
            found.setdefault(perturbation, []).append(context)
        return {p: tuple(contexts) for p, contexts in found.items()}

    def can_be_carried(self, perturbation: Perturbation, context: str) -> bool:
        """Whether a perturbation was measured in enough other contexts to say something of this.

        In two; or in one, if nothing was measured in this, or enough that was measured there too,
        and the target in no combination of this.
        """
        others = [c for c in self.measured_in.get(perturbation, ()) if c != context]
        if len(others) != 1:
            return len(others) > 1
        return context not in self._contexts or self.few_shot(perturbation, context)

    def few_shot(self, perturbation: Perturbation, context: str) -> bool:
        """Whether a context has enough effects of its own to say what others are worth in it.

        For a target that it has in no perturbation.
        """
        if len(perturbation.targets) != 1 or len(self._shared.get(context, ())) < MIN_UNITS:
            return False
        return perturbation.targets[0] not in self._here[context]

    @cached_property
    def _shared(self) -> dict[str, set[str]]:
        """Targets of each context that were perturbed alone, at the same dose, in others too."""
        found: dict[str, set[str]] = {}
        for perturbation, contexts in self.measured_in.items():
            if len(contexts) > 1 and len(perturbation.targets) == 1:
                for context in contexts:
                    found.setdefault(context, set()).update(perturbation.targets)
        return found

    @cached_property
    def _here(self) -> dict[str, set[str]]:
        """Targets perturbed in each context, also in combinations."""
        found: dict[str, set[str]] = {}
        for context, perturbation in self.rows:
            found.setdefault(context, set()).update(perturbation.targets)
        return found

    def of(self, perturbation: Perturbation, context: str) -> str:
        """What was known of the perturbation in the context."""
        if perturbation.is_control:
            return "control"
        if (context, perturbation) in self._measured:
            return "seen"
        here = self._alone_here.get(context, set())
        known = [t in here for t in perturbation.targets]
        if len(known) == 1 and known[0]:
            return "new dose"
        alone = all((context, s) in self._measured for s in perturbation.singles)
        if context not in self._contexts:
            return "new context"
        if not alone and self.can_be_carried(perturbation, context):
            return "new context"
        away = [s for s, k in zip(perturbation.singles, known, strict=True) if not k]
        if any(self.can_be_carried(s, context) for s in away):
            return "new context"
        if len(known) == 1:
            # Of a target that one other context knows, this context's own targets speak.
            known_elsewhere = perturbation.targets[0] in self.alone
            never = known_elsewhere or self.never_perturbed(perturbation)
            return "unseen" if never else "in combinations"
        return "seen2" if all(known) else "seen1" if any(known) else "seen0"

    def never_perturbed(self, perturbation: Perturbation) -> bool:
        """Whether one of the targets occurs in no measured perturbation."""
        return not self.perturbed.issuperset(perturbation.targets)
