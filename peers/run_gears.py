# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch",
#     "cell-gears==0.1.2",
#     "torch_geometric>=2.8",
#     "scipy<1.15",  # GEARS indexes a sparse matrix with a Series, which 1.15 refuses
#     "pandas<3",  # GEARS needs groupby().apply() to keep the column
# ]
# ///
"""GEARS (Roohani, Huang, Leskovec 2023), with its GO graph from a gene-set file."""

import os
import pickle
import random

import anndata as ad
import numpy as np
from _serve import answer, device, log1p, serve

PUBLISHED = {"epochs": 20, "lr": 1e-3, "hidden_size": 64}
GIVEN = "a graph of the GO terms of the option gene_sets; a GPU if there is one"


def fit(train, task):
    if train.obs["context"].nunique() > 1:
        raise ValueError("GEARS knows no contexts; these cells have several.")
    if "gene_sets" not in task["options"]:
        raise ValueError("GEARS needs GO terms: give the option gene_sets, a GMT file.")
    import torch
    from gears import GEARS, PertData

    random.seed(task["seed"])
    torch.manual_seed(task["seed"])
    settings = {**PUBLISHED, **task["options"]}
    terms = terms_of_genes(settings.pop("gene_sets"))
    # GEARS writes its graph to ./data, and downloads what it does not find there.
    os.makedirs("data", exist_ok=True)
    with open("data/gene2go_all.pkl", "wb") as file:
        pickle.dump(terms, file)
    cells = as_gears_wants(train, terms, task["targets"])
    data = PertData("data", default_pert_graph=False)
    data.new_data_process(dataset_name="screen", adata=cells)
    data.load(data_path="data/screen")
    with open("split.pkl", "wb") as file:
        pickle.dump(lists(cells, task["seed"]), file)
    data.prepare_split(split="custom", seed=task["seed"], split_dict_path="split.pkl")
    data.get_dataloader(batch_size=32, test_batch_size=128)
    model = GEARS(data, device=device())
    model.model_initialize(hidden_size=settings["hidden_size"])
    model.train(epochs=settings["epochs"], lr=settings["lr"])
    return model, task["targets"]


def terms_of_genes(path):
    """Gene → its sets, of a GMT file."""
    found = {}
    with open(path) as lines:
        for line in lines:
            name, _, *genes = line.rstrip("\n").split("\t")
            for gene in genes:
                found.setdefault(gene, set()).add(name)
    return found


def as_gears_wants(train, terms, targets):
    names = train.obs["perturbation"]
    apart = [x for x in targets if any("+" in t for t in targets[x])]
    if apart:
        raise ValueError(f"GEARS cannot tell names with '+' from combinations, such as {apart[0]}.")
    # A target without terms would be trained on as if nothing were perturbed.
    keep = np.array([x == "control" or all(t in terms for t in targets[x]) for x in names])
    condition = [
        "ctrl" if x == "control" else x if len(targets[x]) > 1 else f"{x}+ctrl" for x in names
    ]
    cells = ad.AnnData(log1p(train), obs=train.obs[[]].copy(), var=train.var[[]].copy())
    cells.obs["condition"], cells.obs["cell_type"] = condition, "cells"
    cells.var["gene_name"] = cells.var_names.to_numpy()
    return cells[keep].copy()


def lists(cells, seed):
    """Training and validation conditions; GEARS also wants a test list, which decides nothing."""
    names = sorted(set(cells.obs["condition"]) - {"ctrl"})
    chosen = list(np.random.default_rng(seed).permutation(names)[: max(1, round(0.1 * len(names)))])
    train = [x for x in names if x not in chosen]
    return {"train": [*train, "ctrl"], "val": chosen, "test": chosen}


def predict(state, control, wanted):
    model, targets = state
    known = set(model.pert_list)
    asked = [w for w in wanted if set(targets[w]) <= known and len(targets[w]) <= 2]
    if not asked:
        raise ValueError("None of the targets is in the GO graph.")
    found = model.predict([targets[w] for w in asked])
    profiles = np.stack([np.maximum(found["_".join(targets[w])], 0) for w in asked])
    genes = model.adata.var["gene_name"].to_numpy()
    return answer(profiles, asked, genes, "log1p")[:, control.var_names].copy()


if __name__ == "__main__":
    serve(fit, predict, GIVEN, {*PUBLISHED, "gene_sets"})
