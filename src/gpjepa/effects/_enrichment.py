"""Gene sets in effects, by decoupler's univariate linear model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from gpjepa.perturbations import read_gmt


def gene_set_scores(
    values: pd.DataFrame, sets: Mapping[str, Iterable[str]], min_genes: int
) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Score and p-value of each set in each row; None if no set has enough of the genes.

    Parameters
    ----------
    values
        Effects, shape (n_rows, n_genes), columns named by gene.
    sets
        Genes by set.
    min_genes
        Genes of a set that must be among the columns.

    Returns
    -------
    tuple
        Scores and p-values, shape (n_rows, n_sets); a row without any effect has scores of 0.
    """
    try:
        import decoupler
    except ImportError as error:
        raise ImportError(
            "Enrichment needs decoupler: pip install 'gpjepa[enrichment]'."
        ) from error
    net = pd.DataFrame(
        [(name, gene, 1.0) for name, genes in sets.items() for gene in sorted(genes)],
        columns=["source", "target", "weight"],
    )
    net = net[net["target"].isin(values.columns)]
    net = net[net["source"].map(net["source"].value_counts()).ge(min_genes)]
    if net.empty:
        return None
    names = sorted(set(net["source"]))
    score = pd.DataFrame(0.0, values.index, names)
    p = pd.DataFrame(1.0, values.index, names)
    some = values[values.to_numpy().any(1)]  # no effect at all has no slope
    if len(some):
        found = decoupler.mt.ulm(data=some, net=net, tmin=min_genes, empty=False)
        score.loc[some.index], p.loc[some.index] = found[0][names], found[1][names]
    return score, p


def enrichment(
    effects: pd.DataFrame,
    gene_sets: str | Path | Sequence[str | Path] | Mapping[str, Iterable[str]],
    *,
    targets: Mapping[str, Iterable[str]] | None = None,
    min_genes: int = 5,
) -> pd.DataFrame:
    """Gene sets that predicted effects raise or lower.

    A linear model of the effects over their standard deviations on membership in the set, by
    decoupler (Badia-i-Mompel et al. 2022, ``decoupler.mt.ulm``).

    Parameters
    ----------
    effects
        As :meth:`gpjepa.GPJEPA.predict_effects` gives them.
    gene_sets
        One or several GMT files, or genes by name of the set.
    targets
        Targeted genes by perturbation, whose own effects are left out: that a knock-out lowers its
        own gene is no evidence for the gene's sets.
    min_genes
        Genes of a set that must have been measured.

    Returns
    -------
    pandas.DataFrame
        One row per perturbation × context × set, the clearest first: ``perturbation, context, set,
        score`` (t of the set's genes against all others), ``pvalue, padj`` (Benjamini–Hochberg
        within a perturbation and context), ``n_genes``.

    Raises
    ------
    ValueError
        If no set has enough of the genes.
    ImportError
        If decoupler is not installed (the extra ``enrichment``).
    """
    if isinstance(gene_sets, Mapping):
        sets = {str(k): set(v) for k, v in gene_sets.items()}
    else:
        paths = [gene_sets] if isinstance(gene_sets, str | Path) else list(gene_sets)
        sets = {k: v for path in paths for k, v in read_gmt(path).items()}
    keys = ["perturbation", "context"]
    frame = effects.assign(z=effects["effect"] / np.maximum(effects["sd"], 1e-12))
    wide = frame.pivot(index=keys, columns="gene", values="z")
    for perturbation, context in wide.index:
        own = set((targets or {}).get(perturbation, ()))
        wide.loc[(perturbation, context), wide.columns.isin(own)] = 0
    labels = [str(i) for i in range(len(wide))]
    found = gene_set_scores(wide.set_axis(labels, axis=0), sets, min_genes)
    if found is None:
        raise ValueError(
            f"None of the {len(sets)} gene sets has {min_genes} of the {wide.shape[1]} genes, such "
            f"as {list(wide.columns[:3])}: are both gene symbols, of one species?"
        )
    n_genes = {name: len(set(genes) & set(wide.columns)) for name, genes in sets.items()}
    tables = []
    for label, pair in zip(labels, wide.index, strict=True):
        score, p = (part.loc[label] for part in found)
        table = pd.DataFrame(
            {"set": score.index, "score": score.to_numpy(), "pvalue": p.to_numpy()}
        )
        table["padj"] = false_discovery_control(table["pvalue"])
        table["n_genes"] = table["set"].map(n_genes)
        table.insert(0, "perturbation", pair[0])
        table.insert(1, "context", pair[1])
        tables.append(table.sort_values("pvalue", kind="stable"))
    return pd.concat(tables, ignore_index=True)
