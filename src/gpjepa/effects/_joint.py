"""Predicted mean effects together: draws in which what they have in common goes together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self
from zlib import crc32

import numpy as np

from gpjepa.perturbations import Perturbation

from ._estimates import ScaleFit
from ._measured import blocks
from ._weighted import Estimate

Pair = tuple[Perturbation, str]


@dataclass(frozen=True)
class JointEffects:
    r"""Predicted mean effects of several pairs of perturbation and context, with their errors.

    The error of a pair is

    .. math:: \sum_r w_r \epsilon_r + \sum_t f_t \delta_t + \eta

    with the sampling errors :math:`\epsilon_r` of the measured profiles, of which it is made with
    weights :math:`w_r`; what is unknown of its targets, :math:`\delta_t`; and what is unknown of it
    alone, :math:`\eta`. Two pairs that share controls, measured effects or targets share their errors.

    Errors of genes go together, too: sampling errors as in parts of the control cells, and what is
    unknown as in the measured effects.

    Attributes
    ----------
    pairs
        The pairs.
    mean, variance
        Shape (n_pairs, n_genes).
    regime
        Of each pair.
    floor
        What no effect can be less than, shape (n_pairs, n_genes); None where nothing is known.
    """

    pairs: tuple[Pair, ...]
    mean: np.ndarray
    variance: np.ndarray
    regime: list[str]
    floor: np.ndarray | None
    _errors: _Errors

    @classmethod
    def of(
        cls,
        fit: ScaleFit,
        pairs: Sequence[Pair],
        mean: np.ndarray,
        variance: np.ndarray,
        regime: list[str],
        floor: np.ndarray | None,
    ) -> Self:
        """From a fitted anchor's estimates; ``mean`` and ``variance`` are its predictions."""
        return cls(tuple(pairs), mean, variance, regime, floor, _Errors.of(fit, pairs, mean))

    def moved(self, mean: np.ndarray, variance: np.ndarray) -> Self:
        """With other means and variances, and errors that go together as they did."""
        return replace(self, mean=mean, variance=variance)

    def draws(self, n: int, seed: int = 0) -> Iterator[np.ndarray]:
        """Draws of all effects, each of shape (n_pairs, n_genes).

        The k-th draw of a pair is the same whatever pairs it is drawn with.
        """
        structural = np.maximum(self._errors.variance, 1e-30)
        scale = np.sqrt(self.variance / structural).astype(np.float32)
        for error in self._errors.draws(n, seed):
            drawn = self.mean + scale * error
            yield drawn if self.floor is None else np.maximum(drawn, self.floor)

    def shares(self) -> dict[str, np.ndarray]:
        """Share of each source of doubt in the variance summed over genes, shape (n_pairs,) each.

        ``"sampling noise"``, ``"its targets"`` (what is unknown of them) and ``"itself"`` (what is
        unknown of it alone, such as an interaction).
        """
        return self._errors.shares()


