from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.perturbations import Perturbation

from ._scales import PER, SCALES, Scale, log1p_rates

if TYPE_CHECKING:
    from anndata import AnnData

_CHUNK = 1_000  # cells normalised at a time


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
    """

    genes: np.ndarray
    rows: tuple[tuple[str, Perturbation], ...]
    n_cells: np.ndarray
    effect: dict[Scale, np.ndarray]
    variance: dict[Scale, np.ndarray]
    control: dict[Scale, dict[str, np.ndarray]]
    control_variance: dict[Scale, dict[str, np.ndarray]]

    @property
    def contexts(self) -> list[str]:
        """Contexts with control cells."""
        return list(self.control["mean_log1p"])

    @property
    def perturbations(self) -> list[Perturbation]:
        """The perturbations measured, each once."""
        return sorted({p for _, p in self.rows})

    @cached_property
    def fingerprints(self) -> frozenset[bytes]:
        """A digest of each perturbed profile: two tables that share some share cells."""
        # The variance of a profile is made of its own cells alone, whatever the controls are.
        by_name = np.argsort(self.genes.astype(str), kind="stable")
        own = self.variance["mean_log1p"][:, by_name]
        varied = own[own.min(1) < own.max(1)]
        return frozenset(blake2b(row.tobytes(), digest_size=16).digest() for row in varied)

    def noise(self, scale: Scale) -> np.ndarray:
        """Sampling variance of each effect, the control's included, shape (n_rows, n_genes)."""
        shared = self.control_variance[scale]
        own = self.variance[scale]
        return own + np.array([shared[c] for c, _ in self.rows], own.dtype).reshape(own.shape)

    def control_profiles(self, scale: Scale) -> np.ndarray:
        """Profiles of the control cells of each context, shape (n_contexts, n_genes)."""
        return np.stack(list(self.control[scale].values())).astype(float)

    def profile_variance(self, scale: Scale) -> np.ndarray:
        """Sampling variance of the perturbed profiles, then of the control profiles.

        Their errors are independent. Shape (n_rows + n_contexts, n_genes).
        """
        shared = np.stack(list(self.control_variance[scale].values()))
        return np.concatenate([self.variance[scale], shared]).astype(float)

    def on_profiles(self, weights: np.ndarray, controls: np.ndarray | None = None) -> np.ndarray:
        """Weights of profiles in weighted sums of effects and control profiles.

        Parameters
        ----------
        weights
            Weight of each effect, shape (n, n_rows).
        controls
            Weight of each control profile, shape (n, n_contexts); none by default.

        Returns
        -------
        numpy.ndarray
            Shape (n, n_rows + n_contexts), columns as in :meth:`profile_variance`.
        """
        index = {c: i for i, c in enumerate(self.contexts)}
        of_context = np.zeros((len(self.rows), len(index)))
        of_context[np.arange(len(self.rows)), [index[c] for c, _ in self.rows]] = 1
        on_controls = -weights @ of_context
        return np.hstack([weights, on_controls if controls is None else on_controls + controls])

    def to_anndata(self, scale: Scale = "mean_log1p", context: str | None = None) -> AnnData:
        """The effects as an AnnData, one row per perturbation, for scanpy and pertpy.

        Parameters
        ----------
        scale
            Scale of the effects.
        context
            The context to take; all of them by default.

        Returns
        -------
        anndata.AnnData
            ``X`` effects, with a row of zeros for the control of each context, so that pertpy's
            ``PerturbationSpace`` can add and subtract them (``ensure_consistency=False``: they are
            differences from the control already); ``layers["noise"]`` their sampling
            variance; ``obs`` perturbation, context and number of cells; ``varm["control"]`` the
            control profiles. Rows are named by their perturbation, and the context where there
            are several.
        """
        from anndata import AnnData

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
        return AnnData(
            np.vstack([zeros, self.effect[scale][here]]), obs,
            pd.DataFrame(index=self.genes.astype(str)), varm={"control": control},
            layers={"noise": np.vstack([shared, self.noise(scale)[here]]).astype(np.float32)},
            uns={"gpjepa": {"scale": scale}},
        )  # fmt: skip

    def subset(self, keep: np.ndarray) -> EffectTable:
        """The table with some of its rows and all of its controls."""
        where = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep)
        return EffectTable(
            self.genes,
            tuple(self.rows[i] for i in where),
            self.n_cells[where],
            {s: self.effect[s][where] for s in SCALES},
            {s: self.variance[s][where] for s in SCALES},
            self.control,
            self.control_variance,
        )


