"""What is gained by features of targets never perturbed, and by which: docs/response.md.

python docs/response_features.py
"""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from response import ON, table_of

from gpjepa import GPJEPA
from gpjepa.datasets import simulate
from gpjepa.effects import gene_loadings
from gpjepa.perturbations import TargetFeatures
from gpjepa.response import ResponsePredictor

SEEDS = range(300, 304)  # of no screen on which anything was chosen
N_CELLS, N_GENES, N_TARGETS, FOLDS = 10_000, 600, 80, 5
N_STATES = 64
KNOWN = 0.5  # of the true regulatory edges


def regulons(adata: ad.AnnData, targets: list[str], rng: np.random.Generator) -> TargetFeatures:
    """What a target regulates, in the truth, of which only some is known."""
    network = adata.uns["simulation"]["network"]
    at = [list(network["regulators"]).index(t) for t in targets]
    edges = np.hstack([network["regulation"][at], network["response"][at]])
    return TargetFeatures(targets, edges * (rng.random(edges.shape) < KNOWN), "regulons")


def of_cells(cells: ad.AnnData, targets: list[str]) -> tuple[TargetFeatures, TargetFeatures]:
    """What the encoder and principal components make of the targets' own genes.

    Both know the cells of training alone, without labels.
    """
    scvi.settings.seed = 0
    cells = cells.copy()
    GPJEPA.setup_anndata(cells, perturbation_key=None)
    model = GPJEPA(cells, n_latent=N_STATES)
    model.pretrain(enable_progress_bar=False)
    counts = cells.X.toarray()
    values = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    mean = torch.from_numpy(values.mean(0)).float()
    jacobian = torch.func.jacrev(lambda x: model.module.encoder(x[None])[0])(mean)
    at = cells.var_names.get_indexer(targets)
    jepa = jacobian.detach().numpy().T[at] * values.std(0)[at, None]
    loadings = gene_loadings(values, N_STATES)[at]
    return TargetFeatures(targets, jepa, "JEPA"), TargetFeatures(targets, loadings, "components")


def of_screen(seed: int) -> list[dict]:
    """Squared errors of targets that were hidden, by kind of features."""
    adata = simulate(N_CELLS, N_GENES, n_targets=N_TARGETS, n_combinations=0, seed=seed)
    table, truth = table_of(adata), adata.uns["simulation"]
    effect = dict(zip(truth["rows"]["perturbation"], truth["effect"][ON], strict=True))
    rows = [p for _, p in table.rows]
    targets = [p.targets[0] for p in rows]
    true, scored = np.stack([effect[t] for t in targets]), ~table.targeted(range(len(rows)))
    rng = np.random.default_rng(seed)
    known = regulons(adata, targets, rng)
    fold = rng.permutation(len(rows)) % FOLDS
    found = []
    for k in range(FOLDS):
        out = fold == k
        hidden = adata.obs["perturbation"].isin([t for t, o in zip(targets, out, strict=True) if o])
        jepa, components = of_cells(adata[~hidden.to_numpy()], targets)
        kinds = {"regulons, half known": [known], "the same, dealt out anew": [known.permuted(1)]}
        kinds |= {"JEPA's gene vectors": [jepa], "principal loadings": [components], "none": []}
        wanted = [p for p, o in zip(rows, out, strict=True) if o]
        for name, features in kinds.items():
            predictor = ResponsePredictor(features, missing_features="mean").fit(table.subset(~out))
            for gate in ("auto", 0, 1):
                said = predictor.predict(wanted, ["all"] * len(wanted), ON, gate).mean
                error = float((((said - true[out]) * scored[out]) ** 2).sum())
                nothing = float(((true[out] * scored[out]) ** 2).sum())
                found.append({"features": name, "gate": gate, "error": error, "nothing": nothing})
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    rows = []
    for seed in SEEDS:
        rows += of_screen(seed)
        print(f"seed {seed}", flush=True)
    summed = pd.DataFrame(rows).groupby(["features", "gate"], sort=False).sum()
    print((summed["error"] / summed["nothing"]).unstack(sort=False).round(3).to_string())
