"""What is known of human genes; it comes with the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.sparse as sp

from ._features import TargetFeatures

_HERE = Path(__file__).parent / "knowledge"
_TABLES = {"GO annotation": "go", "co-citation": "pubmed"}
MissingFeatures = Literal["error", "mean"]
_SETS = {
    "Reactome": "reactome",
    "GO processes": "go_biological_process",
    "gene families": "families",
}


@cache
def human_genes() -> tuple[TargetFeatures, ...]:
    """What is known of human genes: annotation, co-citation, pathways, processes and families.

    Genes are known by their symbols, by former symbols and aliases that mean one gene only, and by
    Ensembl ids. Names of several genes, such as ERK or COX2, have to be spelt out: MAPK1, PTGS2.

    Returns
    -------
    tuple of TargetFeatures
        Leading components of propagated GO annotation and of PubMed co-citation; membership in
        Reactome pathways, GO biological processes and HGNC gene families.

    References
    ----------
    Ashburner et al. (2000), the Gene Ontology; Gillespie et al. (2022), Reactome; Tweedie et al.
    (2021), HGNC. Editions and licences are in ``knowledge/README.md`` beside this file.
    """
    with np.load(_HERE / "human_genes.npz") as file:
        known = dict(file)
    with np.load(_HERE / "gene_sets.npz") as file:
        sets = dict(file)
    symbols = known["symbol"].tolist()
    others = dict(zip(known["other"].tolist(), known["symbol"][known["other_is"]], strict=True))
    others |= {e: s for e, s in zip(known["ensembl"].tolist(), symbols, strict=True) if e}
    values = {name: known[key] for name, key in _TABLES.items()}
    values |= {name: _membership(sets, key, len(symbols)) for name, key in _SETS.items()}
    return tuple(TargetFeatures(symbols, x, name, other_names=others) for name, x in values.items())


def _membership(sets: dict[str, np.ndarray], key: str, n: int) -> sp.csc_matrix:
    """Genes by sets, each divided by the square root of its size."""
    start = sets[f"{key}_start"]
    size = np.diff(start)
    shape = n, len(size)
    return sp.csc_matrix((np.repeat(size**-0.5, size), sets[f"{key}_genes"], start), shape)


def choose_features(
    given: Literal["auto"] | TargetFeatures | Sequence[TargetFeatures] | None,
    missing: MissingFeatures | None,
    targets: Iterable[str],
) -> tuple[tuple[TargetFeatures, ...], MissingFeatures]:
    """Features to predict from, and what to do with targets that they do not cover.

    Parameters
    ----------
    given
        Features; None for none. ``"auto"``: what is known of human genes, if at least half of the
        targets are covered.
    missing
        Refuse targets without features, or let them take the mean effect; by default the latter
        with ``"auto"``.
    targets
        Targets perturbed in training.

    Returns
    -------
    tuple
        The features, and what to do with targets that they do not cover.

    Raises
    ------
    ValueError
        If a word other than ``"auto"`` is given.
    """
    if isinstance(given, str) and given != "auto":
        raise ValueError(
            f"target_features={given!r} is not known; give 'auto', None, or TargetFeatures, such as "
            "TargetFeatures.from_gene_sets(...)."
        )
    missing = missing or ("mean" if given == "auto" else "error")
    if given == "auto":
        unique = set(targets)
        known = [t for t in unique if any(f.covers(t) for f in human_genes())]
        return (human_genes() if 2 * len(known) >= max(len(unique), 1) else ()), missing
    if given is None:
        return (), missing
    return ((given,) if isinstance(given, TargetFeatures) else tuple(given)), missing
