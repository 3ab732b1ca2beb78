"""Measured effects freed of noise by what the effects of a context have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ._measured import Measured, blocks
from ._scales import Scale
from ._table import EffectTable
from ._weighted import Estimate, Share, Weights

if TYPE_CHECKING:
    from anndata import AnnData

_EXACT = 1_000
"""Rows of a context up to which all directions are found; of more, the strongest."""
_EXACT_WITHOUT = 300
"""Rows of a context up to which directions are found anew where some of them are left out."""
_DIRECTIONS = 200
_KEPT = 1_000
"""Of those, so many are kept at a time."""
_TRACY_WIDOM = 2.0234
"""99% quantile of the largest eigenvalue of noise, centred and scaled."""
_STANDS_OUT = 2.0  # standard deviations
_LEAST_NOISE = 1e-9  # of the size of effects


@dataclass(frozen=True)
class Denoised:
    """Denoised effects of a context, as weighted sums of its measured effects.

    The weights are W = left · diag(kept) · rightᵀ.

    Attributes
    ----------
    rows
        Rows of the table, sorted.
    left, right
        Directions, shape (n_rows, n_directions).
    kept
        Share of each direction that is kept, shape (n_directions,).
    special
        Share of what is outside of the directions that is kept of each effect, shape (n_rows,).
    hidden
        Share of any other direction that noise may hide.
    out
        Places of rows that have no weight.
    """

    measured: Measured
    rows: np.ndarray
    left: np.ndarray
    right: np.ndarray
    kept: np.ndarray
    special: np.ndarray
    hidden: float
    out: np.ndarray

    def weighted(self, weights: np.ndarray) -> np.ndarray:
        """Weights of the measured effects in weighted sums along the directions, (n, n_rows).

        Without what is special to the effects, which says nothing of others.
        """
        found = (weights @ self.left * self.kept) @ self.right.T
        found[..., self.out] = 0
        return found

    def weights(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Weights of the measured effects in some denoised ones, shape (n, n_rows)."""
        at = np.searchsorted(self.rows, rows)
        found = self.left[at] * ((1 - self.special[at, None]) * self.kept) @ self.right.T
        found[np.arange(len(at)), at] += self.special[at]
        found[:, self.out] = 0
        return found

    def estimates(self, rows: Sequence[int] | np.ndarray) -> list[Estimate]:
        """Some denoised effects, and what is unknown of them."""
        return [e for block in blocks(len(rows)) for e in self._estimates(np.asarray(rows)[block])]

    def _estimates(self, rows: np.ndarray) -> list[Estimate]:
        measured, n_rows = self.measured, len(self.measured.values)
        at, each = np.searchsorted(self.rows, rows), np.arange(len(rows))
        weights = self.weights(rows)
        # The variance of the posterior is Cov(ε, Wε), as if what noise may hide had been kept.
        least = np.maximum(self.hidden, self.special[at])
        surely = self.left[at] * np.maximum(self.kept - least[:, None], 0) @ self.right.T
        surely[each, at] += least
        of_controls = measured.of_rows(self.rows)
        own, controls = measured.variance[self.rows], measured.variance[n_rows:]
        on_own = np.maximum(surely[each, at], 0)
        on_controls = np.maximum(of_controls[at] * (surely @ of_controls), 0)
        common = on_own[:, None] * own[at] + on_controls @ controls
        noise = weights**2 @ own + (weights @ of_controls) ** 2 @ controls
        # Of that, the noise of the sum itself is counted elsewhere.
        open_ = np.clip(1 - noise.sum(1) / np.maximum(common.sum(1), 1e-300), 0, 1)
        apart = -weights
        apart[each, at] += 1
        taken = (apart @ measured.values[self.rows]) ** 2
        explained = apart**2 @ own + (apart @ of_controls) ** 2 @ controls + open_[:, None] * common
        # Only what stands out: the positive part of noise would add up to a bias everywhere.
        bias = np.where(taken > _STANDS_OUT**2 * explained, taken - explained, 0)
        found = []
        for j, row in enumerate(rows):
            name, mine = str(measured.effects.rows[row][1]), float(weights[j, at[j]])
            weights[j, at[j]] = 0
            shares = [
                Share(name, "measured effect", mine, measured.one(row)),
                Share(name, "what other effects share", 1.0, Weights(self.rows, weights[j])),
            ]
            columns = np.append(row, n_rows + np.flatnonzero(on_controls[j]))
            values = np.append(on_own[j], on_controls[j][on_controls[j] != 0])
            left = Weights(columns, open_[j] * values)
            found.append(Estimate(tuple(shares), left=left, bias=Weights.of(bias[j])))
        return found


