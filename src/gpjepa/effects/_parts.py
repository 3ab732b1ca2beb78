"""From profiles of batches and replicates to effects: differences within batches."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import scipy.sparse as sp

from gpjepa.perturbations import Perturbation

from ._scales import PER, Scale
from ._table import EffectTable, Strata

_SHOWN = 10.0  # differences that a variance between batches needs to stand on its own
Group = tuple[str, Perturbation, str, str]
"""Context, perturbation, batch and replicate."""
ByScale = dict[str, np.ndarray]


@dataclass(frozen=True)
class Parts:
    """Profiles of a perturbation, or the control, in one batch of a context.

    Attributes
    ----------
    keys
        (context, perturbation, batch) of each, sorted.
    n
        Cells of each.
    profile, variance, few
        Per scale, such as ``"mean_log1p"`` and ``"rate"``, shape (n_parts, n_genes).
    replicates, between
        Weight of each replicate in each part, shape (n_parts, n_replicates), and per scale the
        variance between the replicates of a perturbation, shape (n_genes,).
    """

    keys: list[tuple[str, Perturbation, str]]
    n: np.ndarray
    profile: ByScale
    variance: ByScale
    few: ByScale = field(default_factory=dict)
    replicates: sp.csr_matrix | None = None
    between: ByScale = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        groups: list[Group],
        n: np.ndarray,
        profile: ByScale,
        variance: ByScale,
        few: ByScale,
    ) -> Self:
        """Replicates put together; what they differ by is kept beside."""
        keys = sorted({g[:3] for g in groups})
        at = {key: i for i, key in enumerate(keys)}
        parent = np.array([at[g[:3]] for g in groups], int)
        total = np.bincount(parent, n)
        share = _sparse(parent, np.arange(len(groups)), n / total[parent], (len(keys), len(groups)))
        made = cls(
            keys,
            total,
            {s: share @ p for s, p in profile.items()},
            {s: share.power(2) @ v for s, v in variance.items()},
            {s: share.power(2) @ v for s, v in few.items()},
        )
        if len(groups) == len(keys):
            return made
        # A guide is the same in every batch: what it adds does not average out over them.
        units = sorted({(c, p, r) for c, p, _, r in groups})
        unit = {u: i for i, u in enumerate(units)}
        code = np.array([unit[c, p, r] for c, p, _, r in groups], int)
        member = _sparse(np.arange(len(code)), code, np.ones(len(code)), (len(code), len(units)))
        is_control = np.array([p.is_control for _, p, _ in keys])
        between = {}
        for s, values in profile.items():
            apart = values - made.profile[s][parent]
            # Guides of controls need not differ, although those of perturbations do.
            between[s] = [
                _between(sp.diags(mine.astype(float)) @ share, apart, variance[s])
                for mine in (~is_control, is_control)
            ]
            on_control = (share @ member).power(2).sum(1).A1 * is_control
            made.variance[s] += on_control[:, None] * between[s][1]
        return replace(
            made, replicates=share @ member, between={s: b[0] for s, b in between.items()}
        )

    def table(self, genes: np.ndarray) -> EffectTable:
        """Effects on each scale; rates are brought to the log scale."""
        contexts = sorted({c for c, _, _ in self.keys})
        rows = sorted({(c, p) for c, p, _ in self.keys if not p.is_control})
        strata = [i for i, (_, p, _) in enumerate(self.keys) if p.is_control]
        of_rows, of_strata = self._compared(rows, strata)
        shares = self._shares(contexts, strata)
        control = {s: p[strata] for s, p in self.profile.items()}
        noise = {s: v[strata] for s, v in self.variance.items()}
        own = {s: of_rows.power(2) @ v for s, v in self.variance.items()}
        for s, added in self._between_batches(rows, strata, of_rows, control, noise).items():
            own[s] = own[s] + added
        if self.replicates is not None:
            of_each = (of_rows @ self.replicates).power(2).sum(1).A1[:, None]
            own = {s: v + of_each * self.between[s] for s, v in own.items()}
        few = {s: np.vstack([of_rows.power(2) @ v, v[strata]]) for s, v in self.few.items()}
        profile, effect = {}, {}
        for s, values in self.profile.items():
            mine, theirs, profile[s] = of_rows @ values, of_strata @ control[s], shares @ control[s]
            if s == "rate":
                own[s] *= (PER / (1 + PER * mine)) ** 2
                slope = PER / (1 + PER * control[s])
                noise[s] *= slope**2
                few[s] *= np.vstack([(PER / (1 + PER * mine)) ** 2, slope**2])
                mine, theirs, profile[s] = (np.log1p(PER * x) for x in (mine, theirs, profile[s]))
            effect[s] = mine - theirs
        batches = len(strata) > len(contexts)
        return EffectTable(
            genes,
            tuple(rows),
            _whole(of_rows.astype(bool).astype(float) @ self.n),
            _by_scale(effect),
            _by_scale(own),
            {s: _by_context(contexts, x) for s, x in _by_scale(profile).items()},
            {s: _by_context(contexts, shares.power(2) @ x) for s, x in _by_scale(noise).items()},
            Strata(of_strata, shares, _by_scale(noise)) if batches else None,
            few=_by_scale(few),
        )

    def _compared(
        self, rows: list[tuple[str, Perturbation]], strata: list[int]
    ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Weights of the parts in each perturbed profile, and of the strata in its control."""
        row = {key: i for i, key in enumerate(rows)}
        stratum = {self.keys[i][::2]: j for j, i in enumerate(strata)}
        n_control = self.n[strata]
        of_context: dict[str, list[int]] = {}
        for (context, _), j in stratum.items():
            of_context.setdefault(context, []).append(j)
        parts: list[list[int]] = [[] for _ in rows]
        for i, (context, perturbation, _) in enumerate(self.keys):
            if not perturbation.is_control:
                parts[row[context, perturbation]].append(i)
        mine, theirs, lonely = [], [], set()
        for a, members in enumerate(parts):
            context = rows[a][0]
            here = np.array(of_context[context])
            own = [i for i in members if self.keys[i][::2] in stratum]
            rest = [i for i in members if self.keys[i][::2] not in stratum]
            lonely |= {self.keys[i][2] for i in rest}
            against = [stratum[self.keys[i][::2]] for i in own]
            weight = np.array(
                [_harmonic(self.n[i], n_control[j]) for i, j in zip(own, against, strict=True)]
            )
            pooled = _harmonic(self.n[rest].sum(), n_control[here].sum()) if rest else 0.0
            total = weight.sum() + pooled
            mine += [(a, i, w / total) for i, w in zip(own, weight, strict=True)]
            theirs += [(a, j, w / total) for j, w in zip(against, weight, strict=True)]
            mine += [(a, i, pooled / total * self.n[i] / self.n[rest].sum()) for i in rest]
            if rest:
                spread = pooled / total * n_control[here] / n_control[here].sum()
                theirs += [(a, j, w) for j, w in zip(here, spread, strict=True)]
        if lonely:
            warnings.warn(
                f"Batches without control cells: {', '.join(map(repr, sorted(lonely)[:5]))}; their "
                "cells are compared with all control cells of the context.",
                UserWarning,
                stacklevel=3,
            )
        return (
            _triples(mine, (len(rows), len(self.keys))),
            _triples(theirs, (len(rows), len(strata))),
        )

    def _shares(self, contexts: list[str], strata: list[int]) -> sp.csr_matrix:
        """Shares of the strata among the control cells of each context."""
        of = np.array([contexts.index(self.keys[i][0]) for i in strata], int)
        n = self.n[strata]
        share = n / np.bincount(of, n)[of]
        return _sparse(of, np.arange(len(strata)), share, (len(contexts), len(strata)))

    def _between_batches(
        self,
        rows: list[tuple[str, Perturbation]],
        strata: list[int],
        of_rows: sp.csr_matrix,
        control: dict[str, np.ndarray],
        noise: dict[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """What effects that differ between batches add to the variance of each row."""
        if len(strata) == len({self.keys[i][0] for i in strata}):
            return {}
        stratum = {self.keys[i][::2]: j for j, i in enumerate(strata)}
        against = np.array([stratum.get(key[::2], -1) for key in self.keys])
        within = of_rows @ sp.diags((against >= 0).astype(float))
        within.eliminate_zeros()
        within = sp.diags(1 / np.maximum(within.sum(1).A1, 1e-12)) @ within
        added = {}
        parts = of_rows.power(2)
        lonely = sp.csr_matrix(parts @ sp.diags((against < 0).astype(float)))
        shares = self._shares(sorted({c for c, _, _ in self.keys}), strata)
        for s, profile in self.profile.items():
            apart = profile - control[s][against]
            between = _between(
                within, _centred(within, apart), self.variance[s] + noise[s][against]
            )
            added[s] = parts.sum(1).A1[:, None] * between
            # Where there is no control of its own, so do batches as such.
            of_control = _between(shares, _centred(shares, control[s]), noise[s])
            added[s] += lonely.sum(1).A1[:, None] * of_control
        return added


def _centred(share: sp.csr_matrix, values: np.ndarray) -> np.ndarray:
    """Members of groups minus the mean of their group; 0 for those of none."""
    member, mean = share.tocoo(), share @ values
    found = np.zeros_like(values)
    found[member.col] = values[member.col] - mean[member.row]
    return found


def _between(share: sp.csr_matrix, apart: np.ndarray, variance: np.ndarray) -> np.ndarray:
    r"""Variance of members of a group beyond their sampling variance, shape (n_genes,).

    With shares :math:`\omega` that sum to 1 and members of variance :math:`v_b + \tau^2`,
    :math:`E \sum_b \omega_b (d_b - \bar d)^2 = \sum_b \omega_b (1 - \omega_b) (v_b + \tau^2)`. What
    few differences show of a gene is drawn to what all genes show, in proportion to their noise.
    """
    loose = share.copy()
    loose.data = share.data * (1 - share.data)
    freedom = float(loose.sum())
    if freedom <= 0:
        return np.zeros(apart.shape[1])
    sampling = (loose @ variance).sum(0)
    excess = (share @ apart**2).sum(0) - sampling
    common = max(excess.sum() / max(sampling.sum(), 1e-30), 0.0) * sampling
    alone = freedom / (freedom + _SHOWN)
    return np.maximum(alone * excess + (1 - alone) * common, 0) / freedom


def _harmonic(a: float, b: float) -> float:
    return float(a * b / (a + b))


def _triples(found: list[tuple[int, int, float]], shape: tuple[int, int]) -> sp.csr_matrix:
    rows, columns, values = zip(*found, strict=True) if found else ((), (), ())
    return _sparse(np.array(rows, int), np.array(columns, int), np.array(values, float), shape)


def _sparse(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]
) -> sp.csr_matrix:
    return sp.csr_matrix((values, (rows, columns)), shape=shape)


def _by_scale(values: dict[str, np.ndarray]) -> dict[Scale, np.ndarray]:
    """Rates are on the log scale by now."""
    names = {"rate": "log1p_mean"}
    return {names.get(s, s): np.asarray(v, np.float32) for s, v in values.items()}


def _by_context(contexts: list[str], values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(contexts, values.astype(np.float32), strict=True))


def _whole(n: np.ndarray) -> np.ndarray:
    return n if (n % 1).any() else n.astype(int)
