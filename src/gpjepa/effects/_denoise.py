"""Measured effects freed of noise by what the effects of a context have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse.linalg import eigsh

from ._measured import Measured, blocks
from ._weighted import NOTHING, Estimate, Share, Terms, Weights

if TYPE_CHECKING:
    pass

_EXACT = 1_000
"""Rows of a context up to which all directions are found at once; of more, the strongest first."""
_DIRECTIONS = 200
"""Directions found first; twice as many for as long as the last one stands out."""
_EXACT_WITHOUT = 300
"""Rows of a table up to which directions are found anew where some of them are left out."""
_CACHED = 1_000
"""Contexts without some rows that are kept at a time."""
_TRACY_WIDOM = 2.0234
"""99% quantile of the largest eigenvalue of noise, centred and scaled."""
_STANDS_OUT = 2.0  # standard deviations
_LEAST_NOISE = 1e-9  # of the size of effects


@dataclass(frozen=True)
class Denoised:
    """Denoised effects of a context, as weighted sums of its measured effects.

    The weights are W + diag(special) (1 - W), with W = left · core · rightᵀ.

    Attributes
    ----------
    rows
        Rows of the table, sorted.
    left, right
        Directions, shape (n_rows, n_directions).
    core
        How they go together, shape (n_directions, n_directions).
    special
        Share of what is outside of the directions that is kept of each effect, shape (n_rows,).
    undetectable
        Share of what is outside of them that noise may hide.
    out
        Places of rows that have no weight.
    """

    measured: Measured
    rows: np.ndarray
    left: np.ndarray
    right: np.ndarray
    core: np.ndarray
    special: np.ndarray
    undetectable: float
    out: np.ndarray

    def weighted(self, weights: np.ndarray, special: bool = False) -> np.ndarray:
        """Weights of the measured effects in weighted sums of denoised ones, (n, n_rows).

        Parameters
        ----------
        weights
            Of the denoised effects, shape (n, n_rows).
        special
            With what is special to the effects; else along the directions alone.
        """
        own = weights * self.special if special else np.zeros_like(weights)
        found = (weights - own) @ self.left @ self.core @ self.right.T + own
        found[..., self.out] = 0
        return found

    def weights(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Weights of the measured effects in some denoised ones, shape (n, n_rows)."""
        return self._mixed(rows, self.special)

    def _mixed(self, rows: Sequence[int] | np.ndarray, share: np.ndarray) -> np.ndarray:
        """W, and a share of the rest of each effect."""
        at = np.searchsorted(self.rows, rows)
        found = (1 - share[at, None]) * (self.left[at] @ self.core @ self.right.T)
        found[np.arange(len(at)), at] += share[at]
        found[:, self.out] = 0
        return found

    def estimates(self, rows: Sequence[int] | np.ndarray, bias: bool = True) -> Iterator[Estimate]:
        """Some denoised effects, and what is unknown of them.

        Parameters
        ----------
        rows
            Of the table.
        bias
            With what denoising is seen to take off single genes, for intervals.
        """
        for block in blocks(len(rows)):
            yield from self._estimates(np.asarray(rows)[block], bias)

    def _estimates(self, rows: np.ndarray, bias: bool) -> Iterator[Estimate]:
        measured, n_rows = self.measured, len(self.measured.values)
        at, each = np.searchsorted(self.rows, rows), np.arange(len(rows))
        weights = self.weights(rows)
        # The variance of the posterior is Cov(ε, Wε), as if what noise may hide had been kept.
        known = self._mixed(rows, np.maximum(self.special, self.undetectable))
        of_controls = measured.of_rows(self.rows)
        on_own = np.maximum(known[each, at], 0)
        on_controls = np.maximum(of_controls[at] * (known @ of_controls), 0)
        own, controls = measured.totals[self.rows], measured.totals[n_rows:]
        common = on_own * own[at] + on_controls @ controls
        noise = weights**2 @ own + (weights @ of_controls) ** 2 @ controls
        # Of that, the noise of the sum itself is counted elsewhere.
        open_ = np.clip(1 - noise / np.maximum(common, 1e-300), 0, 1)
        left = []
        for j, row in enumerate(rows):
            used = np.flatnonzero(on_controls[j])
            columns = np.append(row, n_rows + used)
            left.append(Weights(columns, open_[j] * np.append(on_own[j], on_controls[j][used])))
        taken = self._taken(rows, weights, left) if bias else [NOTHING] * len(rows)
        for j, row in enumerate(rows):
            name, mine = str(measured.effects.rows[row][1]), float(weights[j, at[j]])
            weights[j, at[j]] = 0
            shares = (
                Share(name, "measured effect", mine, measured.one(row)),
                Share(name, "what other effects share", 1.0, Weights(self.rows, weights[j])),
            )
            yield Estimate(shares, left=left[j], bias=taken[j])

    def _taken(self, rows: np.ndarray, weights: np.ndarray, left: list[Weights]) -> list[Weights]:
        """What is taken off each gene beyond what noise and doubt explain, squared."""
        measured = self.measured
        sums = [
            [(1.0, measured.one(row)), (-1.0, Weights(self.rows, own))]
            for row, own in zip(rows, weights, strict=True)
        ]
        apart = measured.assemble(sums)
        taken = measured.mean(apart) ** 2
        explained = measured.noise(apart) + measured.of_profiles(left)
        # Only what stands out: the positive part of noise would add up to a bias everywhere.
        found = np.where(taken > _STANDS_OUT**2 * explained, taken - explained, 0)
        return [Weights.of(own) for own in found]


