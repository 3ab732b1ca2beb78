"""Metrics: each is declared once, with its direction, its best value and what it catches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from gpjepa.effects import noise_corrected_error

from ._tasks import SCALE, CellSet, Task, Truth

N_TOP = 20  # genes of R²
N_HIGHEST = 1_000  # genes of L2
N_CORRELATED = 50  # genes of the gene-gene correlation
N_CELLS = 500  # cells of each side of the energy distance
MIN_PROBE = 5  # training rows that a probe learns from
MIN_SET = 5  # measured genes that a gene set must have
INTERVALS = (50, 80, 95)


@dataclass(frozen=True)
class Prediction:
    """What a method predicts for the rows of a task.

    Attributes
    ----------
    effect
        Mean effects, scale ``mean_log1p``, against the training control, shape (n_rows, n_genes).
    cells
        Predicted cells of the rows.
    sd
        Standard deviation of the mean effects, shape (n_rows, n_genes), or None.
    refused
        Rows that the method did not predict, scored as the mean response; None for none.
    embed
        The method's own states of cells, shape (n_cells, n_dimensions), or None.
    """

    effect: np.ndarray
    cells: CellSet
    sd: np.ndarray | None = None
    refused: np.ndarray | None = None
    embed: Callable[[AnnData], np.ndarray] | None = None


@dataclass(frozen=True)
class Scoring:
    """A prediction beside one half of the truth; what several metrics need is computed once."""

    task: Task
    truth: Truth
    predicted: Prediction

    def each(self, function: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
        """A function of predicted and measured effect on the scored genes, for each row."""
        pairs = zip(self.predicted.effect, self.truth.effect, self.task.scored, strict=True)
        return np.array([function(p[s].astype(float), t[s].astype(float)) for p, t, s in pairs])

    @cached_property
    def noise(self) -> np.ndarray:
        """Sampling variance of the measured effects, shape (n_rows, n_genes)."""
        return self.truth.table.noise(SCALE)

    @cached_property
    def cell_eval(self) -> pd.DataFrame:
        """cell-eval2's values, one row per row of the task, a column per metric."""
        from ._cell_eval import run_cell_eval

        return run_cell_eval(self.task, self.truth, self.predicted.cells)

    @cached_property
    def shifts(self) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and measured shift of each row's mean state, shape (n_rows, n_dimensions).

        The method's own states, or principal components where it has none.
        """
        task, control = self.task, self.task.controls
        own, theirs, start = (self._states(s) for s in (self.predicted.cells, self.truth.cells,
                                                        control))  # fmt: skip
        rows, contexts = range(len(task.rows)), [c for c, _ in task.rows]
        base = {c: start[control.context == c].mean(0) for c in set(contexts)}
        theirs_base = {
            c: theirs[(self.truth.cells.row < 0) & (self.truth.cells.context == c)].mean(0)
            for c in set(contexts)
        }
        predicted = [own[self.predicted.cells.row == i].mean(0) - base[contexts[i]] for i in rows]
        measured = [theirs[self.truth.cells.row == i].mean(0) - theirs_base[contexts[i]]
                    for i in rows]  # fmt: skip
        return np.stack(predicted), np.stack(measured)

    @cached_property
    def trained_shifts(self) -> np.ndarray:
        """The same of the training rows, in the order of ``task.training.rows``."""
        labels = self.task.train.obs[["context", "perturbation"]].astype(str).agg(tuple, axis=1)
        own = self.predicted.embed is not None
        states = self._states(self.task.trained) if own else self.task.trained_components
        means = pd.DataFrame(states).groupby(labels.to_numpy()).mean()
        return np.stack([
            means.loc[[(c, str(p))]].to_numpy()[0] - means.loc[[(c, "control")]].to_numpy()[0]
            for c, p in self.task.training.rows
        ])  # fmt: skip

    def _states(self, cells: CellSet) -> np.ndarray:
        if self.predicted.embed is None:
            return self.task.pca.transform(cells.log1p)
        return np.asarray(self.predicted.embed(cells.to_anndata(self.task.genes)), float)

    @cached_property
    def enrichment(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Gene-set scores of predicted and measured effects; None without gene sets."""
        return _enrichment(self)

    def cells_of(self, row: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Predicted and measured cells of a row, log1p counts per 10,000."""
        return tuple(s.log1p[np.flatnonzero(s.row == row)]
                     for s in (self.predicted.cells, self.truth.cells))  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A declared metric.

    Attributes
    ----------
    label
        What figures and tables call it.
    axis
        What it looks at; a report shows all of them.
    direction
        Whether more is better, less is better, or the value closest to ``best``.
    best
        Value of a perfect prediction.
    catches
        What a bad value means, and what the metric cannot see.
    reference
        Paper or package it comes from.
    function
        One value per row of the task; NaN where it is not defined.
    denominator
        Column whose sum divides the sum of this one; means are taken if None.
    """

    label: str
    axis: Literal[
        "effect", "differential expression", "cells", "embedding", "decision", "calibration"
    ]
    direction: Literal["higher", "lower", "closest"]
    best: float
    catches: str
    reference: str
    function: Callable[[Scoring], np.ndarray]
    denominator: str | None = None


# Mean effects


def squared_error(scoring: Scoring) -> np.ndarray:
    """Noise-corrected squared error of the mean effect."""
    return noise_corrected_error(
        scoring.predicted.effect, scoring.truth.effect, scoring.noise, scoring.task.scored
    )


def squared_effect(scoring: Scoring) -> np.ndarray:
    """Noise-corrected squared size of the measured effect: the error of no change."""
    effect = scoring.truth.effect
    return noise_corrected_error(np.zeros_like(effect), effect, scoring.noise, scoring.task.scored)


def correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Pearson correlation; 0 for a constant prediction, which says nothing."""
    if measured.std() == 0:
        return float("nan")
    if predicted.std() <= 1e-12 * max(1.0, np.abs(predicted).max()):
        return 0.0
    return float(np.corrcoef(predicted, measured)[0, 1])


def _pearson_delta(scoring: Scoring) -> np.ndarray:
    return scoring.each(correlation)


def _pearson_centroid(scoring: Scoring) -> np.ndarray:
    task, predicted = scoring.task, scoring.predicted.effect - scoring.task.mean_response
    measured = scoring.truth.effect - task.mean_response
    return np.array([correlation(p[s], m[s])
                     for p, m, s in zip(predicted, measured, task.scored, strict=True)])  # fmt: skip


def _l2_highest(scoring: Scoring) -> np.ndarray:
    control = np.where(scoring.task.scored, scoring.task.control_profiles, -np.inf)
    top = np.argsort(-control, axis=1, kind="stable")[:, :N_HIGHEST]
    error = np.where(scoring.task.scored, scoring.predicted.effect - scoring.truth.effect, 0)
    return np.sqrt((np.take_along_axis(error, top, 1).astype(float) ** 2).sum(1))


def r2_top(
    predicted: np.ndarray, measured: np.ndarray, noise: np.ndarray, control: np.ndarray
) -> float:
    """R² of mean expression on the genes with the largest effect over its sampling error.

    Each of shape (n_genes,). scGen's R² (Lotfollahi 2019), on means of log1p counts per 10,000.
    """
    from sklearn.metrics import r2_score

    score = np.abs(measured) / np.sqrt(noise + 1e-8)
    top = np.argsort(-score, kind="stable")[:N_TOP]
    return float(r2_score(control[top] + measured[top], control[top] + predicted[top]))


def _r2_top(scoring: Scoring) -> np.ndarray:
    control = [scoring.truth.table.control[SCALE][c] for c, _ in scoring.task.rows]
    parts = zip(scoring.predicted.effect, scoring.truth.effect, scoring.noise, control,
                scoring.task.scored, strict=True)  # fmt: skip
    return np.array([r2_top(p[s], m[s], n[s], c[s]) for p, m, n, c, s in parts])


def _from_cell_eval(name: str) -> Callable[[Scoring], np.ndarray]:
    def value(scoring: Scoring) -> np.ndarray:
        return scoring.cell_eval[name].to_numpy()

    return value


# Cells


def energy_distance_unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """Squared energy distance of two samples, shapes (n, d) and (m, d): the U-statistic."""
    import torch

    from gpjepa.objectives import energy_distance

    return float(energy_distance(torch.from_numpy(x).double(), torch.from_numpy(y).double()))


def _energy_distance(scoring: Scoring) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = []
    for row in range(len(scoring.task.rows)):
        parts = [
            scoring.task.pca.transform(x[np.sort(rng.permutation(x.shape[0])[:N_CELLS])])
            for x in scoring.cells_of(row)
        ]
        values.append(energy_distance_unbiased(*parts))
    return np.array(values)


def _variance(values: sp.csr_matrix) -> np.ndarray:
    mean = np.asarray(values.mean(0)).ravel()
    square = np.asarray(values.multiply(values).mean(0)).ravel()
    return np.maximum(square - mean**2, 0) * values.shape[0] / max(values.shape[0] - 1, 1)


def _variance_log_ratio(scoring: Scoring) -> np.ndarray:
    values = []
    for row, scored in enumerate(scoring.task.scored):
        predicted, measured = (_variance(x)[scored].sum() for x in scoring.cells_of(row))
        values.append(abs(np.log(max(predicted, 1e-12) / measured)) if measured > 0 else np.nan)
    return np.array(values)


def _gene_correlation_error(scoring: Scoring) -> np.ndarray:
    values = []
    for row, (context, _) in enumerate(scoring.task.rows):
        mine = scoring.task.controls.context == context
        spread = _variance(scoring.task.controls.log1p[np.flatnonzero(mine)])
        top = np.argsort(-np.where(scoring.task.scored[row], spread, -1), kind="stable")
        predicted, measured = (
            _correlations(x[:, top[:N_CORRELATED]].toarray()) for x in scoring.cells_of(row)
        )
        values.append(float(np.sqrt(np.mean((predicted - measured) ** 2))))
    return np.array(values)


def _correlations(values: np.ndarray) -> np.ndarray:
    """Gene-gene correlations above the diagonal; 0 for a gene that does not vary."""
    centred = values - values.mean(0)
    size = np.sqrt((centred**2).sum(0))
    centred = centred / np.where(size > 0, size, 1)
    return (centred.T @ centred)[np.triu_indices(values.shape[1], 1)]


# Embedding


def _shifts(scoring: Scoring) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured shift from the control on the principal components."""
    axes = scoring.task.pca.components_.T
    effects = scoring.predicted.effect, scoring.truth.effect
    return tuple(np.where(scoring.task.scored, e, 0) @ axes for e in effects)


def _cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine of each row of x with each row of y; 0 for a row of zeros."""
    sizes = [np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    unit = [z / np.where(s > 0, s, 1) for z, s in zip((x, y), sizes, strict=True)]
    return unit[0] @ unit[1].T


def _embedding_cosine(scoring: Scoring) -> np.ndarray:
    return 1 - np.diag(_cosines(*_shifts(scoring)))


def _embedding_retrieval(scoring: Scoring) -> np.ndarray:
    """Share of the other perturbations of the context that are further away; ties count half."""
    likeness = _cosines(*_shifts(scoring))
    contexts = np.array([c for c, _ in scoring.task.rows])
    found = np.full(len(contexts), np.nan)
    for i, context in enumerate(contexts):
        others = np.flatnonzero((contexts == context) & (np.arange(len(contexts)) != i))
        if len(others):
            # Cosines of equal rows differ in their last digits.
            gap = likeness[i, i] - likeness[i, others]
            found[i] = np.mean((gap > 1e-9) + 0.5 * (np.abs(gap) <= 1e-9))
    return found


def _own_embedding_cosine(scoring: Scoring) -> np.ndarray:
    if scoring.predicted.embed is None:
        return np.full(len(scoring.task.rows), np.nan)
    return 1 - np.diag(_cosines(*scoring.shifts))


def _probe_error(scoring: Scoring) -> np.ndarray:
    """Squared error of effects read off the measured cells' states by ridge regression.

    The probe learns from the states and effects of the training rows.
    """
    from sklearn.linear_model import RidgeCV

    states = scoring.trained_shifts
    if len(states) < MIN_PROBE:
        return np.full(len(scoring.task.rows), np.nan)
    scale = np.sqrt((states**2).mean()) or 1.0
    probe = RidgeCV(np.logspace(-3, 3, 13), fit_intercept=False)
    probe.fit(states / scale, scoring.task.training.effect[SCALE])
    read = probe.predict(scoring.shifts[1] / scale)
    return noise_corrected_error(read, scoring.truth.effect, scoring.noise, scoring.task.scored)


# Decisions: what one would do next with the effects


def _enrichment(scoring: Scoring) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Gene-set scores of predicted and measured effects, rows × sets: decoupler's ULM."""
    sets = scoring.task.gene_sets
    if sets is None:
        return None
    import decoupler

    genes = scoring.task.genes
    net = pd.DataFrame(
        [(name, gene, 1.0) for name, members in sets.items() for gene in sorted(members)],
        columns=["source", "target", "weight"],
    )
    net = net[net["target"].isin(genes)]
    sizes = net["source"].value_counts()
    net = net[net["source"].map(sizes).ge(MIN_SET)]
    if net.empty:
        return None
    tables = []
    for effect in (scoring.predicted.effect, scoring.truth.effect):
        # The targeted gene is no evidence for its sets.
        values = np.where(scoring.task.scored, effect, 0)
        frame = pd.DataFrame(values, [str(i) for i in range(len(values))], genes)
        some = frame[values.any(1)]  # no effect at all has no slope: its scores are 0
        found = pd.DataFrame(0.0, some.index, sorted(set(net["source"])))
        if len(some):
            found = decoupler.mt.ulm(data=some, net=net, tmin=MIN_SET, empty=False)[0]
        tables.append(found.reindex(frame.index).fillna(0.0).sort_index(axis=1))
    return tables[0], tables[1]


def _rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman correlation of the rows of x and y; 0 for a constant row of x."""
    from scipy.stats import rankdata

    return np.array([correlation(rankdata(a), rankdata(b)) for a, b in zip(x, y, strict=True)])


def _gene_set_agreement(scoring: Scoring) -> np.ndarray:
    tables = scoring.enrichment
    if tables is None:
        return np.full(len(scoring.task.rows), np.nan)
    return _rank_correlations(*(t.to_numpy() for t in tables))


def _signature_ranking(scoring: Scoring) -> np.ndarray:
    """Mean over sets of how well perturbations are ranked by the set's score, for every row.

    Each row has its context's value, so that rows can be averaged as those of other metrics.
    """
    tables = scoring.enrichment
    contexts = np.array([c for c, _ in scoring.task.rows])
    found = np.full(len(contexts), np.nan)
    if tables is None:
        return found
    for context in sorted(set(contexts)):
        mine = contexts == context
        if mine.sum() >= 3:
            predicted, measured = (t.to_numpy()[mine].T for t in tables)
            found[mine] = np.nanmean(_rank_correlations(predicted, measured))
    return found


# Calibration


def _spread(scoring: Scoring) -> np.ndarray | None:
    """Standard deviation of the measured effect around the predicted one, if it is stated."""
    sd = scoring.predicted.sd
    return None if sd is None else np.sqrt(sd.astype(float) ** 2 + scoring.noise)


def _coverage(level: int) -> Callable[[Scoring], np.ndarray]:
    def covered(scoring: Scoring) -> np.ndarray:
        from scipy.stats import norm

        spread = _spread(scoring)
        if spread is None:
            return np.full(len(scoring.task.rows), np.nan)
        wrong = np.abs(scoring.predicted.effect - scoring.truth.effect)
        counts = scoring.task.scored & (spread > 0)
        inside = counts & (wrong <= norm.ppf(0.5 + level / 200) * spread)
        n = counts.sum(1)
        return np.where(n > 0, inside.sum(1) / np.maximum(n, 1), np.nan)

    return covered


def _crps(scoring: Scoring) -> np.ndarray:
    """Of a Gaussian (Gneiting and Raftery 2007, eq. 21), mean over genes."""
    from scipy.stats import norm

    spread = _spread(scoring)
    if spread is None:
        return np.full(len(scoring.task.rows), np.nan)
    spread = np.maximum(spread, 1e-12)
    z = (scoring.truth.effect - scoring.predicted.effect) / spread
    value = spread * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    return np.where(scoring.task.scored, value, 0).sum(1) / scoring.task.scored.sum(1)


def risk_coverage(error: np.ndarray, uncertainty: np.ndarray) -> float:
    """Mean error of the most certain share of the rows, averaged over all shares, over the mean.

    Below 1 if the stated uncertainty tells good predictions from bad ones (the area under the
    risk-coverage curve, Geifman and El-Yaniv 2017).

    Parameters
    ----------
    error, uncertainty
        Of each row, shape (n_rows,).
    """
    ordered = error[np.argsort(uncertainty, kind="stable")]
    risk = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float(risk.mean() / error.mean())


CELL_EVAL = "cell-eval2 (Arc Institute 2026)"

METRICS: dict[str, Metric] = {
    "squared_error": Metric(
        "error ÷ no change", "effect", "lower", 0.0,
        "wrong size or direction of the mean effect; sampling noise is taken off",
        "gpjepa.effects.noise_corrected_error", squared_error, "squared_effect",
    ),
    "expr_mse_unbiased_capped_norm": Metric(
        "normalised MSE", "effect", "lower", 0.0,
        "the same on pseudobulks of 50,000 counts, bounded per perturbation",
        CELL_EVAL, _from_cell_eval("expr_mse_unbiased_capped"), "expr_distance_unbiased",
    ),
    "l2_top1000": Metric(
        "L2, 1,000 highest genes", "effect", "lower", 0.0,
        "error on the genes with most counts; sampling noise counts as error",
        "Ahlmann-Eltze, Huber, Anders 2025", _l2_highest,
    ),
    "pearson_delta": Metric(
        "Pearson delta", "effect", "higher", 1.0,
        "wrong direction; blind to size, and high for any prediction of what all share",
        "Roohani, Huang, Leskovec 2023", _pearson_delta,
    ),
    "pearson_centroid": Metric(
        "Pearson delta, centroid", "effect", "higher", 1.0,
        "what sets a perturbation apart from the mean response; blind to size, and high for all "
        "where the mean response is mostly noise, which both sides then share",
        "Systema, Viñas Torné et al. 2025", _pearson_centroid,
    ),
    "r2_top20": Metric(
        "R², top 20 genes", "effect", "higher", 1.0,
        "error on the genes that respond most; dominated by expression levels",
        "scGen, Lotfollahi, Wolf, Theis 2019", _r2_top,
    ),
    "pds_cosine": Metric(
        "PDS, cosine", "effect", "higher", 1.0,
        "predictions that do not tell perturbations apart; blind to size",
        CELL_EVAL, _from_cell_eval("pds_cosine"),
    ),
    "de_wilcoxon_direction_fidelity_yield_raw": Metric(
        "direction fidelity", "differential expression", "higher", 1.0,
        "genes called with the wrong sign, or not called",
        CELL_EVAL, _from_cell_eval("de_wilcoxon_direction_fidelity_yield_raw"),
    ),
    "de_wilcoxon_direction_reach_raw": Metric(
        "direction reach", "differential expression", "higher", 1.0,
        "how deep into the ranking directions stay right",
        CELL_EVAL, _from_cell_eval("de_wilcoxon_direction_reach_raw"),
    ),
    "de_wilcoxon_sig_jaccard": Metric(
        "significant genes, Jaccard", "differential expression", "higher", 1.0,
        "too many or too few responding genes; depends on the numbers of cells",
        CELL_EVAL, _from_cell_eval("de_wilcoxon_sig_jaccard"),
    ),
    "de_wilcoxon_lfc_nmae": Metric(
        "fold-change error", "differential expression", "lower", 0.0,
        "wrong size of fold changes of responding genes",
        CELL_EVAL, _from_cell_eval("de_wilcoxon_lfc_nmae"),
    ),
    "energy_distance_unbiased": Metric(
        "energy distance", "cells", "lower", 0.0,
        "cells of another distribution, on components fitted to training cells",
        "Székely and Rizzo 2013, U-statistic; Peidli et al. 2024", _energy_distance,
    ),
    "variance_log_ratio": Metric(
        "|log variance ratio|", "cells", "lower", 0.0,
        "cells too alike or too scattered; blind to the mean",
        "total variance of log1p counts per 10,000", _variance_log_ratio,
    ),
    "gene_correlation_error": Metric(
        "gene correlation error", "cells", "lower", 0.0,
        "genes that no longer vary together; blind to the mean",
        "root mean square over pairs of the 50 most variable genes", _gene_correlation_error,
    ),
    "embedding_cosine": Metric(
        "embedding, cosine distance", "embedding", "lower", 0.0,
        "wrong direction on the principal components; blind to size",
        "cosine, on components fitted to training cells", _embedding_cosine,
    ),
    "embedding_retrieval": Metric(
        "embedding, retrieval", "embedding", "higher", 1.0,
        "predictions nearer to other perturbations than to their own; blind to size",
        "normalised rank of the cosine", _embedding_retrieval,
    ),
    "own_embedding_cosine": Metric(
        "own embedding, cosine distance", "embedding", "lower", 0.0,
        "predicted cells that lie elsewhere in the method's own space than measured ones; blind to "
        "size, and to how good the space is",
        "the JEPA's own metric", _own_embedding_cosine,
    ),
    "probe_error": Metric(
        "linear probe, error ÷ no change", "embedding", "lower", 0.0,
        "states that do not hold the effect; of measured cells, so it judges the representation "
        "(principal components where a method has none), not the prediction",
        "ridge regression from states to effects of training perturbations", _probe_error,
        "squared_effect",
    ),
    "gene_set_agreement": Metric(
        "gene sets, rank correlation", "decision", "higher", 1.0,
        "other pathways than those that respond; needs gene_sets",
        "Spearman over sets of decoupler's ULM scores (Badia-i-Mompel et al. 2022)",
        _gene_set_agreement,
    ),
    "signature_ranking": Metric(
        "signatures, ranking of perturbations", "decision", "higher", 1.0,
        "perturbations chosen for a signature that do not have it; needs gene_sets",
        "Spearman over perturbations of each set's ULM score, mean over sets", _signature_ranking,
    ),
    **{
        f"coverage_{level}": Metric(
            f"coverage of {level}% intervals", "calibration", "closest", level / 100,
            "intervals too narrow (below) or too wide (above)",
            "of the measured effect: interval and sampling noise together", _coverage(level),
        )
        for level in INTERVALS
    },
    "crps": Metric(
        "CRPS", "calibration", "lower", 0.0,
        "uncertainty that does not fit the errors",
        "Gneiting and Raftery 2007", _crps,
    ),
}  # fmt: skip

DENOMINATORS: dict[str, Callable[[Scoring], np.ndarray]] = {
    "squared_effect": squared_effect,
    "expr_distance_unbiased": _from_cell_eval("expr_distance_unbiased"),
}
"""Columns that are not metrics, but divide the sum of one."""


def score(scoring: Scoring, names: Iterable[str] = tuple(METRICS)) -> pd.DataFrame:
    """Metrics of a prediction beside one half of the truth.

    Parameters
    ----------
    scoring
        The pair.
    names
        Metrics to compute; all of them by default.

    Returns
    -------
    pandas.DataFrame
        One row per row of the task, a column per metric and per denominator of one.
    """
    wanted = {name: METRICS[name] for name in names}
    values = {name: metric.function(scoring) for name, metric in wanted.items()}
    divide = {m.denominator for m in wanted.values() if m.denominator is not None}
    values |= {name: DENOMINATORS[name](scoring) for name in sorted(divide)}
    return pd.DataFrame(values)
