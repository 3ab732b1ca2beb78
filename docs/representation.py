"""What states of cells hold, and how much of it is left when fewer counts are seen.

Usage: ``python docs/representation.py DATA OUT.csv [DATA_SET ...]``, with DATA the folder of the
real cells and gene sets. Every encoder learns from the same training cells without labels (but for
adversarial masks); a logistic regression from their states to labels is then scored on test cells
whose counts were thinned to a share of what was measured. No perturbation is held out: this is about
states, not about predictions.
"""

import sys
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gpjepa import GPJEPA

N_LATENT, DEPTHS, SEEDS = 32, (1.0, 0.5, 0.25, 0.1), (0, 1, 2)
GENE_SETS = ("hallmark.gmt", "reactome.gmt", "go_biological_process.gmt")


def arms(data):
    """Arguments of the model and of stage A, by name; None for scVI."""
    sets = [data / "knowledge" / name for name in GENE_SETS]
    return {
        "JEPA": ({}, {}),
        "JEPA, gene sets": ({}, {"masks": "gene_sets", "gene_sets": sets}),
        "JEPA, adversarial": ({}, {"masks": "adversarial"}),
        "JEPA, SIGReg without teacher": (
            {}, {"regulariser": "sigreg", "regulariser_weight": 5.0, "teacher": False}
        ),
        "JEPA, thinned views": ({}, {"thinning": 0.9}),
        "JEPA, Perceiver": ({"encoder": "perceiver"}, {}),
        "masked reconstruction": ({}, {"objective": "reconstruction"}),
        "contrastive": ({}, {"objective": "contrastive"}),
        "PCA": ({"encoder": "pca"}, {}),
        "random encoder": ({}, None),
        "scVI": None,
    }  # fmt: skip


def halves(labels, seed=0):
    """Half of the cells of every label for training."""
    rng, train = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        train[mine[: len(mine) // 2]] = True
    return [train]


def screens(data):
    """Per data set: cells, labels, masks of training cells, and whether perturbations are named."""
    zhao = ad.read_h5ad(data / "zhao_2021_mini.h5ad")
    patients = zhao.obs["patient"].astype(str).to_numpy()
    yield "Zhao 2021", zhao, "perturbation", [patients != p for p in np.unique(patients)]
    for name, file in (("Papalexi 2021", "papalexi"), ("Norman 2019", "norman")):
        (path,) = data.glob(f"{file}_*_mini.h5ad")
        cells = ad.read_h5ad(path)
        yield name, cells, "perturbation", halves(cells.obs["perturbation"].astype(str).to_numpy())
    pair = mudata.read_h5mu(data / "peterson_2017_reapseq_mini.h5mu")
    rna, protein = (pair.mod[m].copy() for m in ("rna", "protein"))
    counts = np.log1p(protein.X.toarray() if sp.issparse(protein.X) else np.asarray(protein.X))
    states = KMeans(8, n_init=10, random_state=0).fit_predict(
        counts - counts.mean(1, keepdims=True)
    )
    rna.obs["state"] = [f"state {s}" for s in states]
    yield "Peterson 2017", rna, "state", halves(rna.obs["state"].to_numpy())


def thinned(cells, depth):
    found = cells.copy()
    counts = sp.csr_matrix(found.X, copy=True)
    counts.data = np.random.default_rng(0).binomial(counts.data.astype(np.int64), depth)
    counts.eliminate_zeros()
    found.X = counts.astype(np.float32)
    return found[np.asarray(counts.sum(1)).ravel() > 0].copy()


def embedder(arm, cells, key, seed):
    """States of any cells, by an encoder that learned from these."""
    scvi.settings.seed = seed
    cells = cells.copy()
    if arm is None:
        scvi.model.SCVI.setup_anndata(cells)
        model = scvi.model.SCVI(cells, n_latent=N_LATENT)
        model.train(enable_progress_bar=False)
        return lambda other: model.get_latent_representation(other)
    options, plan = arm
    labelled = plan is not None and plan.get("masks") == "adversarial"
    if labelled:
        GPJEPA.setup_anndata(cells, perturbation_key=key, control=cells.obs[key].iloc[0])
    else:
        GPJEPA.setup_anndata(cells, perturbation_key=None)
    model = GPJEPA(cells, n_latent=N_LATENT, **options)
    model.pretrain(0 if plan is None else None, plan_kwargs=plan, enable_progress_bar=False)
    return model.get_latent_representation


def main(data, out, wanted):
    rows = []
    for name, cells, key, splits in screens(data):
        if wanted and name.split()[0] not in wanted:
            continue
        cells = ad.AnnData(sp.csr_matrix(cells.X).astype(np.float32), cells.obs[[key]].astype(str),
                           cells.var[[]])  # fmt: skip
        cells = cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()
        for label, arm in arms(data).items():
            for fold, train in enumerate(splits):
                for seed in SEEDS if len(splits) == 1 else SEEDS[:1]:
                    embed = embedder(arm, cells[train].copy(), key, seed)
                    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
                    probe.fit(embed(cells[train].copy()), cells.obs[key][train])
                    for depth in DEPTHS:
                        test = thinned(cells[~train], depth)
                        found = probe.predict(embed(test))
                        score = balanced_accuracy_score(test.obs[key], found)
                        rows.append((name, label, fold, seed, depth, score))
            table = pd.DataFrame(
                rows, columns=["data", "encoder", "fold", "seed", "depth", "score"]
            )
            mine = table[(table["data"] == name) & (table["encoder"] == label)]
            means = mine.groupby("depth")["score"].mean().sort_index(ascending=False)
            print(f"{name} | {label} | {means.mean():.3f} | "
                  + " | ".join(f"{m:.3f}" for m in means), flush=True)  # fmt: skip
            table.to_csv(out, index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], set(sys.argv[3:]))
