# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["torch", "arc-state>=0.11.1"]  # its code is CC BY-NC-SA 4.0
# ///
"""State's transition model (Adduri et al. 2025) in gene space, through its command line.

The published model takes 40,000 steps and wants a GPU: ``model``, ``max_steps``, ``batch_size`` and
``overrides`` (of its hydra configuration) are options, and a report should say so. State has no
convention for combinations: a perturbation is described by the sum of its targets' codes.
"""

import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
from _serve import answer, log1p, serve, target_codes

TRAIN = {"model": "state_sm", "max_steps": 40_000, "batch_size": 8}
GIVEN = (
    "contexts as cell types; features of the targets where the data have any, else a code per "
    "trained target; a GPU if there is one"
)


def fit(train, task):
    import torch

    options = {**TRAIN, **task["options"]}
    names = sorted({*train.obs["perturbation"], *(name for _, name in task["test"])})
    of = {"control": ["control"], **task["targets"]}
    trained = {t for x in train.obs["perturbation"].unique() for t in of[x]} - {"control"}
    codes = target_codes(trained, task.get("features"))
    width = codes.shape[1] + 1
    place = {
        t: torch.nn.functional.pad(torch.from_numpy(c), (0, 1))
        for t, c in zip(codes.index, codes.to_numpy())
    }
    place["control"] = torch.eye(width)[-1]
    features = {x: sum(place[t] for t in of[x]) for x in names if set(of[x]) <= set(place)}
    torch.save(features, "features.pt")
    here = Path.cwd()
    (here / "cells").mkdir()
    as_state_wants(train).write_h5ad(here / "cells" / "screen.h5ad")
    (here / "split.toml").write_text(split(train, here, task["seed"]))
    command(
        "train",
        f"data.kwargs.toml_config_path={here / 'split.toml'}",
        "data.kwargs.embed_key=X_hvg",
        "data.kwargs.output_space=gene",
        "data.kwargs.pert_col=perturbation",
        "data.kwargs.cell_type_key=context",
        "data.kwargs.batch_col=batch",
        "data.kwargs.control_pert=control",
        f"data.kwargs.perturbation_features_file={here / 'features.pt'}",
        "data.kwargs.num_workers=0",
        f"training.max_steps={options['max_steps']}",
        f"training.val_freq={max(1, options['max_steps'] // 4)}",
        f"training.batch_size={options['batch_size']}",
        f"training.train_seed={task['seed']}",
        f"model={options['model']}",
        "use_wandb=false",
        "overwrite=true",
        f"output_dir={here}",
        "name=run",
        *options.get("overrides", []),
    )
    return set(features), train.var_names


def as_state_wants(cells):
    logged = log1p(cells)
    own = ad.AnnData(
        logged, obs=cells.obs[["perturbation", "context"]].copy(), var=cells.var[[]].copy()
    )
    own.obs["batch"] = cells.obs["batch"] if "batch" in cells.obs else "0"
    for column in own.obs:
        own.obs[column] = own.obs[column].astype("category")
    own.var["gene_name"] = own.var_names.to_numpy()
    own.var["highly_variable"] = True
    own.obsm["X_hvg"] = np.asarray(logged.toarray(), np.float32)
    own.uns["log1p"] = {"base": None}
    return own


def split(train, here, seed):
    """A tenth of the perturbations for validation; State also wants a test list."""
    context = str(train.obs["context"].iloc[0])
    mine = train.obs.loc[train.obs["context"] == context, "perturbation"]
    names = sorted(set(mine) - {"control"})
    if len(names) < 2:
        raise ValueError("State needs two perturbations of one context to validate on.")
    chosen = list(np.random.default_rng(seed).permutation(names)[: max(1, round(0.1 * len(names)))])
    return (
        f"[datasets]\nscreen = {json.dumps(str(here / 'cells'))}\n"
        f'[training]\nscreen = "train"\n[fewshot.{json.dumps("screen." + context)}]\n'
        f"val = {json.dumps(chosen)}\ntest = {json.dumps(chosen)}\n"
    )


def command(*arguments):
    cli = Path(sys.executable).parent / "state"
    subprocess.run([cli, "tx", *arguments], check=True, stdin=subprocess.DEVNULL)


def predict(state, control, wanted):
    known, genes = state
    asked = [w for w in wanted if w in known]
    if not asked:
        raise ValueError(
            "Nothing is known of the targets: they were not trained and have no features."
        )
    parts = [control.copy()]
    for i, name in enumerate(asked):
        part = control.copy()
        part.obs["perturbation"] = name
        part.obs_names = [f"{i}-{x}" for x in part.obs_names]
        parts.append(part)
    question = as_state_wants(ad.concat(parts)[:, genes].copy())
    question.write_h5ad("question.h5ad")
    command(
        "infer",
        "--model-dir",
        "run",
        "--checkpoint",
        "run/checkpoints/final.ckpt",
        "--adata",
        "question.h5ad",
        "--embed-key",
        "X_hvg",
        "--pert-col",
        "perturbation",
        "--output",
        "inferred.h5ad",
        "--quiet",
    )
    found = ad.read_h5ad("inferred.h5ad")
    found = found[found.obs["perturbation"].isin(asked).to_numpy()]
    values = np.maximum(np.asarray(found.obsm["X_hvg"], float), 0)
    cells = answer(values, found.obs["perturbation"].to_numpy(), genes, "log1p")
    return cells[:, control.var_names].copy()


if __name__ == "__main__":
    serve(fit, predict, GIVEN, {*TRAIN, "overrides"})