class Denoiser:
    r"""Shrinks the effects of a context together, along their common directions.

    With effects *D* (rows × genes), gene weights *H* = diag(*h*), *h* the mean sampling variance
    to the power of -1/4, and *C* the noise of :math:`D H D^\top` (that of the controls is in all
    rows), the eigenvectors of :math:`D H D^\top U = C U \Lambda`, :math:`U^\top C U = I`, give

    .. math:: \hat D = W D, \qquad W = C U \varphi(\Lambda)\, U^\top, \qquad
       \varphi(\lambda) = \sqrt{(\lambda - \gamma - 1)^2 - 4 \gamma} / \lambda

    with γ the number of rows over the effective number of genes: matrix James–Stein (Efron and
    Morris 1972) with the shrinkage of Gavish and Donoho (2017). Only directions are kept whose
    eigenvalue is above what the largest one of noise alone reaches in 99% of cases (Johnstone
    2001). What is outside of them is shrunk as a whole vector, effect by effect (James and Stein
    1961). Genes whose noise goes together count for less, as parts of the control cells show.

    Parameters
    ----------
    measured
        The effects.
    """

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        # Of each context.
        rows: dict[str, list[int]] = {}
        for i, (context, _) in enumerate(measured.effects.rows):
            rows.setdefault(context, []).append(i)
        self.rows = {context: np.array(mine) for context, mine in rows.items()}
        self._genes: dict[str, tuple[np.ndarray, float]] = {}
        self._products: dict[str, np.ndarray] = {}
        self._controls: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._undetectable: dict[str, float] = {}
        self._whole: dict[str, tuple[Denoised, np.ndarray]] = {}
        self._without: dict[tuple[str, tuple[int, ...]], Denoised] = {}

    def of(self, context: str, without: Sequence[int] = ()) -> Denoised:
        """The effects of a context, as if some rows had not been measured."""
        rows = self.rows[context]
        out = np.zeros(len(rows), bool)
        left_out = np.asarray(without, int)
        at = np.minimum(np.searchsorted(rows, left_out), len(rows) - 1)
        out[at[rows[at] == left_out]] = True
        if not out.any():
            return self._of_all(context)[0]
        key = context, tuple(rows[out])
        if key not in self._without:
            if len(self._without) >= _CACHED:
                self._without.clear()
            if len(self.measured.values) <= _EXACT_WITHOUT:
                found, _ = self._denoised(context, np.flatnonzero(~out))
            else:
                found = self._less(context, np.flatnonzero(out))
            self._without[key] = found
        return self._without[key]

    def _of_all(self, context: str) -> tuple[Denoised, np.ndarray]:
        if context not in self._whole:
            self._whole[context] = self._denoised(context, np.arange(len(self.rows[context])))
        return self._whole[context]

    def _less(self, context: str, out: np.ndarray) -> Denoised:
        """Without the rows at some places, within the directions of all."""
        whole, scores = self._of_all(context)
        square = scores.T @ scores - scores[out].T @ scores[out]
        values, vectors = np.linalg.eigh(square)
        share = self._kept(context, len(scores) - len(out), values)
        core = (vectors * (share / np.maximum(values, 1e-300))) @ vectors.T
        return replace(whole, core=core, out=out)

    def through(
        self,
        context: str,
        weights: np.ndarray,
        without: Sequence[int] = (),
        special: bool = False,
    ) -> np.ndarray:
        """Weights of the measured effects from weights of denoised ones.

        Parameters
        ----------
        context
            Whose effects.
        weights
            Of all effects of the context; 0 for those left out. Shape (n, n_rows) or (n_rows,).
        without
            Rows of the table to denoise without.
        special
            With what is special to the effects; else along their directions alone.
        """
        denoised = self.of(context, without)
        if len(denoised.rows) == len(self.rows[context]):
            return denoised.weighted(weights, special)
        at = np.searchsorted(self.rows[context], denoised.rows)
        found = np.zeros_like(weights)
        found[..., at] = denoised.weighted(weights[..., at], special)
        return found

    def estimates(
        self, rows: Sequence[int], without: Sequence[int] = (), bias: bool = True
    ) -> dict[int, Estimate]:
        """Denoised effects of some rows, as if others had not been measured."""
        by_context: dict[str, list[int]] = {}
        for i in rows:
            by_context.setdefault(self.measured.effects.rows[i][0], []).append(i)
        found: dict[int, Estimate] = {}
        for context, mine in by_context.items():
            found |= dict(zip(mine, self.of(context, without).estimates(mine, bias), strict=True))
        return found

    def terms(self, row: int) -> Terms:
        """The weighted sum that a denoised effect is."""
        denoised = self.of(self.measured.effects.rows[row][0])
        return [(1.0, Weights(denoised.rows, denoised.weights([row])[0]))]

    def _kept(self, context: str, n: int, values: np.ndarray) -> np.ndarray:
        """Share that is kept of directions of n rows with some eigenvalues."""
        genes = self.of_genes(context)[1]
        return _best_share(values, n / genes) * (values > _largest_of_noise(n, genes))

    def _denoised(self, context: str, at: np.ndarray) -> tuple[Denoised, np.ndarray]:
        """The effects at some places of a context, and their scores along the directions."""
        measured, rows = self.measured, self.rows[context][at]
        nowhere = np.zeros(0, int)
        if not len(rows):
            nothing, none = np.zeros((0, 0)), np.zeros(0)
            empty = Denoised(measured, rows, nothing, nothing, nothing, none, 0.0, nowhere)
            return empty, nothing
        genes = self.of_genes(context)[1]
        own = np.sqrt(self._own(rows, self.of_genes(context)[0]))
        of_controls, control = self.controls(context)
        of_controls = of_controls[at]
        # C = N (1 + B Bᵀ) N, of which 1 + B Bᵀ has a root in closed form.
        shared = of_controls * np.sqrt(control) / own[:, None]
        basis, size, _ = np.linalg.svd(shared, full_matrices=False)
        root = np.sqrt(1 + size**2)

        def scaled(values: np.ndarray, by: np.ndarray) -> np.ndarray:
            return values + basis @ ((by - 1)[:, None] * (basis.T @ values))

        def white(values: np.ndarray) -> np.ndarray:
            return scaled(values / own[:, None], 1 / root)

        square = self.products(context)[np.ix_(at, at)]
        values, vectors = _directions(white(white(square).T), _largest_of_noise(len(rows), genes))
        kept = self._kept(context, len(rows), values)
        vectors, kept, values = vectors[:, kept > 0], kept[kept > 0], values[kept > 0]
        left, right = own[:, None] * scaled(vectors, root), scaled(vectors, 1 / root) / own[:, None]
        # What is outside of them, as whole vectors by the factor of James and Stein (1961):
        # (1 - W) S (1 - W)ᵀ and (1 - W) C, of which S U = C U Λ and Uᵀ C U = 1.
        outside = np.diag(square) - ((kept * (2 - kept)) * values * left**2).sum(1)
        noise = own**2 + of_controls**2 @ control - (kept * left**2).sum(1)
        margin = 1 + np.sqrt(2 / genes)
        special = np.clip(1 - margin * noise / np.maximum(outside, 1e-300), 0, 1)
        undetectable = 1 - 1 / (1 + 2 * np.sqrt(2 / genes))  # an effect below the margin
        scores, core = vectors * np.sqrt(values), np.diag(kept / values)
        left, right = left * np.sqrt(values), right * np.sqrt(values)
        found = Denoised(measured, rows, left, right, core, special, undetectable, nowhere)
        return found, scores

    def _own(self, rows: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Noise of the perturbed profiles, nowhere 0, shape (n_rows,)."""
        least = _LEAST_NOISE * (self.measured.values[rows] ** 2 @ h).mean()
        return np.maximum(self.measured.variance[rows] @ h, max(least, 1e-300))

    def controls(self, context: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the control profiles in the effects of a context, and their noise.

        Shapes (n_rows, n_strata) and (n_strata,).
        """
        if context not in self._controls:
            measured = self.measured
            variance = measured.variance[len(measured.values) :] @ self.of_genes(context)[0]
            self._controls[context] = measured.of_rows(self.rows[context]), variance
        return self._controls[context]

    def noise(self, context: str, at: np.ndarray) -> np.ndarray:
        """C of the rows at some places of a context, shape (n, n)."""
        of_controls, variance = self.controls(context)
        noise = (of_controls[at] * variance) @ of_controls[at].T
        own = self._own(self.rows[context][at], self.of_genes(context)[0])
        noise[np.diag_indices_from(noise)] += own
        return noise

    def products(self, context: str) -> np.ndarray:
        """D H Dᵀ of a context, shape (n_rows, n_rows)."""
        if context not in self._products:
            effects = self.measured.values[self.rows[context]]
            self._products[context] = (effects * self.of_genes(context)[0]) @ effects.T
        return self._products[context]

    def undetectable(self, context: str) -> float:
        """Weighted squared size below which an effect is lost in the noise of a measured one."""
        if context not in self._undetectable:
            h, genes = self.of_genes(context)
            of_controls, variance = self.controls(context)
            noise = self._own(self.rows[context], h) + of_controls**2 @ variance
            self._undetectable[context] = float(np.sqrt(2 / genes) * noise.mean())
        return self._undetectable[context]

    def of_genes(self, context: str) -> tuple[np.ndarray, float]:
        """Weights of the genes, and for how many independent ones they stand."""
        if context not in self._genes:
            measured, rows = self.measured, self.rows[context]
            n_rows = len(measured.values)
            of_controls = (measured.of_rows(rows) ** 2).mean(0)
            mean = measured.variance[rows].mean(0) + of_controls @ measured.variance[n_rows:]
            h = np.where(mean > 0, np.maximum(mean, 1e-300) ** -0.25, float(not mean.any()))
            h /= h.sum()  # sizes are comparable between contexts
            genes = measured.effects.effective_genes(measured.scale, context, h * mean)
            self._genes[context] = h, genes
        return self._genes[context]


def _best_share(values: np.ndarray, gamma: float) -> np.ndarray:
    """The best share of directions by their eigenvalues (Gavish and Donoho 2017, squared error)."""
    above = np.maximum((values - gamma - 1) ** 2 - 4 * gamma, 0)
    return np.sqrt(above) / np.maximum(values, 1e-300)


def _largest_of_noise(n: int, genes: float) -> float:
    """What the largest eigenvalue of noise alone stays below in 99% of cases (Johnstone 2001)."""
    one, other = np.sqrt(max(genes - 1, 1.0)), np.sqrt(n)
    spread = (one + other) * (1 / one + 1 / other) ** (1 / 3)
    return float(((one + other) ** 2 + _TRACY_WIDOM * spread) / genes)


def _directions(square: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors; of a large matrix, at least those above a value."""
    if len(square) <= _EXACT:
        return np.linalg.eigh(square)
    k = _DIRECTIONS
    while k < len(square) // 4:
        values, vectors = eigsh(square, k, v0=np.ones(len(square)))
        if values.min() < least:
            return values, vectors
        k *= 2
    return np.linalg.eigh(square)
