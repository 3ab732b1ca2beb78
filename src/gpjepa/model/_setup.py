"""What `setup_anndata` makes of its arguments, and what it checks before any long work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from gpjepa._checks import check_library, propose_library
from gpjepa.perturbations import LabelReader

from ._fields import (
    BATCH_KEY,
    CONTEXT_KEY,
    DATASET_KEY,
    LIBRARY_KEY,
    PERTURBATION_KEY,
    REPLICATE_KEY,
    CountsField,
    DatasetField,
    LabelField,
    LibraryField,
    PerturbationField,
    ReplicateField,
)

MIN_CELLS = 10
"""Perturbations with fewer cells than this are named in a warning."""


def make_fields(layer: str | None, arguments: Mapping[str, Any]) -> list:
    """Fields of the registry, by the arguments of ``setup_anndata``."""
    fields = [
        CountsField(REGISTRY_KEYS.X_KEY, layer, is_count_data=True),
        LabelField(CONTEXT_KEY, arguments["context_key"]),
        LabelField(BATCH_KEY, arguments["batch_key"]),
    ]
    if arguments.get("replicate_key") is not None:
        fields.append(ReplicateField(REPLICATE_KEY, arguments["replicate_key"]))
    reader = LabelReader.from_setup(arguments)
    if arguments["perturbation_key"] is not None:
        dosage_key = arguments["dosage_key"]
        if dosage_key is not None and reader.dose_pattern is not None:
            raise ValueError(
                "Doses are either in labels (dose_pattern) or in a column "
                "(dosage_key): give one of them."
            )
        fields.append(PerturbationField(arguments["perturbation_key"], reader, dosage_key))
    if arguments["library_size_key"] is not None:
        fields.append(LibraryField(LIBRARY_KEY, arguments["library_size_key"]))
    if arguments["dataset_key"] is not None:
        fields.append(DatasetField(DATASET_KEY, arguments["dataset_key"]))
    return fields


def check_cells(manager: AnnDataManager) -> None:
    """Library sizes; cells without counts are counted."""
    adata = manager.adata
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    if counts.shape[1] < 2:
        raise ValueError(
            "The AnnData holds 1 gene; at least 2 are needed, as genes are predicted from each "
            "other. Were genes subset by mistake?"
        )
    total = np.asarray(counts.sum(1), float).ravel()
    if LIBRARY_KEY in manager.data_registry:
        key = manager.data_registry[LIBRARY_KEY]["attr_key"]
        library = pd.to_numeric(adata.obs[key], errors="coerce").to_numpy(float)
        check_library(library, counts, f"obs[{key!r}]")
        return
    n = int((total == 0).sum())
    if n == len(total):
        raise ValueError(f"None of the {n} cells has any counts.")
    if n:
        warnings.warn(
            f"{n} of {len(total)} cells have no counts and are left out of training. To remove "
            "them: scanpy.pp.filter_cells(adata, min_counts=1).",
            UserWarning,
            stacklevel=4,
        )
    column = propose_library(adata, total)
    if column is not None:
        warnings.warn(
            f"The genes here hold {np.median(total):.0f} counts per cell (median), "
            f"obs[{column!r}] says {adata.obs[column].median():.0f}: if these are the counts of "
            f"the whole cell, call with library_size_key={column!r}, so that counts per 10,000 "
            "mean the same as elsewhere.",
            UserWarning,
            stacklevel=4,
        )


def check_groups(manager: AnnDataManager) -> None:
    """Every context needs control cells; small groups are named."""
    values = manager.get_state_registry(PERTURBATION_KEY)["values"]
    if not any(targets for targets, _ in values):
        raise ValueError(
            "Every cell is a control cell: there is no perturbation to learn from. To pretrain "
            "on these cells alone, call with perturbation_key=None."
        )
    contexts = np.array(manager.get_state_registry(CONTEXT_KEY)["values"], dtype=object)
    code = manager.get_from_registry(PERTURBATION_KEY).ravel()
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    kept = code >= 0
    if LIBRARY_KEY not in manager.data_registry:
        kept &= np.asarray(counts.sum(1)).ravel() > 0
    code = code[kept]
    context = manager.get_from_registry(CONTEXT_KEY).ravel()[kept]
    control = [i for i, (targets, _) in enumerate(values) if not targets]
    without = sorted(set(context) - set(context[np.isin(code, control)]))
    if without:
        raise ValueError(
            f"No control cells in context {', '.join(map(repr, contexts[without]))}: an "
            "effect is a difference from the control cells of the same context. Add control "
            "cells, remove the context, or choose another context_key."
        )
    n_control = np.bincount(context[np.isin(code, control)], minlength=len(contexts))
    lone = [contexts[c] for c in np.flatnonzero(n_control == 1)]
    if lone:
        raise ValueError(
            f"A single control cell in context {', '.join(map(repr, lone))}: at least 2 are "
            "needed, better 50. Add control cells or remove the context."
        )
    n = np.bincount(code, minlength=len(values))
    spelling = manager.get_state_registry(PERTURBATION_KEY)["spelling"]
    small = [f"{spelling[i]} ({n[i]})" for i, (t, _) in enumerate(values) if t and n[i] < MIN_CELLS]
    few = [f"control of {contexts[c]} ({m})" for c, m in enumerate(n_control) if m < MIN_CELLS]
    small = [*few, *small]
    if small:
        warnings.warn(
            f"Groups of fewer than {MIN_CELLS} cells, which weigh little: {len(small)}, namely "
            f"{', '.join(small[:20])}{' ...' if len(small) > 20 else ''}.",
            UserWarning,
            stacklevel=4,
        )
