"""Target features that are made of effects or of control cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from gpjepa.perturbations import TargetFeatures

from ._measured import Measured
from ._scales import Scale, log1p_rates
from ._stack import shrink
from ._table import EffectTable


def effect_features(
    effects: EffectTable, scale: Scale | None = None, name: str = "effects elsewhere"
) -> TargetFeatures:
    """Effects of the same targets in another data set, shrunk and averaged over its contexts.

    Targets are alike by the cosine of their effects there. A target whose effect there is no more
    than noise is not covered.

    Parameters
    ----------
    effects
        Effects of the other data set; its genes need not be those of the data to be predicted.
    scale
        Scale of the effects; the table's first by default.
    name
        What explanations call these features.
    """
    scale = effects.check_scale(effects.scales[0] if scale is None else scale)
    singles = [i for i, (_, p) in enumerate(effects.rows) if len(p.targets) == 1]
    if not singles:
        raise ValueError(f"{name}: the other data set has no target that was perturbed alone.")
    factor = shrink(Measured(effects, scale), singles, [lambda j: []]).factor
    shrunken = factor[:, None] * effects.effect[scale][singles]
    names = [effects.rows[i][1].targets[0] for i in singles]
    mean = pd.DataFrame(shrunken, names).groupby(level=0).mean()
    return TargetFeatures(list(mean.index), mean.to_numpy(), name, source=effects.cells)


def gene_loadings(values: np.ndarray, n_components: int) -> np.ndarray:
    """Loadings of genes on the first principal components of cells, scaled by their spread.

    Parameters
    ----------
    values
        Log-normalised expression, shape (n_cells, n_genes).
    n_components
        At most so many columns are returned.

    Returns
    -------
    numpy.ndarray
        Shape (n_genes, k); their products approximate the covariance of the genes.
    """
    from sklearn.utils.extmath import randomized_svd

    x = values - values.mean(0)
    k = min(n_components, *x.shape)
    _, singular, components = randomized_svd(x, k, random_state=0)
    return (components * singular[:, None]).T / np.sqrt(len(x))


def coexpression_features(
    counts: sp.csr_matrix,
    library: np.ndarray,
    genes: Sequence[str] | np.ndarray,
    n_components: int = 50,
    name: str = "co-expression",
) -> TargetFeatures:
    """Co-expression in control cells: genes are alike if they vary together from cell to cell.

    Parameters
    ----------
    counts
        Counts of the control cells of training, shape (n_cells, n_genes).
    library
        Library size of each cell.
    genes
        Names of the genes.
    n_components
        Principal components of the cells that stand for their covariance.
    name
        What explanations call these features.
    """
    values = log1p_rates(sp.csr_matrix(counts), np.asarray(library)).toarray()
    loadings = gene_loadings(values, n_components)
    loadings[values.min(0) == values.max(0)] = 0  # rounding errors of genes that never vary
    return TargetFeatures(list(map(str, genes)), loadings, name)
