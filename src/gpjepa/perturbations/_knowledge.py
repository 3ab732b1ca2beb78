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
    symbols, others = _names()
    with np.load(_HERE / "human_genes.npz") as file:
        values = {name: file[key] for name, key in _TABLES.items()}
    with np.load(_HERE / "gene_sets.npz") as file:
        sets = dict(file)
    values |= {name: _membership(sets, key, len(symbols)) for name, key in _SETS.items()}
    return tuple(TargetFeatures(symbols, x, name, other_names=others) for name, x in values.items())


def _names() -> tuple[list[str], dict[str, str]]:
    """Symbols, and symbols by other names."""
    with np.load(_HERE / "human_genes.npz") as file:
        symbols, ensembl, others, places = (
            file[key].tolist() for key in ("symbol", "ensembl", "other", "other_is")
        )
    found = {other: symbols[place] for other, place in zip(others, places, strict=True)}
    return symbols, found | {e: s for e, s in zip(ensembl, symbols, strict=True) if e}


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
        least = max(len(unique), 1) / 2
        # The tables take 100 MB: they are not read for screens of other names.
        if len(unique & set().union(*_names())) < least:
            return (), missing
        known = [t for t in unique if any(f.covers(t) for f in human_genes())]
        return (human_genes() if len(known) >= least else ()), missing
    if given is None:
        return (), missing
    return ((given,) if isinstance(given, TargetFeatures) else tuple(given)), missing
