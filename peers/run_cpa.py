# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch",
#     "cpa-tools==0.8.8",
#     "scvi-tools==0.20.3",  # the last on pytorch-lightning 1.9, whose hooks CPA uses
#     "jax==0.4.23",  # scvi-tools 0.20.3 imports its JAX models
#     "jaxlib==0.4.23",
#     "flax==0.8.1",
#     "anndata<0.10",
#     "scanpy<1.10",
#     "torchmetrics<1.5",
#     "mudata<0.3",  # imported by scvi-tools, and newer ones want a newer anndata
#     "requests",  # imported by scvi-tools 0.20.3, not declared
#     "rdkit",  # imported by cpa, for drugs
#     "adjustText",
#     "seaborn",
# ]
# [tool.uv]
# # CPA 0.8.8 asks for older ones than it needs, and for ray, which only its tuner uses.
# override-dependencies = [
#     "torch",
#     "setuptools>=77.0.3,<81",  # pytorch-lightning 1.9 imports pkg_resources, gone from 81
#     "numpy<2",
#     "scipy<1.13",
#     "pandas<2.2",
#     "scanpy<1.10",
#     "anndata<0.10",
#     "scvi-tools==0.20.3",
#     "rdkit",
#     "ray; sys_platform == 'never'",
# ]
# ///
"""CPA (Lotfollahi et al. 2023) with the settings of its Norman tutorial."""

import sys
import types

import anndata as ad
import numpy as np
import pandas as pd
from _serve import answer, as_arrays, device, log1p, serve

MODEL = {
    "n_latent": 32,
    "recon_loss": "nb",
    "doser_type": "linear",
    "n_hidden_encoder": 256,
    "n_layers_encoder": 4,
    "n_hidden_decoder": 256,
    "n_layers_decoder": 2,
    "use_batch_norm_encoder": True,
    "use_layer_norm_encoder": False,
    "use_batch_norm_decoder": False,
    "use_layer_norm_decoder": False,
    "dropout_rate_encoder": 0.2,
    "dropout_rate_decoder": 0.0,
    "variational": False,
}
PLAN = {
    "n_epochs_kl_warmup": None,
    "n_epochs_adv_warmup": 50,
    "n_epochs_mixup_warmup": 10,
    "n_epochs_pretrain_ae": 10,
    "mixup_alpha": 0.1,
    "lr": 1e-4,
    "wd": 3.2170178270865573e-06,
    "adv_steps": 3,
    "reg_adv": 10.0,
    "pen_adv": 20.0,
    "adv_lr": 1e-4,
    "adv_wd": 7.051355554517135e-06,
    "n_layers_adv": 2,
    "n_hidden_adv": 128,
    "use_batch_norm_adv": True,
    "use_layer_norm_adv": False,
    "dropout_rate_adv": 0.3,
    "step_size_lr": 25,
    "do_clip_grad": False,
    "adv_loss": "cce",
    "gradient_clip_value": 5.0,
}
# The tutorial's batch of 2,048 cells is for 90,000; 128 is the default of `train`.
TRAIN = {
    "max_epochs": 2_000,
    "batch_size": 128,
    "early_stopping_patience": 5,
    "check_val_every_n_epoch": 5,
}
CONTROLS = 500  # control cells that each prediction starts from, at most
DRAWS = 50  # of each control cell, for the mean effect
GIVEN = "contexts; takes no features of targets; a GPU if there is one"


