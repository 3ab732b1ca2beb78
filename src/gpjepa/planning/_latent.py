"""Goals in latent space: predicted populations against wanted ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from gpjepa.perturbations import Perturbation

from ._model import as_model, check_context
from ._rank import check_sizes, listed

if TYPE_CHECKING:
    from gpjepa import GPJEPA


def latent_energy(
    model: GPJEPA,
    cells: AnnData,
    perturbations: Sequence[str | Perturbation],
    context: str | None = None,
    *,
    controls: AnnData | None = None,
    n_cells: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Energy distance between the states of predicted cells and of wanted cells.

    Parameters
    ----------
    model
        A trained model.
    cells
        The wanted cells.
    perturbations
        Candidates, such as the best of a :class:`Ranking`.
    context
        Context of the effects; optional if the model has only one.
    controls
        Control cells to start from; those of training by default.
    n_cells
        Cells of each population, at most.
    seed
        Which cells are taken.

    Returns
    -------
    pandas.DataFrame
        ``perturbation``; ``energy``, the unbiased squared energy distance; ``score``, the share of that
        of the controls that is gone: 1 is there, 0 is no change.
    """
    import torch

    from gpjepa.objectives import energy_distance

    check_sizes(n_cells=n_cells)
    context = check_context(as_model(model), context)
    wanted = listed(perturbations, "perturbations")
    rng = np.random.default_rng(seed)
    few = rng.permutation(cells.n_obs)[:n_cells]
    if len(few) < 2:
        raise ValueError(f"{len(few)} cells are too few to be a goal; give at least 2.")
    goal = torch.from_numpy(model.get_latent_representation(cells[few]).astype(float))
    control = str(model.parse("control")[Perturbation()])
    predicted = model.predict_perturbation(
        controls,
        [control, *wanted],
        context=context,
        n_samples=n_cells,
        layers=(),
        seed=seed,
    )
    key = model.registry_["setup_args"]["perturbation_key"]
    labels = predicted.obs[key].astype(str).to_numpy()
    states = torch.from_numpy(predicted.obsm["X_gpjepa"].astype(float))
    names = list(dict.fromkeys(labels))
    energy = {
        name: float(energy_distance(states[torch.from_numpy(labels == name)], goal))
        for name in names
    }
    none = energy.pop(control)
    frame = pd.DataFrame({"perturbation": list(energy), "energy": list(energy.values())})
    frame["score"] = 1 - frame["energy"] / none if none > 0 else np.nan
    return frame.sort_values("energy", kind="stable", ignore_index=True)