def effect_table(
    counts: sp.csr_matrix | np.ndarray,
    library: np.ndarray,
    perturbations: Sequence[Perturbation],
    contexts: Sequence[str],
    genes: Sequence[str] | np.ndarray,
    keep: np.ndarray | None = None,
) -> EffectTable:
    """Mean effects from cells, in one pass that keeps the counts sparse.

    Parameters
    ----------
    counts
        Counts, shape (n_cells, n_genes).
    library
        Library size of each cell, shape (n_cells,).
    perturbations, contexts
        Perturbation and context of each cell.
    genes
        Names of the genes.
    keep
        Mask of the cells that count, shape (n_cells,); all of them by default.

    Returns
    -------
    EffectTable
        Every context needs control cells; contexts are known by them.

    Raises
    ------
    ValueError
        If a context has fewer than two control cells.
    """
    keys = list(zip(contexts, perturbations, strict=True))
    where = np.arange(len(keys)) if keep is None else np.flatnonzero(keep)
    groups = sorted({keys[i] for i in where})
    index = {key: i for i, key in enumerate(groups)}
    code = np.fromiter((index[keys[i]] for i in where), np.int64, len(where))
    known = {c for c, p in groups if p.is_control}
    missing = sorted({c for c, _ in groups} - known)
    lone = [
        c for (c, p), n in zip(groups, np.bincount(code), strict=True) if p.is_control and n < 2
    ]
    if lone:
        raise ValueError(
            f"A single control cell in context {', '.join(map(repr, lone))} shows no sampling "
            "error; at least 2 are needed. Add control cells or remove the context."
        )
    if missing:
        raise ValueError(
            f"No control cells in context {', '.join(map(repr, missing))}: an effect is a "
            "difference from the control of the same context. Add control cells or remove it."
        )
    profile, variance, n_cells = _profiles(
        sp.csr_matrix(counts), np.asarray(library), where, code, len(groups)
    )
    is_control = np.array([p.is_control for _, p in groups], bool)
    control_row = {c: i for i, (c, p) in enumerate(groups) if p.is_control}
    _fill_lone_cells(variance, n_cells, groups, control_row)
    own_control = np.array([control_row[c] for c, _ in groups], int)
    effect = {s: (profile[s] - profile[s][own_control])[~is_control] for s in SCALES}
    return EffectTable(
        np.asarray(genes, dtype=object),
        tuple(g for g in groups if not g[1].is_control),
        n_cells[~is_control],
        {s: effect[s].astype(np.float32) for s in SCALES},
        {s: variance[s][~is_control].astype(np.float32) for s in SCALES},
        {s: {c: profile[s][i].astype(np.float32) for c, i in control_row.items()} for s in SCALES},
        {s: {c: variance[s][i].astype(np.float32) for c, i in control_row.items()} for s in SCALES},
    )


def _profiles(
    counts: sp.csr_matrix,
    library: np.ndarray,
    where: np.ndarray,
    code: np.ndarray,
    n_groups: int,
) -> tuple[dict[Scale, np.ndarray], dict[Scale, np.ndarray], np.ndarray]:
    """Profile and sampling variance of each group of cells, on both scales.

    The pooled rate is the ratio r = ΣK / ΣL, with the ratio estimator's variance
    Σ(K - rL)² / (ΣL)² · n/(n-1) (Cochran, Sampling Techniques, ch. 6), brought to the log scale by
    the delta method.
    """
    n_genes = counts.shape[1]
    n = np.bincount(code, minlength=n_groups)
    sums = {name: np.zeros((n_groups, n_genes)) for name in ("y", "yy", "k", "kk", "kl")}
    for start in range(0, len(where), _CHUNK):
        part = slice(start, start + _CHUNK)
        block, size = counts[where[part]].astype(np.float64), library[where[part]]
        member = sp.csr_matrix(
            (np.ones(block.shape[0]), (code[part], np.arange(block.shape[0]))),
            shape=(n_groups, block.shape[0]),
        )
        y = log1p_rates(block, size).astype(np.float64)
        for name, cells in (
            ("y", y), ("yy", y.multiply(y)), ("k", block), ("kk", block.multiply(block)),
            ("kl", sp.diags(size) @ block),
        ):  # fmt: skip
            total = (member @ cells).tocoo()
            sums[name][total.row, total.col] += total.data
    total_library = np.bincount(code, library[where], n_groups)[:, None]
    square_library = np.bincount(code, library[where] ** 2, n_groups)[:, None]
    cells = n[:, None]
    spare = np.maximum(cells - 1, 1)
    mean = sums["y"] / cells
    rate = sums["k"] / total_library
    scatter = sums["kk"] - 2 * rate * sums["kl"] + rate**2 * square_library
    slope = PER / (1 + PER * rate)
    profile = {"mean_log1p": mean, "log1p_mean": np.log1p(PER * rate)}
    variance = {
        "mean_log1p": np.maximum(sums["yy"] - cells * mean**2, 0) / spare / cells,
        "log1p_mean": slope**2 * np.maximum(scatter, 0) / total_library**2 * cells / spare,
    }
    return profile, variance, n  # type: ignore[return-value]


def _fill_lone_cells(
    variance: dict[Scale, np.ndarray], n: np.ndarray, groups: list, control_row: dict[str, int]
) -> None:
    """A group of one cell shows no spread: take the control cells' of its context instead."""
    for i in np.flatnonzero(n < 2):
        control = control_row[groups[i][0]]
        for scale in SCALES:
            variance[scale][i] = variance[scale][control] * n[control] / n[i]


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