@dataclass(frozen=True)
class _Errors:
    """Errors before they are brought to the stated variance.

    Attributes
    ----------
    weights
        Of the profiles, shape (n_pairs, n_profiles).
    profile_sd
        Shape (n_profiles, n_genes).
    factors
        How often a pair takes what is unknown of each target, shape (n_pairs, n_keys).
    key_sd, own_sd
        Shapes (n_keys, n_genes) and (n_pairs, n_genes).
    keys, own
        Names of the random streams.
    is_key
        Which pairs are keys themselves: those that were measured, and single targets.
    measured
        Context of the keys that were measured, of which what is unknown is like noise; "" of others.
    of_context
        Context of each profile.
    noise, effects
        Directions in which genes vary together, by context, and of effects, each gene at unit length;
        None for independent genes.
    """

    weights: np.ndarray
    profile_sd: np.ndarray
    factors: np.ndarray
    key_sd: np.ndarray
    own_sd: np.ndarray
    keys: list[str]
    own: list[str]
    is_key: np.ndarray
    measured: np.ndarray
    of_context: np.ndarray
    noise: dict[str, np.ndarray | None]
    effects: np.ndarray | None

    @classmethod
    def of(cls, fit: ScaleFit, pairs: Sequence[Pair], mean: np.ndarray) -> Self:
        measured, n_genes = fit.measured, mean.shape[1]
        table, n_rows = measured.effects, len(measured.values)
        estimates = fit.estimates(pairs)
        parts = {
            (single, context): None
            for (p, context), e in zip(pairs, estimates, strict=True)
            if e.singles
            for single in p.singles
        }
        # Measured and single perturbations are parts of combinations, or alone.
        alone = [pair for pair, e in zip(pairs, estimates, strict=True) if not e.singles]
        keys = list(parts | dict.fromkeys(alone))
        at = {key: k for k, key in enumerate(keys)}
        known = dict(zip(pairs, estimates, strict=True))
        missing = [key for key in keys if key not in known]
        known |= dict(zip(missing, fit.estimates(missing), strict=True))
        unknown = _left(fit, [known[key] for key in keys])
        factors = np.zeros((len(pairs), len(keys)))
        own = _left(fit, estimates, mean)
        for i, ((p, context), e) in enumerate(zip(pairs, estimates, strict=True)):
            if e.singles:
                mine = [at[single, context] for single in p.singles]
                factors[i, mine] = e.singles
                own[i] = np.maximum(own[i] - np.square(e.singles) @ unknown[mine], 0)
            else:
                factors[i, at[p, context]] = 1
                own[i] = 0
        sums = measured.assemble([e.terms for e in estimates])
        weights = np.zeros((len(pairs), len(measured.variance)), np.float32)
        weights[:, :n_rows][:, sums.rows] = sums.on_rows
        weights[:, n_rows:] = measured.on_strata(sums)
        strata = np.asarray(table.compared[1].argmax(axis=0)).ravel()
        contexts = [c for c, _ in table.rows] + [table.contexts[c] for c in strata]
        draws = table.draws.get(measured.scale, {})
        effects = measured.values / np.maximum(np.sqrt((measured.values**2).sum(0)), 1e-30)
        return cls(
            weights,
            np.sqrt(table.interval_variance(measured.scale)).astype(np.float32),
            factors.astype(np.float32),
            np.sqrt(unknown).astype(np.float32),
            np.sqrt(own).astype(np.float32),
            [f"{p} in {c}" for p, c in keys],
            [f"{p} alone in {c}" for p, c in pairs],
            np.array([not e.singles for e in estimates], bool),
            np.array([c if (c, p) in measured.row else "" for p, c in keys]),
            np.array(contexts),
            {c: None if c not in draws else draws[c].astype(np.float32) for c in table.contexts},
            effects.astype(np.float32) if n_rows and n_genes else None,
        )

    @property
    def variance(self) -> np.ndarray:
        """Variance of the errors, shape (n_pairs, n_genes)."""
        return (
            self.weights**2 @ self.profile_sd**2 + self.factors**2 @ self.key_sd**2 + self.own_sd**2
        )

    def shares(self) -> dict[str, np.ndarray]:
        of_keys = self.factors**2 @ (self.key_sd**2).sum(1)
        itself = (self.own_sd**2).sum(1)
        found = {
            "sampling noise": self.weights**2 @ (self.profile_sd**2).sum(1),
            "its targets": np.where(self.is_key, 0, of_keys),
            "itself": itself + np.where(self.is_key, of_keys, 0),
        }
        total = np.maximum(sum(found.values()), 1e-30)
        return {name: value / total for name, value in found.items()}

    def draws(self, n: int, seed: int) -> Iterator[np.ndarray]:
        """Draws, each of shape (n_pairs, n_genes); of a profile or target, they are always the same."""
        sources = [
            *self._of_profiles(),
            *(
                _Source(self.factors[:, mine], self.key_sd[mine], [self.keys[i] for i in mine], d)
                for context, d in (*self.noise.items(), ("", self.effects))
                if len(mine := np.flatnonzero(self.measured == context))
            ),
        ]
        alone = np.flatnonzero(self.own_sd.any(1))
        itself = _Source(None, self.own_sd[alone], [self.own[i] for i in alone], self.effects)
        drawn = [source.drawn(seed) for source in (*sources, itself)]
        for _ in range(n):
            error = np.zeros(self.own_sd.shape, np.float32)
            for source, each in zip(sources, drawn, strict=False):
                error += source.weights @ next(each)
            error[alone] += next(drawn[-1])
            yield error

    def _of_profiles(self) -> Iterator[_Source]:
        """Sampling errors of the profiles of each context that have a weight."""
        used = self.weights.any(0)
        for context, directions in self.noise.items():
            mine = np.flatnonzero(used & (self.of_context == context))
            if len(mine):
                names = [f"profile {i}" for i in mine]
                yield _Source(self.weights[:, mine], self.profile_sd[mine], names, directions)


@dataclass(frozen=True)
class _Source:
    """Errors with a standard deviation, by name.

    Attributes
    ----------
    weights
        Of the errors in each pair, shape (n_pairs, n_names).
    sd
        Shape (n_names, n_genes).
    names
        Of the random streams.
    directions
        In which genes vary together, each gene at unit length; None for independent genes.
    """

    weights: np.ndarray | None
    sd: np.ndarray
    names: list[str]
    directions: np.ndarray | None

    def drawn(self, seed: int) -> Iterator[np.ndarray]:
        """Draws without end, each of shape (n_names, n_genes)."""
        streams = [np.random.default_rng([seed, crc32(name.encode())]) for name in self.names]
        width = self.sd.shape[1] if self.directions is None else len(self.directions)
        z = np.empty((len(streams), width), np.float32)
        while True:
            for own, stream in zip(z, streams, strict=True):
                stream.standard_normal(dtype=np.float32, out=own)
            yield self.sd * (z if self.directions is None else z @ self.directions)


def _left(
    fit: ScaleFit, estimates: Sequence[Estimate], size: np.ndarray | None = None
) -> np.ndarray:
    """Variance that shrinkage and priors leave of each estimate, shape (n, n_genes)."""
    size = fit.mean(estimates) if size is None else size
    left = np.zeros(size.shape)
    for block in blocks(len(estimates)):
        mine = slice(block.start, block.stop)
        left[mine] = fit.variances(estimates[mine], size[mine])[1]
    return left