def fit(train, task):
    # Ray is needed for tuning only, and importing tkinter is a slip.
    sys.modules["cpa._tuner"] = types.SimpleNamespace(run_autotune=None)
    sys.modules.setdefault("tkinter", types.SimpleNamespace(N=None))
    import cpa

    settings = {**TRAIN, **task["options"]}
    sizes = {**MODEL, **settings.pop("model", {})}
    # R² of every condition in every training step is only logged, and takes most of the time.
    full = cpa.CPAModule.r2_metric
    cpa.CPAModule.r2_metric = lambda self, *args, **kwargs: (
        (1e-9, 1e-9) if self.training else full(self, *args, **kwargs)
    )
    cells = with_questions(train, task)
    longest = max(len(task["targets"].get(x, [x])) for x in cells.obs["perturbation"].unique())
    cpa.CPA.setup_anndata(
        cells,
        perturbation_key="perturbation",
        control_group="control",
        categorical_covariate_keys=["context", *(["batch"] if "batch" in train.obs else [])],
        is_count_data=True,
        max_comb_len=max(longest, 2),
    )
    model = cpa.CPA(
        adata=cells,
        split_key="split",
        train_split="train",
        valid_split="valid",
        test_split="ood",
        seed=task["seed"],
        **sizes,
    )
    model.train(use_gpu=device() == "cuda", plan_kwargs=PLAN, save_path=".", **settings)
    model.predict(cells, batch_size=2_048)
    asked = cells[(cells.obs["split"] == "ood").to_numpy()].copy()
    return asked, np.exp(model.module.px_r.detach().cpu().numpy())


def with_questions(train, task):
    """Training cells, and control cells under the names to predict: CPA's counterfactuals."""
    train.obs_names = [f"train-{i}" for i in range(train.n_obs)]
    rng, targets = np.random.default_rng(task["seed"]), task["targets"]
    train.obs["split"] = rng.choice(["train", "valid"], train.n_obs, p=[0.85, 0.15])
    known = {t for x in train.obs["perturbation"].unique() for t in targets.get(x, [x])}
    # CPA splits names at "+": what is called so itself would be another combination.
    apart = [x for x in targets if any("+" in t for t in targets[x])]
    if apart:
        raise ValueError(f"CPA cannot tell names with '+' from combinations, such as {apart[0]}.")
    parts = [train]
    is_control = (train.obs["perturbation"] == "control").to_numpy()
    for i, (context, name) in enumerate(task["test"]):
        if not set(targets[name]) <= known:
            continue  # without an embedding, a target that was never trained on has no meaning
        of_context = np.flatnonzero(is_control & (train.obs["context"] == context).to_numpy())
        asked = train[np.sort(rng.permutation(of_context)[:CONTROLS])].copy()
        asked.obs["perturbation"], asked.obs["split"] = name, "ood"
        asked.obs_names = [f"asked-{i}-{k}" for k in range(asked.n_obs)]
        parts.append(asked)
    if len(parts) == 1:
        raise ValueError("CPA predicts combinations of trained targets; none was asked for.")
    return ad.concat(parts)


def predict(state, control, wanted):
    asked, theta = state
    context = control.obs["context"].iloc[0]
    mine = ((asked.obs["context"] == context) & asked.obs["perturbation"].isin(wanted)).to_numpy()
    if not mine.any():
        raise ValueError("CPA predicts combinations of trained targets; none was asked for here.")
    cells = asked[mine]
    # Mean counts; cells are drawn from its negative binomial.
    mean = np.maximum(np.asarray(cells.obsm["CPA_pred"], float), 1e-12)
    names, library = cells.obs["perturbation"].to_numpy(), cells.obs["library_size"].to_numpy(float)
    found = answer(draw(mean, theta), names, cells.var_names, "counts", library)
    found.uns["effect"] = as_arrays(
        effects(mean, theta, names, library, control[:, cells.var_names])
    )
    return found[:, control.var_names].copy()


def draw(mean, theta):
    return np.random.poisson(np.random.gamma(np.broadcast_to(theta, mean.shape), mean / theta))


def effects(mean, theta, names, library, control):
    """Mean effects of as many draws as make their noise small beside that of the control cells."""
    start, found = np.asarray(log1p(control).mean(0)).ravel(), {}
    for name in dict.fromkeys(names):
        mine = np.flatnonzero(names == name)
        draws = [
            np.log1p(1e4 * draw(mean[mine], theta) / library[mine, None]).mean(0)
            for _ in range(DRAWS)
        ]
        found[name] = np.mean(draws, axis=0) - start
    return pd.DataFrame.from_dict(found, orient="index", columns=control.var_names)


if __name__ == "__main__":
    serve(fit, predict, GIVEN, {*TRAIN, "model"})
