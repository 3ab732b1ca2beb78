"""CPA (Lotfollahi et al. 2023) with the settings of its Norman tutorial."""

import sys
import types

import anndata as ad
import numpy as np
from _serve import answer, serve

MODEL = {
    "n_latent": 32, "recon_loss": "nb", "doser_type": "linear", "n_hidden_encoder": 256,
    "n_layers_encoder": 4, "n_hidden_decoder": 256, "n_layers_decoder": 2,
    "use_batch_norm_encoder": True, "use_layer_norm_encoder": False,
    "use_batch_norm_decoder": False, "use_layer_norm_decoder": False, "dropout_rate_encoder": 0.2,
    "dropout_rate_decoder": 0.0, "variational": False,
}  # fmt: skip
PLAN = {
    "n_epochs_kl_warmup": None, "n_epochs_adv_warmup": 50, "n_epochs_mixup_warmup": 10,
    "n_epochs_pretrain_ae": 10, "mixup_alpha": 0.1, "lr": 1e-4, "wd": 3.2170178270865573e-06,
    "adv_steps": 3, "reg_adv": 10.0, "pen_adv": 20.0, "adv_lr": 1e-4,
    "adv_wd": 7.051355554517135e-06, "n_layers_adv": 2, "n_hidden_adv": 128,
    "use_batch_norm_adv": True, "use_layer_norm_adv": False, "dropout_rate_adv": 0.3,
    "step_size_lr": 25, "do_clip_grad": False, "adv_loss": "cce", "gradient_clip_value": 5.0,
}  # fmt: skip
# The tutorial's batch of 2,048 cells is for 90,000; 128 is the default of `train`.
TRAIN = {"max_epochs": 2_000, "batch_size": 128, "early_stopping_patience": 5,
         "check_val_every_n_epoch": 5}  # fmt: skip


def fit(train, task):
    # Ray is needed for tuning only, and importing tkinter is a slip.
    sys.modules["cpa._tuner"] = types.SimpleNamespace(run_autotune=None)
    sys.modules.setdefault("tkinter", types.SimpleNamespace(N=None))
    import cpa

    # R² of every condition in every training step is only logged, and takes most of the time.
    full = cpa.CPAModule.r2_metric
    cpa.CPAModule.r2_metric = lambda self, *args, **kwargs: (
        (1e-9, 1e-9) if self.training else full(self, *args, **kwargs)
    )
    cells = with_questions(train, task["test"], task["seed"])
    longest = max(len(x.split("+")) for x in cells.obs["perturbation"])
    cpa.CPA.setup_anndata(
        cells, perturbation_key="perturbation", control_group="control",
        categorical_covariate_keys=["context"], is_count_data=True, max_comb_len=max(longest, 2),
    )  # fmt: skip
    model = cpa.CPA(adata=cells, split_key="split", train_split="train", valid_split="valid",
                    test_split="ood", seed=task["seed"], **MODEL)  # fmt: skip
    model.train(use_gpu=False, plan_kwargs=PLAN, save_path=".", **{**TRAIN, **task["options"]})
    model.predict(cells, batch_size=2_048)
    asked = cells[(cells.obs["split"] == "ood").to_numpy()].copy()
    return asked, np.exp(model.module.px_r.detach().cpu().numpy())


def with_questions(train, test, seed):
    """Training cells, and control cells under the names to predict: CPA's counterfactuals."""
    train.obs_names = [f"train-{i}" for i in range(train.n_obs)]
    rng = np.random.default_rng(seed)
    train.obs["split"] = rng.choice(["train", "valid"], train.n_obs, p=[0.85, 0.15])
    known = {t for x in train.obs["perturbation"] for t in x.split("+")}
    parts = [train]
    is_control = (train.obs["perturbation"] == "control").to_numpy()
    for i, (context, name) in enumerate(test):
        if not set(name.split("+")) <= known:
            continue  # without an embedding, a target that was never trained on has no meaning
        asked = train[is_control & (train.obs["context"] == context).to_numpy()].copy()
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
    counts = np.random.poisson(np.random.gamma(np.broadcast_to(theta, mean.shape), mean / theta))
    found = answer(counts, cells.obs["perturbation"].to_numpy(), cells.var_names, "counts",
                   cells.obs["library_size"])  # fmt: skip
    return found[:, control.var_names].copy()


if __name__ == "__main__":
    serve(fit, predict)
