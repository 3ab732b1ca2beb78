"""A model that starts from the encoder of a saved one."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from gpjepa.nn import load_genes

from ._module import GPJEPAModule

logger = logging.getLogger(__name__)


def sizes(
    given: Mapping[str, Any], theirs: Mapping[str, Any], init: Callable[..., None]
) -> dict[str, Any]:
    """The sizes of a pretrained encoder, unless others were asked for."""
    default = inspect.signature(init).parameters
    wrong = [
        f"{name}={value!r} (it has {theirs[name]!r})"
        for name, value in given.items()
        if value not in (default[name].default, theirs[name])
    ]
    if wrong:
        raise ValueError(
            f"The pretrained encoder cannot be used with {', '.join(wrong)}: leave them out."
        )
    return {name: theirs[name] for name in given}


def take_over(
    module: GPJEPAModule, genes: np.ndarray, source: GPJEPAModule, known: np.ndarray, path: str
) -> dict[str, Any]:
    """Take over encoder and block predictor, gene by gene by name; what of it is here.

    Parameters
    ----------
    module, genes
        The new module and its genes.
    source, known
        The module of the saved model and its genes.
    path
        Where that was saved.
    """
    where = pd.Index(known).get_indexer(pd.Index(genes))
    shared = int((where >= 0).sum())
    if not shared:
        raise ValueError(
            f"None of the {len(genes)} genes ({', '.join(genes[:3])}, ...) is known to the encoder "
            f"of {path}, which knows {', '.join(known[:3])}, ...: are both gene symbols, of one "
            "species?"
        )
    places = torch.from_numpy(where)
    for part in ("encoder", "target_encoder", "block_predictor"):
        load_genes(getattr(module, part), getattr(source, part), places)
    module.known.copy_((places >= 0) & source.known[places])
    logger.info("%d genes that the encoder of %s knows are not here.", len(known) - shared, path)
    if shared < len(genes):
        warnings.warn(
            f"The encoder of {path} knows {shared} of the {len(genes)} genes here; the others are "
            "hidden from it until pretrain().",
            UserWarning,
            stacklevel=4,
        )
    return {
        "path": path,
        "shared": shared,
        "new": [str(g) for g in genes[where < 0]],
        "unused": len(known) - shared,
    }