def denoise(
    effects: EffectTable, scale: Scale | None = None, context: str | None = None
) -> AnnData:
    """Measured effects freed of noise by what the effects of a context have in common.

    The directions that effects share are kept as far as they stand out from noise (matrix
    James–Stein), and the rest of each effect is shrunk as a whole vector.

    Parameters
    ----------
    effects
        The measured effects.
    scale
        Scale of the effects; the table's first by default.
    context
        The context to take; all of them by default. Each is denoised by itself.

    Returns
    -------
    anndata.AnnData
        As :meth:`EffectTable.to_anndata`: denoised effects in ``X``, measured ones in
        ``layers["measured"]``, the variance of what remains unknown of each in
        ``layers["variance"]`` in place of the sampling noise.

    References
    ----------
    Efron and Morris (1972), Gavish and Donoho (2017).
    """
    scale = effects.check_scale(effects.scales[0] if scale is None else scale)
    found = effects.to_anndata(scale, context)
    rows = [i for i, (c, _) in enumerate(effects.rows) if context in (None, c)]
    measured = Measured(effects, scale)
    denoiser = Denoiser(measured)
    n_controls = found.n_obs - len(rows)
    mean, variance = np.zeros(found.shape, np.float32), found.layers.pop("noise")
    for block in blocks(len(rows)):
        at = slice(n_controls + block.start, n_controls + block.stop)
        mine = list(denoiser.estimates([rows[i] for i in block]).values())
        sums = measured.assemble([e.terms for e in mine])
        mean[at] = measured.mean(sums)
        left = measured.noise(sums, interval=True) + measured.of_profiles([e.left for e in mine])
        for own, estimate in zip(left, mine, strict=True):
            np.add.at(own, estimate.bias.columns, estimate.bias.values)
        variance[at] = left
    found.layers["measured"], found.layers["variance"] = found.X, variance
    found.X = mean
    return found


