"""Combinations, from what is known of their targets alone and of other combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gpjepa.perturbations import Perturbation
from gpjepa.splits import MIN_UNITS

from ._measured import Measured
from ._scales import SCALES
from ._singles import SURPLUS, Single, Singles
from ._stack import Experts, Stack, fit_stack, shrink
from ._weighted import COMBINATIONS, NOTHING, Estimate, Share, Sums, Weights, added, once, total

_PRIOR_INTERACTION = 0.1
"""Squared interaction over squared effect where too few combinations were measured. On Norman's
doubles (``published`` L2 of Ahlmann-Eltze 2025: additive 2.42, no change 5.82, sampling noise
taken off) it is 0.08."""

_LEAST_INTERACTION = 0.01
# Experts on combinations, by how many of their targets were measured alone.
_OTHERS = "mean of the combinations"
_BOTH = ("sum of the singles", "larger single", _OTHERS, "saturating sum")
_PARTLY = ("measured targets", "targets never measured", _OTHERS)
_NEITHER = ("sum of the targets", _OTHERS)


class Combinations:
    """What is known of combinations on one scale.

    Attributes
    ----------
    both, partly, neither
        Weights of the experts, by how many targets were measured alone.
    misfit
        Squared interaction over squared predicted effect.
    residual
        Variance of combinations around what their mean says, shape (n_genes,).
    """

    def __init__(self, measured: Measured, singles: Singles) -> None:
        self.measured, self.singles, self.effects = measured, singles, measured.effects
        # Of what is no expression, or of no known rate, nothing is multiplied.
        self._saturates = self.effects.has_controls and measured.scale in SCALES
        self._whole = {c: Weights.equal(rows) for c, rows in measured.combined.items()}
        self._with: dict[tuple[str, str], set[int]] = {}
        for context, rows in measured.combined.items():
            for i in rows:
                for target in self.effects.rows[i][1].targets:
                    self._with.setdefault((context, target), set()).add(i)
        both, partly, neither = self._examples()
        self.both = self._fit(both, np.eye(3 + self._saturates)[0])
        self.partly = self._fit(partly, np.array([1.0, 1.0, 0.0]))
        self.neither = self._fit(neither, self._prior_of_neither())
        self.residual = self._residual()
        self.misfit = self._misfit(both)

    # Fitting

    def _examples(self) -> list[list[tuple[int, Sums]]]:
        """Measured combinations and what experts say of them, by how many targets they know."""
        both: list[tuple[int, Sums]] = []
        partly: list[tuple[int, Sums]] = []
        neither: list[tuple[int, Sums]] = []
        for context, rows in self.measured.combined.items():
            pairs = [self.effects.rows[i][1] for i in rows]
            alone = self.singles.estimates((s, context) for p in pairs for s in p.singles)
            means = self._means(alone)
            for i, perturbation in zip(rows, pairs, strict=True):
                singles = perturbation.singles
                known = [self.singles.known(s, context) for s in singles]
                # Where nothing was perturbed alone, combinations predict each other: not themselves.
                own = ["+".join(perturbation.targets)]
                parts = [
                    alone[s, context] if k else self.singles.left_out(s, context, own)
                    for s, k in zip(singles, known, strict=True)
                ]
                others = self._mean_combination(context, without=i)
                if not all(known):
                    some = _some_known if any(known) else _none_known
                    (partly if any(known) else neither).append((i, some(parts, known, others)))
                    continue
                said = np.stack([means[s, context] for s in singles])
                both.append((i, self._all_known(parts, others, said, context)))
                if not all((context, s) in self.measured.row for s in singles):
                    continue
                # As if one, or all, of them had never been measured alone.
                for j, single in enumerate(singles):
                    out = self.singles.left_out(single, context, single.targets)
                    rest = [*parts[:j], out, *parts[j + 1 :]]
                    measured = [m != j for m in range(len(parts))]
                    few = self._without(context, single.targets)
                    partly.append((i, _some_known(rest, measured, few)))
                out_of = perturbation.targets
                none = [self.singles.left_out(s, context, out_of) for s in singles]
                neither.append((i, _none_known(none, known, self._without(context, out_of))))
        return [both, partly, neither]

    def _fit(self, examples: list[tuple[int, Sums]], prior: np.ndarray) -> Stack:
        rows = [i for i, _ in examples]
        units = [self.effects.rows[i][1].targets for i in rows]
        experts = Experts(rows, units, lambda i: examples[i][1].terms())
        return fit_stack(self.measured, experts, prior)

    def _several(self) -> list[list[int]]:
        return [rows for rows in self.measured.combined.values() if len(rows) > 1]

    def _prior_of_neither(self) -> np.ndarray:
        """The mean of the combinations, as far as it says something of another one.

        The sum of the targets if fewer than two combinations of a context show it.
        """
        several = self._several()
        if not several:
            return np.array([1.0, 0.0])
        square = left = 0.0
        n_rows = len(self.measured.values)
        for rows in several:
            values = self.measured.values[rows]
            mean = values.mean(0)
            square += (mean**2).sum()
            # How far combinations lie apart, and the noise of the controls that they share.
            left += ((values - mean) ** 2).sum() / (len(rows) - 1) / len(rows)
            sums = self.measured.assemble([[(1.0, Weights.equal(rows))]])
            on_strata = self.measured.on_strata(sums)
            left += (on_strata**2 @ self.measured.totals[n_rows:]).sum()
        return np.array([0.0, max(1 - left / square, 0.0) if square > 0 else 0.0])

    def _residual(self) -> np.ndarray:
        """Of combinations around their mean without noise, and what is not taken of that mean."""
        spread, values = self.singles.spread, self.measured.values
        found = [
            values[r].var(0, ddof=1) - self.measured.variance[r].mean(0) for r in self._several()
        ]
        residual = np.maximum(np.mean(found, 0), 0) + SURPLUS * spread if found else spread
        if self.measured.combined:
            means = [values[rows].mean(0) ** 2 for rows in self.measured.combined.values()]
            untaken = (1 - min(self.neither.weights[1], 1)) ** 2
            residual = residual + untaken * np.mean(means, 0)
        return residual

    def _misfit(self, both: list[tuple[int, Sums]]) -> float:
        """Squared interaction over squared predicted effect, freed of sampling noise."""
        if self.both.n_units < MIN_UNITS:
            return _PRIOR_INTERACTION
        apart = size = 0.0
        for i, sums in both:
            estimate = sums.weighted(self.both.weights)
            terms = [(-weight, of) for weight, of in estimate.terms]
            distance = self.measured.assemble([[(1.0, self.measured.one(i)), *terms]])
            off = self.measured.mean(distance)[0]
            apart += (off**2).sum() - self.measured.noise(distance).sum()
            apart -= (estimate.left.values * self.measured.totals[estimate.left.columns]).sum()
            size += ((self.measured.values[i] - off) ** 2).sum()
        return max(apart / size, _LEAST_INTERACTION) if size > 0 else _PRIOR_INTERACTION

    # Estimates

    def estimates(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[Estimate]:
        """One mean effect for each combination and context."""
        found = []
        for (perturbation, context), expected in zip(pairs, self.expected(pairs), strict=True):
            measured = self.measured.row.get((context, perturbation))
            carried = None
            if measured is None and not self._all_here(perturbation, context):
                sources = self.singles.as_measured(perturbation, context)
                carried = self.singles.carried(perturbation, context, sources)
            if carried is not None:
                found.append(carried)
            elif measured is None:
                found.append(replace(expected, interaction=self.misfit))
            else:
                found.append(self._towards(measured, expected))
        return found

    def expected(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[Estimate]:
        """Combinations from their singles and from other combinations, not from themselves."""
        alone = self.singles.estimates((s, c) for p, c in pairs for s in p.singles)
        means = self._means(alone)
        found = []
        for perturbation, context in pairs:
            parts = [alone[s, context] for s in perturbation.singles]
            said = np.stack([means[s, context] for s in perturbation.singles])
            found.append(self._expected(perturbation, context, parts, said))
        return found

    def interactions(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[Estimate]:
        """Combinations minus the sum of their singles.

        What is unknown of a single is in both, as far as the combination is made of it.
        """
        alone = self.singles.estimates((s, c) for p, c in pairs for s in p.singles)
        found = []
        for (perturbation, context), whole in zip(pairs, self.estimates(pairs), strict=True):
            parts = [alone[s, context] for s in perturbation.singles]
            summed = total([whole, *(part.times(-1) for part in parts)])
            # A measured combination's own doubt is that of its distance from what was expected.
            measured = (context, perturbation) in self.measured.row
            taken = whole.singles or (0.0,) * len(parts)
            factors = [(t - 1) ** 2 - (0 if measured else t**2) for t in taken]
            left, bias, residual = [whole.left], [whole.bias], whole.residual.copy()
            for part, factor in zip(parts, factors, strict=True):
                left.append(part.left.times(factor))
                bias.append(part.bias.times(factor))
                residual += factor * part.residual
            found.append(
                replace(
                    summed,
                    left=_not_below_0(added(left)),
                    bias=_not_below_0(added(bias)),
                    residual=np.maximum(residual, 0),
                    interaction=whole.interaction,
                )
            )
        return found

    def _all_here(self, perturbation: Perturbation, context: str) -> bool:
        return all((context, s) in self.measured.row for s in perturbation.singles)

    def _expected(
        self, perturbation: Perturbation, context: str, parts: list[Estimate], said: np.ndarray
    ) -> Estimate:
        """A combination from its singles alone."""
        known = [self.singles.known(s, context) for s in perturbation.singles]
        own = self.measured.row.get((context, perturbation))
        others = self._mean_combination(context, own)
        if all(known):
            stack, experts = self.both, self._all_known(parts, others, said, context)
        elif any(known):
            stack, experts = self.partly, _some_known(parts, known, others)
        else:
            stack, experts = self.neither, _none_known(parts, known, others)
        expected = experts.weighted(stack.weights)
        if not any(known) and not stack.weights[0]:  # nothing of the targets, whose doubt it had
            expected = expected.less_sure(COMBINATIONS, 1.0)
        taken = stack.weights @ experts.experts
        return replace(expected, singles=tuple(map(float, taken[: len(parts)])))

    def _towards(self, row: int, expected: Estimate) -> Estimate:
        """A measured combination, shrunk towards what its singles say."""
        n_rows = len(self.measured.values)
        if any((of.columns >= n_rows).any() for _, of in expected.terms):
            expected = Estimate()  # a sum that rests on controls elsewhere is no target
        shrunken = shrink(self.measured, [row], [lambda j: expected.terms])
        factor, name = float(shrunken.factor[0]), str(self.effects.rows[row][1])
        rest = expected.times(1 - factor)
        return Estimate(
            (Share(name, "measured effect", factor, self.measured.one(row)), *rest.shares),
            left=shrunken.left[0],
            bias=shrunken.bias[0],
            singles=rest.singles,
        )

    def _means(self, alone: dict[Single, Estimate]) -> dict[Single, np.ndarray]:
        """The effects that estimates stand for."""
        sums = self.measured.assemble([e.terms for e in alone.values()])
        return dict(zip(alone, self.measured.mean(sums), strict=True))

    def _all_known(
        self, parts: list[Estimate], others: Estimate, said: np.ndarray, context: str
    ) -> Sums:
        """Experts where all targets were measured alone, with effects ``said``."""
        n, last = len(parts), np.eye(len(parts) + 2)
        whole = last[:n].sum(0)
        experts = [whole, last[int(np.argmax((said**2).sum(1)))], last[n]]
        parts = [*parts, others]
        if not self._saturates:
            return Sums(parts, np.stack(experts)[:, :-1], _BOTH[:-1])
        experts.append(whole + last[n + 1])
        return Sums([*parts, self._saturation(said, context)], np.stack(experts), _BOTH)

    def _saturation(self, said: np.ndarray, context: str) -> Estimate:
        """A saturating sum of singles minus their plain sum.

        Of the rates: what singles add, adds up; what they leave of a rate is multiplied, so that it
        is never less than none.
        """
        control = self.effects.control[self.measured.scale][context].astype(float)
        before = np.expm1(control)
        after = np.expm1(np.maximum(control + said, 0))
        gained = np.maximum(after - before, 0).sum(0)
        kept = np.prod(np.minimum(after / np.maximum(before, 1e-12), 1), axis=0)
        saturating = np.log1p(before * kept + gained) - control
        nothing = replace(NOTHING, fixed=saturating - said.sum(0))
        return Estimate((Share("", "saturating sum - sum", 1.0, nothing),))

    def _mean_combination(self, context: str, without: int | None = None) -> Estimate:
        """Mean effect of the measured combinations, but for one row; else of other contexts."""
        mine = self.measured.combined.get(context, [])
        if without is not None or mine:
            return self._mean_but(context, set() if without is None else {without} & set(mine))
        groups = list(self.measured.combined.values())
        weights = added(Weights.equal(rows, 1 / len(groups)) for rows in groups)
        return Estimate((Share("", _OTHERS, 1.0, weights),))

    def _without(self, context: str, targets: Sequence[str]) -> Estimate:
        """Mean effect of the combinations that have none of the targets."""
        return self._mean_but(context, set().union(*(self._with[context, t] for t in targets)))

    def _mean_but(self, context: str, out: set[int]) -> Estimate:
        """Mean effect of the combinations of a context but for some: of all, minus those few."""
        whole = self._whole.get(context, NOTHING)
        n = len(whole.columns)
        left = n - len(out)
        if not left:
            return Estimate((Share("", _OTHERS, 1.0, NOTHING),))
        shares = [Share("", _OTHERS, n / left, whole)]
        if out:
            shares.append(Share("", _OTHERS, -len(out) / left, Weights.equal(sorted(out))))
        return Estimate(tuple(shares))


def _some_known(parts: list[Estimate], known: list[bool], others: Estimate) -> Sums:
    measured = np.array([*known, False], float)
    last = np.eye(len(parts) + 1)[-1]
    return Sums([*parts, others], np.vstack([measured, 1 - measured - last, last]), _PARTLY)


def _none_known(parts: list[Estimate], known: list[bool], others: Estimate) -> Sums:
    last = np.eye(len(parts) + 1)[-1]
    return Sums([*parts, others], np.vstack([1 - last, last]), _NEITHER)


def _not_below_0(weights: Weights) -> Weights:
    whole = once(weights)
    return Weights(whole.columns, np.maximum(whole.values, 0))
