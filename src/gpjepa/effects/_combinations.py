"""Combinations, from what is known of their targets alone and of other combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from gpjepa.perturbations import Perturbation
from gpjepa.splits import MIN_UNITS

from ._measured import Measured
from ._pairs import PairSums
from ._scales import SCALES
from ._singles import COMBINED, SURPLUS, Single, Singles
from ._stack import Experts, Stack, fit_stack
from ._unseen import PROCESS
from ._weighted import (
    COMBINATIONS,
    NOTHING,
    Estimate,
    Share,
    Sums,
    Terms,
    Weights,
    added,
    once,
    total,
)

_PRIOR_INTERACTION = 0.1
"""Squared interaction over squared effect where too few combinations were measured. On Norman's
doubles (``published`` L2 of Ahlmann-Eltze 2025: additive 2.42, no change 5.82, sampling noise
taken off) it is 0.08."""

_MOST_LOG_RATE = 300.0  # of which the exponential is a number
_LEAST_INTERACTION = 0.01
# Experts on combinations, by how many of their targets were measured alone.
BOTH = ("sum of the singles", "larger single", COMBINED, PROCESS, "saturating sum")
PARTLY = ("measured targets", "targets never measured", COMBINED, PROCESS)
NEITHER = ("sum of the targets", COMBINED, PROCESS)


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
        both, partly, neither = self._examples()
        mine = BOTH[: 4 + self._saturates]
        self.both = self._fit(both, dict.fromkeys(mine, 0.0) | {mine[0]: 0.5, PROCESS: 0.5})
        self.partly = self._fit(partly, dict.fromkeys(PARTLY, 0.0) | {PROCESS: 1.0})
        self.neither = self._fit(neither, dict.fromkeys(NEITHER, 0.0) | {PROCESS: 1.0})
        self.residual = self._residual()
        self.misfit = self._misfit(both)
        self._beyond: dict[str, tuple[list[set[str]], np.ndarray, np.ndarray]] = {}

    # Fitting

    def _examples(self) -> list[list[tuple[int, Sums]]]:
        """Measured combinations and what experts say of them, by how many targets they know."""
        both: list[tuple[int, Sums]] = []
        partly: list[tuple[int, Sums]] = []
        neither: list[tuple[int, Sums]] = []
        for context, rows in self.measured.combined.items():
            for i in rows:
                perturbation = self.effects.rows[i][1]
                known = [self.singles.known(s, context) for s in perturbation.singles]
                of_kind = both if all(known) else partly if any(known) else neither
                of_kind.append((i, self._without(perturbation, context, known, [i])))
                if not all((context, s) in self.measured.row for s in perturbation.singles):
                    continue
                # As if one, or all, of them had never been measured.
                for j, target in enumerate(perturbation.targets):
                    rest = [m != j for m in range(len(known))]
                    out = self.singles.unseen.rows_with(context, [target])
                    partly.append((i, self._without(perturbation, context, rest, out)))
                out = self.singles.unseen.rows_with(context, perturbation.targets)
                none = [False] * len(known)
                neither.append((i, self._without(perturbation, context, none, out)))
        return [both, partly, neither]

    def _without(
        self, perturbation: Perturbation, context: str, known: list[bool], out: list[int]
    ) -> Sums:
        """What experts say of a combination as if some rows, its own among them, were not there."""
        alone = list(zip(perturbation.singles, known, strict=True))
        estimates = self.singles.estimates([(s, context) for s, k in alone if k], out, bias=False)
        hidden = [s.targets[0] for s, k in alone if not k]
        # Where nothing was perturbed alone, combinations predict each other: not themselves.
        hidden = hidden if len(out) > 1 else ["+".join(perturbation.targets)]
        parts = [
            estimates[s, context] if k else self.singles.left_out(s, context, hidden)
            for s, k in alone
        ]
        means = self._means(estimates)
        said = np.array([means[s, context] for s, k in alone if k])
        [others] = self._of_others([perturbation], context, out)
        return self._experts(context, [*parts, *others], known, said)

    def _fit(self, examples: list[tuple[int, Sums]], prior: dict[str, float]) -> Stack:
        """Weights of the experts; of too few examples, those of the prior."""
        rows = [i for i, _ in examples]
        units = [self.effects.rows[i][1].targets for i in rows]
        experts = Experts(rows, units, lambda i: examples[i][1].terms())
        return fit_stack(self.measured, experts, np.array(list(prior.values())))

    def _several(self) -> list[list[int]]:
        return [rows for rows in self.measured.combined.values() if len(rows) > 1]

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
        residuals = np.vstack([self.singles.residuals, self.residual])
        apart = size = 0.0
        for i, sums in both:
            n = len(self.effects.rows[i][1].targets)
            estimate = self._expected(sums, [True] * n)
            terms = [(-weight, of) for weight, of in estimate.terms]
            distance = self.measured.assemble([[(1.0, self.measured.one(i)), *terms]])
            off = self.measured.mean(distance)[0]
            explained = self.measured.noise(distance)[0] + estimate.residual @ residuals
            explained += estimate.left.values @ self.measured.variance[estimate.left.columns]
            scored = ~self.effects.targeted([i])[0]  # targeted genes are treated by themselves
            apart += (off**2 - explained)[scored].sum()
            size += ((self.measured.values[i] - off) ** 2)[scored].sum()
        return max(apart / size, _LEAST_INTERACTION) if size > 0 else _PRIOR_INTERACTION

    # Estimates

    def estimates(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[Estimate]:
        """One mean effect for each combination and context."""
        rows = {(p, c): self.measured.row.get((c, p)) for p, c in pairs}
        measured = [row for row in rows.values() if row is not None]
        denoised = self.singles.denoiser.estimates(measured)
        found: dict[Single, Estimate] = {}
        rest = []
        for (perturbation, context), row in rows.items():
            if row is not None:
                found[perturbation, context] = denoised[row]
                continue
            carried = self.carried(perturbation, context)
            if carried is not None:
                found[perturbation, context] = carried
            else:
                rest.append((perturbation, context))
        for pair, expected in zip(rest, self.expected(rest), strict=True):
            found[pair] = replace(expected, interaction=self.misfit)
        return [found[pair] for pair in pairs]

    def carried(self, perturbation: Perturbation, context: str) -> Estimate | None:
        """A combination from other contexts, where these know it better than this one; else None."""
        if self._all_here(perturbation, context):
            return None
        sources = self.singles.as_measured(perturbation, context)
        return self.singles.carried(perturbation, context, sources)

    def expected(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[Estimate]:
        """Combinations from their singles and from other combinations, not from themselves."""
        return [
            self._expected(sums, known, self._process_knows(*pair))
            for pair, (sums, known) in zip(pairs, self._sums(pairs), strict=True)
        ]

    def said(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[tuple[Sums, np.ndarray]]:
        """Each expert on combinations that were not measured, and its weight."""
        return [
            (sums, self._weights(known, self._process_knows(*pair)))
            for pair, (sums, known) in zip(pairs, self._sums(pairs), strict=True)
        ]

    def pair_sums(self, targets: Sequence[Perturbation], context: str) -> PairSums:
        """The part of predicted pairs of some targets that is linear in what is said of these.

        Parameters
        ----------
        targets
            Perturbations of one target each.
        context
            Where.
        """
        alone = self.singles.estimates((t, context) for t in targets)
        said = np.stack(list(self._means(alone).values()))
        j = next(j for j, t in enumerate(targets) if t.targets != targets[0].targets)
        both = Perturbation.of([targets[0].targets[0], targets[j].targets[0]])
        process = self.singles.of_process([*targets, both], context)[1]
        found = self.measured.mean(self.measured.assemble([e.terms for e in process]))
        of_process, combined = found[:-1], found[-1] - found[0] - found[j]
        [(others, _)] = self._of_others([both], context)
        others = self.measured.mean(self.measured.assemble([others.terms]))[0]
        known = np.array([self.singles.known(t, context) for t in targets])
        here = np.array([self.singles.here(t, context) for t in targets])
        n = 3  # known here, known elsewhere, never measured alone
        of_alone, larger, shared = (np.zeros((n, n)) for _ in range(3))
        constant = np.zeros((n, n, said.shape[1]))
        for a, b in product(range(n), range(n)):
            process_knows = 1 not in (a, b) and context in self.singles.perturbed
            w = self._weights([a < 2, b < 2], process_knows)
            if a < 2 and b < 2:
                of_alone[a, b], larger[a, b] = w[0] + w[4:].sum(), w[1]
                of_mean, shared[a, b] = w[2:4]
            elif a < 2 or b < 2:
                of_alone[a, b], of_mean, shared[a, b] = w[0 if a < 2 else 1], w[2], w[3]
            else:
                of_alone[a, b], of_mean, shared[a, b] = w
            constant[a, b] = of_mean * others + shared[a, b] * combined
        order = np.empty(len(targets), int)
        order[np.argsort(-(said**2).sum(1), kind="stable")] = np.arange(len(targets))
        return PairSums(
            tuple(targets),
            said.astype(np.float32),
            of_process.astype(np.float32),
            np.where(known, np.where(here, 0, 1), 2),
            order,
            of_alone,
            larger,
            shared,
            constant.astype(np.float32),
        )

    def beyond_sums(self, perturbation: Perturbation, context: str) -> list[Terms]:
        """What measured combinations do beyond their singles, denoised: mean of all, and its kin's.

        Kin share a target with the combination; nothing is said where none was measured.
        """
        if context not in self._beyond:
            self._beyond[context] = self._measured_beyond(context)
        targets, weights, mean = self._beyond[context]
        kin = [i for i, t in enumerate(targets) if not t.isdisjoint(perturbation.targets)]
        rows = self.singles.denoiser.rows.get(context)
        found = [mean] if targets else []
        found += [weights[kin].mean(0)] if kin else []
        return [[(1.0, Weights.of(w, rows=rows))] for w in found]

    def _measured_beyond(self, context: str) -> tuple[list[set[str]], np.ndarray, np.ndarray]:
        """Targets of measured combinations, weights of each minus its singles, and their mean."""
        rows = self.singles.denoiser.rows.get(context, np.zeros(0, int))
        at = {self.effects.rows[i][1]: j for j, i in enumerate(rows)}
        combined = [p for p in at if len(p.targets) > 1 and all(s in at for s in p.singles)]
        weights = np.zeros((len(combined), len(at)))
        for own, p in zip(weights, combined, strict=True):
            own[at[p]] = 1
            own[[at[s] for s in p.singles]] = -1
        if combined:
            weights = self.singles.denoiser.through(context, weights, special=True)
        mean = weights.sum(0) / max(len(combined), 1)
        return [set(p.targets) for p in combined], weights, mean

    def _sums(self, pairs: Sequence[tuple[Perturbation, str]]) -> list[tuple[Sums, list[bool]]]:
        """What experts say of combinations without them, and which targets they know."""
        never = [(p, c) for p, c in pairs if (c, p) not in self.measured.row]
        alone = self.singles.estimates([(s, c) for p, c in never for s in p.singles])
        means = self._means(alone)
        by_context: dict[str, list[Perturbation]] = {}
        for p, c in never:
            by_context.setdefault(c, []).append(p)
        others = {
            (p, c): each
            for c, mine in by_context.items()
            for p, each in zip(mine, self._of_others(mine, c), strict=True)
        }
        found = []
        for perturbation, context in pairs:
            known = [self.singles.known(s, context) for s in perturbation.singles]
            row = self.measured.row.get((context, perturbation))
            if row is not None:
                sums = self._without(perturbation, context, known, [row])
            else:
                parts = [alone[s, context] for s in perturbation.singles]
                said = np.stack([means[s, context] for s in perturbation.singles])
                parts += others[perturbation, context]
                sums = self._experts(context, parts, known, said)
            found.append((sums, known))
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
            # Of a predicted combination, what it takes of them; of a measured one, nothing.
            factors = [1 - 2 * t for t in whole.singles or (0.0,) * len(parts)]
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

    def _process_knows(self, perturbation: Perturbation, context: str) -> bool:
        """Whether the process of a context has seen what is known of a combination's targets."""
        known = [s for s in perturbation.singles if self.singles.known(s, context)]
        here = all(self.singles.here(s, context) for s in known)
        return here and context in self.singles.perturbed

    def _expected(self, sums: Sums, known: list[bool], process_knows: bool = True) -> Estimate:
        """A combination from its singles, and from other combinations."""
        weights = self._weights(known, process_knows)
        expected = sums.weighted(weights)
        if not any(known) and not weights[0]:  # nothing of the targets, whose doubt it had
            expected = expected.less_sure(COMBINATIONS, 1.0)
        taken, n = weights @ sums.experts, len(known)
        # What is unknown of the singles, both the sum and the process miss.
        both = 2 * taken[n + 1] * taken[:n].mean() * sums.parts[n + 1].residual
        return replace(
            expected, residual=expected.residual + both, singles=tuple(map(float, taken[:n]))
        )

    def _weights(self, known: Sequence[bool], process_knows: bool) -> np.ndarray:
        """Weights of the experts, by which of its targets are known."""
        stack: Stack = self.neither
        names: tuple[str, ...] = NEITHER
        if any(known):
            stack, names = (self.both, BOTH) if all(known) else (self.partly, PARTLY)
        weights = stack.weights.copy()
        if not process_knows:  # what is carried over from other contexts says it in its place
            at = names.index(PROCESS)
            weights[: 2 if stack is self.partly else 1] += weights[at]
            weights[at] = 0
        return weights

    def _means(self, alone: dict[Single, Estimate]) -> dict[Single, np.ndarray]:
        """The effects that estimates stand for."""
        sums = self.measured.assemble([e.terms for e in alone.values()])
        return dict(zip(alone, self.measured.mean(sums), strict=True))

    def _experts(
        self, context: str, parts: list[Estimate], known: list[bool], said: np.ndarray
    ) -> Sums:
        """What experts say of a combination, as sums of what is said of its targets and of others.

        ``parts`` are the estimates of the targets, then the mean of the combinations and the process;
        ``said`` the effects of the targets that are known.
        """
        n, mine = len(known), np.array(known, float)
        unit = np.eye(n + 3)
        whole, last = unit[:n].sum(0), [unit[n], unit[n + 1]]
        if not any(known):
            return Sums(parts, np.stack([whole, *last])[:, :-1], NEITHER)
        if not all(known):
            measured = mine @ unit[:n]
            return Sums(parts, np.stack([measured, whole - measured, *last])[:, :-1], PARTLY)
        larger = unit[int(np.argmax((said**2).sum(1)))]
        if not self._saturates:
            return Sums(parts, np.stack([whole, larger, *last])[:, :-1], BOTH[:-1])
        parts = [*parts, self._saturation(said, context)]
        return Sums(parts, np.stack([whole, larger, *last, whole + unit[n + 2]]), BOTH)

    def _of_others(
        self, perturbations: Sequence[Perturbation], context: str, out: Sequence[int] = ()
    ) -> list[tuple[Estimate, Estimate]]:
        """The mean of the combinations, and the process, of each, without some rows."""
        mean, process = self.singles.of_process(perturbations, context, out)
        if not self.measured.combined.get(context) and self.measured.combined:
            groups = list(self.measured.combined)
            means = [self.singles.of_process([], c)[0] for c in groups]
            mean = total([m.times(1 / len(groups)) for m in means])
        return [(mean, each) for each in process]

    def _saturation(self, said: np.ndarray, context: str) -> Estimate:
        """A saturating sum of singles minus their plain sum.

        Of the rates: what singles add, adds up; what they leave of a rate is multiplied, so that it
        is never less than none.
        """
        control = self.effects.control[self.measured.scale][context].astype(float)
        before = np.expm1(control)
        after = np.expm1(np.clip(control + said, 0, _MOST_LOG_RATE))
        gained = np.maximum(after - before, 0).sum(0)
        kept = np.prod(np.minimum(after / np.maximum(before, 1e-12), 1), axis=0)
        saturating = np.log1p(before * kept + gained) - control
        nothing = replace(NOTHING, fixed=saturating - said.sum(0))
        return Estimate((Share("", "saturating sum - sum", 1.0, nothing),))


def _not_below_0(weights: Weights) -> Weights:
    whole = once(weights)
    return Weights(whole.columns, np.maximum(whole.values, 0))
