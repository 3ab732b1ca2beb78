from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.perturbations import Perturbation

from ._regimes import Regimes
from ._scales import Scale

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Strata:
    """Control profiles that perturbations are compared with, such as those of batches.

    Attributes
    ----------
    weights
        Weight of each stratum in the control of each row, shape (n_rows, n_strata).
    shares
        Weight of each stratum in the control profile of each context, shape (n_contexts, n_strata).
    variance
        Per scale: sampling variance of each stratum's profile, shape (n_strata, n_genes).
    """

    weights: sp.csr_matrix
    shares: sp.csr_matrix
    variance: dict[Scale, np.ndarray]


@dataclass(frozen=True)
class EffectTable:
    """Mean effects of perturbations in contexts, with their sampling variance.

    Attributes
    ----------
    genes
        Names of the genes, shape (n_genes,).
    rows
        The (context, perturbation) of each row, controls excluded, sorted.
    n_cells
        Cells of each row, shape (n_rows,).
    effect, variance
        Per scale: difference from the control profile of the context, and the sampling variance of
        the perturbed profile alone (without the control's), shape (n_rows, n_genes).
    control, control_variance
        Per scale and context: profile of the control cells and its sampling variance,
        shape (n_genes,).
    strata
        Controls of batches, where effects are differences within batches; else None.
    has_controls
        Whether the control profiles are known; where they are not they are 0.
    few
        Per scale: what intervals need on top of the variance where counts are few, of the perturbed
        profiles, then of the control profiles, shape (n_rows + n_strata, n_genes).
    draws
        Per scale and context: deviations of the profiles of parts of the control cells, each gene at unit
        length, shape (n_parts, n_genes). Their products are correlations of the noise of genes;
        genes of tables without them are taken as independent.
    cells, cell_rows
        A hash of the counts of each perturbed cell, by which tables of the same cells are recognised
        whatever the cells are called, and the row that it is part of.
    """

    genes: np.ndarray
    rows: tuple[tuple[str, Perturbation], ...]
    n_cells: np.ndarray
    effect: dict[Scale, np.ndarray]
    variance: dict[Scale, np.ndarray]
    control: dict[Scale, dict[str, np.ndarray]]
    control_variance: dict[Scale, dict[str, np.ndarray]]
    strata: Strata | None = None
    has_controls: bool = True
    few: dict[Scale, np.ndarray] = field(default_factory=dict)
    draws: dict[Scale, dict[str, np.ndarray]] = field(default_factory=dict)
    cells: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    cell_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tables in models of older versions lack what came later."""
        later = {f.name: f.default_factory() for f in fields(self) if callable(f.default_factory)}
        self.__dict__.update({**later, **state})

    def __getstate__(self) -> dict[str, Any]:
        """Nothing that is made anew when asked for."""
        return {f.name: self.__dict__[f.name] for f in fields(self)}

    @classmethod
    def from_frame(
        cls,
        values: pd.DataFrame,
        perturbation: Sequence[str | Perturbation],
        context: Sequence[str] | None = None,
        *,
        control: str | Sequence[str] = "control",
        sd: pd.DataFrame | np.ndarray | None = None,
        n: Sequence[float] | np.ndarray | None = None,
        batch: Sequence[str] | None = None,
        control_profiles: Mapping[str, np.ndarray] | None = None,
        unit: str,
    ) -> EffectTable:
        """Effects without cells: published tables, L1000 signatures, wells, pseudobulk, ranks.

        With control rows among them, ``values`` are profiles, and effects are differences from the
        mean control of the context, within batches where these are named. Without, they are effects.
        Rows with one perturbation and context are replicates, and averaged.

        Parameters
        ----------
        values
            One row per perturbation, or replicate of it; columns are genes.
        perturbation, context
            Of each row. Text is read as ``"A+B"``; give a
            :class:`gpjepa.perturbations.Perturbation` for names that hold a ``+``.
        control
            Label or labels of control rows, such as ``"DMSO"``.
        sd
            Standard error of each value; replicates that differ by more raise it. Otherwise the
            replicates show it; where there are none either, it is how far each value lies from what the other rows and genes predict of it,
            out of fold: rather too large, as what is special to a gene counts as noise.
        n
            Cells, or replicates, behind each row; 1 by default.
        batch
            Batch of each row, such as a plate.
        control_profiles
            Profile of the control in each context, where values are effects; also of contexts in
            which nothing was perturbed, so that effects can be carried over to them.
        unit
            What the values are, such as ``"z-score"``: the name of the table's scale.

        Returns
        -------
        EffectTable
            With one scale, ``unit``. Without control profiles, experts that need them stand aside.

        Raises
        ------
        ValueError
            If lengths differ, labels are missing, values are not finite, there are batches but no
            control row, or a context has none and others do.
        """
        from ._frames import table_of_frame

        return table_of_frame(
            values, perturbation, context, control, sd, n, batch, control_profiles, unit
        )

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        perturbation_key: str = "perturbation",
        context_key: str | None = None,
        *,
        control: str | Sequence[str] = "control",
        layer: str | None = None,
        sd_layer: str | None = None,
        n_key: str | None = None,
        batch_key: str | None = None,
        unit: str,
    ) -> EffectTable:
        """As :meth:`from_frame`, of ``X`` or a layer, with columns of ``obs``."""
        columns = [perturbation_key, *filter(None, [context_key, n_key, batch_key])]
        missing = [c for c in columns if c not in adata.obs]
        if missing:
            raise ValueError(f"obs has no columns {missing}; it has {list(adata.obs.columns)}.")
        given = {k: adata.obs[k].astype(object).tolist() for k in columns}
        return cls.from_frame(
            adata.to_df(layer),
            given[perturbation_key],
            given.get(context_key or ""),
            control=control,
            sd=None if sd_layer is None else adata.to_df(sd_layer),
            n=None if n_key is None else adata.obs[n_key].to_numpy(float),
            batch=given.get(batch_key or ""),
            unit=unit,
        )

    @property
    def scales(self) -> list[Scale]:
        """The scales of its effects."""
        return list(self.effect)

    def check_scale(self, scale: Scale) -> Scale:
        """Refuse a scale that the table does not have."""
        if scale not in self.effect:
            raise ValueError(f"scale={scale!r} is not known; choose one of {self.scales}.")
        return scale

    @property
    def contexts(self) -> list[str]:
        """Contexts with control cells."""
        return list(self.control[self.scales[0]])

    @property
    def perturbations(self) -> list[Perturbation]:
        """The perturbations measured, each once."""
        return sorted({p for _, p in self.rows})

    @cached_property
    def regimes(self) -> Regimes:
        """What the rows say of other perturbations."""
        return Regimes(self.rows)

    @property
    def measured_in(self) -> dict[Perturbation, tuple[str, ...]]:
        """The contexts of each perturbation."""
        return self.regimes.measured_in

    def targeted(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Mask of the genes that the perturbations of some rows target, shape (n, n_genes)."""
        mask = np.zeros((len(rows), len(self.genes)), bool)
        for i, row in enumerate(rows):
            mask[i, [self._gene[t] for t in self.rows[row][1].targets if t in self._gene]] = True
        return mask

    @cached_property
    def _gene(self) -> dict[str, int]:
        return {gene: g for g, gene in enumerate(self.genes)}

    def shares_cells(self, cells: np.ndarray) -> bool:
        """Whether some of these hashes of cells are among the table's own.

        Two are allowed: cells of independent data may have the same few counts.
        """
        return len(np.intersect1d(self.cells, cells)) > 2

    @cached_property
    def compared(self) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Weights of the strata in each row's control, and in each context's control profile.

        Shapes (n_rows, n_strata) and (n_contexts, n_strata); without batches the strata are the
        contexts.
        """
        if self.strata is not None:
            return self.strata.weights, self.strata.shares
        index = {c: i for i, c in enumerate(self.contexts)}
        of = [index[c] for c, _ in self.rows]
        n = len(of)
        weights = sp.csr_matrix((np.ones(n), (np.arange(n), of)), shape=(n, len(index)))
        return weights, sp.identity(len(index), format="csr")

    def _strata_variance(self, scale: Scale) -> np.ndarray:
        if self.strata is not None:
            return self.strata.variance[scale]
        return np.stack(list(self.control_variance[scale].values()))

    def noise(self, scale: Scale) -> np.ndarray:
        """Sampling variance of each effect, the control's included, shape (n_rows, n_genes)."""
        own, weights = self.variance[scale], self.compared[0]
        return own + (weights.power(2) @ self._strata_variance(scale)).astype(own.dtype)

    def variance_on_control(self, scale: Scale, stratum: int, weights: np.ndarray) -> np.ndarray:
        """Variance of weighted sums over the genes of a control profile, which vary together in cells.

        Parameters
        ----------
        scale
            The scale.
        stratum
            Which of the control profiles, as in ``compared``.
        weights
            Shape (n, n_genes).

        Returns
        -------
        numpy.ndarray
            Shape (n,).
        """
        weighted = weights * np.sqrt(self._strata_variance(scale)[stratum])
        context = self.contexts[self.compared[1][:, [stratum]].nonzero()[0][0]]
        draws = self.draws.get(scale, {}).get(context)
        return ((weighted if draws is None else weighted @ draws.T) ** 2).sum(1)

    def effective_genes(self, scale: Scale, context: str, variances: np.ndarray) -> float:
        r"""For how many independent genes the noise of all genes stands.

        :math:`(\mathrm{tr}\,\Sigma)^2 / \mathrm{tr}\,\Sigma^2` of the covariance of their noise, as parts
        of the control cells show it, corrected for their small number; never more than for
        independent genes.

        Parameters
        ----------
        scale, context
            Whose noise.
        variances
            Diagonal of the covariance, shape (n_genes,).
        """
        total, square = variances.sum(), (variances**2).sum()
        draws = self.draws.get(scale, {}).get(context)
        if draws is not None:
            known = len(draws) - 1
            each = draws * np.sqrt(variances)
            total = (each**2).sum()
            shown = ((each @ each.T) ** 2).sum() - total**2 / known
            square = max(square, shown / (1 + 1 / known))
        return max(float(total**2 / square), 1.0) if square > 0 else 1.0

    def control_profiles(self, scale: Scale) -> np.ndarray:
        """Profiles of the control cells of each context, shape (n_contexts, n_genes)."""
        return np.stack(list(self.control[scale].values())).astype(float)

    def profile_variance(self, scale: Scale) -> np.ndarray:
        """Sampling variance of the perturbed profiles, then of the control profiles.

        Their errors are independent. Shape (n_rows + n_strata, n_genes); without batches the strata
        are the contexts.
        """
        return np.concatenate([self.variance[scale], self._strata_variance(scale)]).astype(float)

    def interval_noise(self, scale: Scale) -> np.ndarray:
        """As :meth:`noise`, and nowhere 0: for intervals, not for corrections."""
        n, variance = len(self.rows), self.interval_variance(scale)
        return variance[:n] + self.compared[0].power(2) @ variance[n:]

    def interval_variance(self, scale: Scale) -> np.ndarray:
        """As :meth:`profile_variance`, and nowhere 0: for intervals, not for corrections."""
        return self.profile_variance(scale) + self.few.get(scale, 0.0)

    def to_anndata(self, scale: Scale | None = None, context: str | None = None) -> AnnData:
        """The effects as an AnnData, one row per perturbation, for scanpy and pertpy.

        Parameters
        ----------
        scale
            Scale of the effects; the table's first by default.
        context
            The context to take; all of them by default.

        Returns
        -------
        anndata.AnnData
            ``X`` effects, with a row of zeros for the control of each context, so that pertpy's
            ``PerturbationSpace`` can add and subtract them (``ensure_consistency=False``: they are
            differences from the control already); ``layers["noise"]`` their sampling
            variance; ``obs`` perturbation, context and number of cells; ``varm["control"]`` the
            control profiles, where they are known. Rows are named by their perturbation, and the context where there
            are several.
        """
        from anndata import AnnData

        scale = self.check_scale(self.scales[0] if scale is None else scale)
        if context is not None and context not in self.contexts:
            raise ValueError(f"Unknown context {context!r}; known are {self.contexts}.")
        contexts = self.contexts if context is None else [context]
        here = [i for i, (c, _) in enumerate(self.rows) if c in contexts]
        rows = [(c, "control") for c in contexts]
        rows += [(self.rows[i][0], str(self.rows[i][1])) for i in here]
        names = [p if len(contexts) == 1 else f"{p} in {c}" for c, p in rows]
        n_cells = [np.nan] * len(contexts) + self.n_cells[here].astype(float).tolist()
        obs = pd.DataFrame(
            {
                "perturbation": pd.Categorical([p for _, p in rows]),
                "context": pd.Categorical([c for c, _ in rows]),
                "n_cells": n_cells,
            },
            index=names,
        )
        zeros = np.zeros((len(contexts), len(self.genes)), np.float32)
        shared = np.stack([self.control_variance[scale][c] for c in contexts])
        control = pd.DataFrame(
            {c: self.control[scale][c] for c in contexts}, index=self.genes.astype(str)
        )
        profiles = {"control": control} if self.has_controls else {}
        return AnnData(
            np.vstack([zeros, self.effect[scale][here]]),
            obs,
            pd.DataFrame(index=self.genes.astype(str)),
            varm=profiles,
            layers={"noise": np.vstack([shared, self.noise(scale)[here]]).astype(np.float32)},
            uns={"gpjepa": {"scale": scale}},
        )

    def to_frame(self, scale: Scale | None = None) -> pd.DataFrame:
        """The effects in the form of :meth:`gpjepa.GPJEPA.predict_effects`, for plots and enrichment.

        Parameters
        ----------
        scale
            Scale of the effects; the table's first by default.

        Returns
        -------
        pandas.DataFrame
            One row per perturbation × context × gene: ``perturbation, context, gene, effect, sd,
            lower, upper``, with 95% intervals of the sampling noise.
        """
        scale = self.check_scale(self.scales[0] if scale is None else scale)
        n, genes = len(self.rows), len(self.genes)
        effect = self.effect[scale].astype(float).ravel()
        sd = np.sqrt(self.interval_noise(scale)).ravel()
        return pd.DataFrame(
            {
                "perturbation": np.repeat([str(p) for _, p in self.rows], genes),
                "context": np.repeat([c for c, _ in self.rows], genes),
                "gene": np.tile(self.genes.astype(str), n),
                "effect": effect,
                "sd": sd,
                "lower": effect - 1.96 * sd,
                "upper": effect + 1.96 * sd,
            }
        )

    def subset(self, keep: np.ndarray) -> EffectTable:
        """The table with some of its rows and all of its controls."""
        where = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep)
        new = np.full(len(self.rows), -1)
        new[where] = np.arange(len(where))
        cells = new[self.cell_rows] >= 0
        return EffectTable(
            self.genes,
            tuple(self.rows[i] for i in where),
            self.n_cells[where],
            {s: values[where] for s, values in self.effect.items()},
            {s: values[where] for s, values in self.variance.items()},
            self.control,
            self.control_variance,
            self.strata and replace(self.strata, weights=self.strata.weights[where]),
            self.has_controls,
            {
                s: np.concatenate([values[where], values[len(self.rows) :]])
                for s, values in self.few.items()
            },
            self.draws,
            self.cells[cells],
            new[self.cell_rows[cells]],
        )


def noise_corrected_error(
    predicted: np.ndarray, measured: np.ndarray, noise: np.ndarray, keep: np.ndarray | None = None
) -> np.ndarray:
    r"""Squared error of predicted mean effects without the part that is sampling noise.

    .. math:: \sum_g (\hat d_g - d_g)^2 - \sum_g v_g

    Unbiased for the squared distance to the true effect if prediction and measurement share no
    cells, controls included: measure against controls that training has not seen.

    Parameters
    ----------
    predicted, measured, noise
        Predicted and measured effects and the measurement's sampling variance,
        shape (n_rows, n_genes).
    keep
        Mask of the genes that count, shape (n_rows, n_genes); all of them by default.

    Returns
    -------
    numpy.ndarray
        Shape (n_rows,); can be negative for a prediction as good as the truth.
    """
    terms = (np.asarray(predicted, float) - measured) ** 2 - noise
    return np.where(keep, terms, 0).sum(1) if keep is not None else terms.sum(1)
