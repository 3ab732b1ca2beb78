"""What metrics of representations and of decisions compute. One value per row of the task."""

from __future__ import annotations

import numpy as np

from gpjepa.benchmark.tasks import SCALE
from gpjepa.effects import noise_corrected_error

from ._effect import correlation
from ._scoring import Scoring

N_NEIGHBOURS, N_NEIGHBOURS_OF = 10, 100  # neighbours, and cells of a perturbation at most
N_TYPED = 2_000  # cells on which cell types are compared, at most
MIN_PROBE = 5  # training rows that a probe learns from


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


def embedding_cosine(scoring: Scoring) -> np.ndarray:
    return 1 - np.diag(_cosines(*_shifts(scoring)))


def embedding_retrieval(scoring: Scoring) -> np.ndarray:
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


def own_embedding_cosine(scoring: Scoring) -> np.ndarray:
    return 1 - np.diag(_cosines(*scoring.shifts))


def neighbour_retrieval(scoring: Scoring) -> np.ndarray:
    """Share of the nearest measured cells of the predicted ones that have their perturbation.

    Every perturbation of the context and its control stand there with equally many cells.
    """
    from sklearn.neighbors import NearestNeighbors

    predicted, measured = scoring.states
    own, theirs = scoring.predicted.cells.row, scoring.truth.cells
    contexts = np.array([c for c, _ in scoring.task.rows])
    found = np.full(len(contexts), np.nan)
    for context in sorted(set(contexts)):
        # Streams of their own: what a method predicts must not decide what it is held against.
        rng, own_rng = np.random.default_rng(0), np.random.default_rng(1)
        rows = np.flatnonzero(contexts == context)
        groups = [
            np.flatnonzero((theirs.row == r) & (theirs.context == context)) for r in (-1, *rows)
        ]
        n = min(N_NEIGHBOURS_OF, *map(len, groups))
        cells = np.concatenate([np.sort(rng.permutation(g)[:n]) for g in groups])
        label = np.repeat([-1, *rows], n)
        near = NearestNeighbors(n_neighbors=min(N_NEIGHBOURS, n)).fit(measured[cells])
        for row in rows:
            mine = np.sort(own_rng.permutation(np.flatnonzero(own == row))[:N_NEIGHBOURS_OF])
            among = near.kneighbors(predicted[mine], return_distance=False)
            found[row] = (label[among] == row).mean()
    return found


def cell_type_separation(scoring: Scoring) -> np.ndarray:
    """AvgBIO of the states of measured cells, the same value for every row."""
    found = np.full(len(scoring.task.rows), np.nan)
    types = scoring.truth.cells.cell_type
    assert types is not None
    some = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(types != ""))[:N_TYPED])
    types = types[some]
    if 1 < len(set(types)) < len(types):
        found[:] = avg_bio(scoring.known_states(scoring.truth.cells)[some], types)
    return found


def avg_bio(states: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """How well states separate labels (scGPT, Cui et al. 2024): 1 is best.

    Mean of ARI and NMI of a k-means clustering with as many clusters as there are labels, and of
    the silhouette width of the labels scaled to 0..1. Euclidean distances between states.

    Parameters
    ----------
    states
        States of cells, shape (n_cells, n_dimensions).
    labels
        Cell types or other labels, shape (n_cells,).
    seed
        Seed of the clustering.

    Returns
    -------
    float
    """
    from sklearn import metrics
    from sklearn.cluster import KMeans

    clusters = KMeans(len(set(labels)), n_init=10, random_state=seed).fit_predict(states)
    parts = (
        metrics.adjusted_rand_score(labels, clusters),
        metrics.normalized_mutual_info_score(labels, clusters),
        (1 + metrics.silhouette_score(states, labels)) / 2,
    )
    return float(np.mean(parts))


def probe_error(scoring: Scoring) -> np.ndarray:
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


def _rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman correlation of the rows of x and y; 0 for a constant row of x."""
    from scipy.stats import rankdata

    return np.array([correlation(rankdata(a), rankdata(b)) for a, b in zip(x, y, strict=True)])


def gene_set_agreement(scoring: Scoring) -> np.ndarray:
    tables = scoring.enrichment
    if tables is None:
        return np.full(len(scoring.task.rows), np.nan)
    return _rank_correlations(*(t.to_numpy() for t in tables))


def signature_ranking(scoring: Scoring) -> np.ndarray:
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