class Denoiser:
    r"""Shrinks the effects of a context together, along their common directions.

    With effects *D* (rows × genes), gene weights *H* = diag(*h*), *h* the mean sampling variance to the
    power of -1/4, and *C* the noise of :math:`D H D^\top` (that of the controls is in all rows),
    the eigenvectors of :math:`D H D^\top U = C U \Lambda`, :math:`U^\top C U = I`, give

    .. math:: \hat D = W D, \qquad W = C U \varphi(\Lambda)\, U^\top, \qquad
       \varphi(\lambda) = \sqrt{(\lambda - \gamma - 1)^2 - 4 \gamma} / \lambda

    with γ the number of rows over the effective number of genes: matrix James–Stein (Efron and
    Morris 1972) with the shrinkage of Gavish and Donoho (2017). Only directions are kept whose
    eigenvalue is above what the largest one of noise alone reaches in 99% of cases (Johnstone
    2001). What is outside of them is shrunk as a whole vector, effect by effect (James and Stein 1961).
    Genes whose noise goes together count for less, as parts of the control cells show.

    Parameters
    ----------
    measured
        The effects.
    """

    def __init__(self, measured: Measured) -> None:
        self.measured = measured
        # Of each context.
        self.rows: dict[str, list[int]] = {}
        for i, (context, _) in enumerate(measured.effects.rows):
            self.rows.setdefault(context, []).append(i)
        self._genes: dict[str, tuple[np.ndarray, float]] = {}
        self._hidden: dict[str, float] = {}
        self._products: dict[str, np.ndarray] = {}
        self._sizes: dict[str, np.ndarray] = {}
        self._whole: dict[str, Denoised] = {}
        self._without: dict[tuple[str, tuple[int, ...]], Denoised] = {}

    def of(self, context: str, without: Sequence[int] = ()) -> Denoised:
        """The effects of a context, as if some rows had not been measured."""
        rows = np.array(self.rows[context])
        out = np.isin(rows, without)
        if out.any() and len(rows) <= _EXACT_WITHOUT:
            key = context, tuple(rows[out])
            if key not in self._without:
                if len(self._without) >= _KEPT:
                    self._without.clear()
                self._without[key] = self._denoised(context, np.flatnonzero(~out))
            return self._without[key]
        if context not in self._whole:
            self._whole[context] = self._denoised(context, np.arange(len(rows)))
        whole = self._whole[context]
        return replace(whole, out=np.flatnonzero(out)) if out.any() else whole

    def through(self, context: str, weights: np.ndarray, without: Sequence[int] = ()) -> np.ndarray:
        """Weights of the measured effects from weights of denoised ones, along the directions.

        Parameters
        ----------
        context
            Whose effects.
        weights
            Of all effects of the context; 0 for those left out. Shape (n, n_rows) or (n_rows,).
        without
            Rows of the table to denoise without.
        """
        denoised = self.of(context, without)
        at = np.searchsorted(self.rows[context], denoised.rows)
        found = np.zeros_like(weights)
        found[..., at] = denoised.weighted(weights[..., at])
        return found

    def estimates(self, rows: Sequence[int], without: Sequence[int] = ()) -> dict[int, Estimate]:
        """Denoised effects of some rows, as if others had not been measured."""
        by_context: dict[str, list[int]] = {}
        for i in rows:
            by_context.setdefault(self.measured.effects.rows[i][0], []).append(i)
        found: dict[int, Estimate] = {}
        for context, mine in by_context.items():
            found |= dict(zip(mine, self.of(context, without).estimates(mine), strict=True))
        return found

    def _denoised(self, context: str, at: np.ndarray) -> Denoised:
        """The effects at some places of a context."""
        measured, rows = self.measured, np.array(self.rows[context])[at]
        if not len(rows):
            nothing, none = np.zeros((0, 0)), np.zeros(0)
            return Denoised(measured, rows, nothing, nothing, none, none, 0.0, none.astype(int))
        h, genes = self.of_genes(context)
        own = np.sqrt(self._own(rows, h))
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

        if len(rows) <= _EXACT:
            square = self.products(context)[np.ix_(at, at)]
            values, vectors = np.linalg.eigh(white(white(square).T))
        else:
            values, vectors = _strongest(white(measured.values[rows] * np.sqrt(h)))
        gamma = len(rows) / genes
        kept = _kept_of(values, gamma) * (values > _largest_of_noise(len(rows), genes))
        vectors, kept, values = vectors[:, kept > 0], kept[kept > 0], values[kept > 0]
        left = own[:, None] * scaled(vectors, root)
        right = scaled(vectors, 1 / root) / own[:, None]
        # What is outside of them, as whole vectors by the factor of James and Stein (1961):
        # (1 - W) S (1 - W)ᵀ and (1 - W) C, of which S U = C U Λ and Uᵀ C U = 1.
        outside = self.sizes(context)[at] - ((kept * (2 - kept)) * values * left**2).sum(1)
        noise = own**2 + of_controls**2 @ control - (kept * left**2).sum(1)
        margin = 1 + np.sqrt(2 / genes)
        special = np.clip(1 - margin * noise / np.maximum(outside, 1e-300), 0, 1)
        hidden = 1 - 1 / (1 + 2 * np.sqrt(2 / genes))  # an effect below the margin
        out = np.zeros(0, int)
        return Denoised(measured, rows, left, right, kept, special, hidden, out)

    def _own(self, rows: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Noise of the perturbed profiles, nowhere 0, shape (n_rows,)."""
        least = _LEAST_NOISE * (self.measured.values[rows] ** 2 @ h).mean()
        return np.maximum(self.measured.variance[rows] @ h, max(least, 1e-300))

    def controls(self, context: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the control profiles in the effects of a context, and their noise.

        Shapes (n_rows, n_strata) and (n_strata,).
        """
        measured = self.measured
        variance = measured.variance[len(measured.values) :] @ self.of_genes(context)[0]
        return measured.of_rows(np.array(self.rows[context])), variance

    def noise(self, context: str, at: np.ndarray) -> np.ndarray:
        """C of the rows at some places of a context, shape (n, n)."""
        of_controls, variance = self.controls(context)
        noise = (of_controls[at] * variance) @ of_controls[at].T
        own = self._own(np.array(self.rows[context])[at], self.of_genes(context)[0])
        noise[np.diag_indices_from(noise)] += own
        return noise

    def products(self, context: str) -> np.ndarray:
        """D H Dᵀ of a context, shape (n_rows, n_rows)."""
        if context not in self._products:
            effects = self.measured.values[self.rows[context]]
            self._products[context] = (effects * self.of_genes(context)[0]) @ effects.T
        return self._products[context]

    def sizes(self, context: str) -> np.ndarray:
        """The diagonal of D H Dᵀ, shape (n_rows,)."""
        if context not in self._sizes:
            effects = self.measured.values[self.rows[context]]
            self._sizes[context] = effects**2 @ self.of_genes(context)[0]
        return self._sizes[context]

    def hidden(self, context: str) -> float:
        """Size, over the weights of genes, that an effect may have and be lost in its noise."""
        if context not in self._hidden:
            h, genes = self.of_genes(context)
            of_controls, variance = self.controls(context)
            noise = self._own(np.array(self.rows[context]), h) + of_controls**2 @ variance
            self._hidden[context] = float(np.sqrt(2 / genes) * noise.mean())
        return self._hidden[context]

    def of_genes(self, context: str) -> tuple[np.ndarray, float]:
        """Weights of the genes, and for how many independent ones they stand."""
        if context not in self._genes:
            measured, rows = self.measured, np.array(self.rows[context])
            n_rows = len(measured.values)
            of_controls = (measured.of_rows(rows) ** 2).mean(0)
            mean = measured.variance[rows].mean(0) + of_controls @ measured.variance[n_rows:]
            h = np.where(mean > 0, np.maximum(mean, 1e-300) ** -0.25, float(not mean.any()))
            genes = measured.effects.effective_genes(measured.scale, context, h * mean)
            self._genes[context] = h, genes
        return self._genes[context]


def _kept_of(values: np.ndarray, gamma: float) -> np.ndarray:
    """The best share of directions with some eigenvalues (Gavish and Donoho 2017, Frobenius loss)."""
    above = np.maximum((values - gamma - 1) ** 2 - 4 * gamma, 0)
    return np.sqrt(above) / np.maximum(values, 1e-300)


def _largest_of_noise(n: int, genes: float) -> float:
    """What the largest eigenvalue of noise alone stays below in 99% of cases (Johnstone 2001)."""
    one, other = np.sqrt(max(genes - 1, 1.0)), np.sqrt(n)
    spread = (one + other) * (1 / one + 1 / other) ** (1 / 3)
    return float(((one + other) ** 2 + _TRACY_WIDOM * spread) / genes)


def _strongest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values and left singular vectors of the strongest directions."""
    from sklearn.utils.extmath import randomized_svd

    vectors, size, _ = randomized_svd(values, _DIRECTIONS, n_iter=4, random_state=0)
    return size**2, vectors
