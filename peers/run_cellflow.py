# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "cellflow-tools==0.0.9",
#     "jax[cuda12]; sys_platform == 'linux'",  # a GPU where there is one
#     "requests",  # imported by cellflow, declared in an extra only
#     "scikit-learn",
# ]
# ///
"""CellFlow (Klein et al. 2025) with the settings of its tutorial on combinations.

The published network (three layers of 2,048 and of 4,096 units, 300,000 iterations) wants a GPU:
``network``, ``num_iterations`` and ``batch_size`` are options, and a report should say so.
"""

import functools

import numpy as np
import pandas as pd
from _serve import answer, log1p, serve, target_codes

NETWORK = {"hidden_dims": [2_048] * 3, "decoder_dims": [4_096] * 3}
TRAIN = {"num_iterations": 300_000, "batch_size": 1_024}
COMPONENTS = 100
GIVEN = "contexts; features of the targets where the data have any, else a code per trained target"


def fit(train, task):
    from cellflow.model import CellFlow
    from cellflow.preprocessing import centered_pca
    from cellflow.utils import match_linear

    options = dict(task["options"])
    learning = options.pop("learning_rate", None)
    network = {**NETWORK, **options.pop("network", {})}
    if learning is not None:
        import optax

        network["optimizer"] = optax.MultiSteps(optax.adam(learning), 5)
    of = {"control": [], **task["targets"]}
    trained = {t for x in train.obs["perturbation"].unique() for t in of[x]}
    codes = target_codes(trained, task.get("features"))
    slots = max(len(targets) for targets in of.values())
    contexts = sorted(set(train.obs["context"]))
    train.X = log1p(train)
    label(train, codes, of, slots, contexts)
    components = min(COMPONENTS, train.n_vars - 1)
    centered_pca(train, method="scanpy", keep_centered_data=False, n_comps=components)
    profiles = {c: mean_state(train, c) for c in contexts}
    train.uns["context_states"] = profiles
    # A context without perturbed cells has nothing for its control cells to move to.
    perturbed = set(train.obs.loc[~train.obs["is_control"], "context"])
    learned = train[train.obs["context"].isin(perturbed).to_numpy()].copy()
    flow = CellFlow(learned, solver="otfm")
    several = len(contexts) > 1
    of_context = {
        "sample_covariates": ["context"],
        "sample_covariate_reps": {"context": "context_states"},
        "split_covariates": ["context"],
    }
    flow.prepare_data(
        sample_rep="X_pca",
        control_key="is_control",
        null_value=0.0,
        perturbation_covariates={"perturbation": columns(slots)},
        perturbation_covariate_reps={"perturbation": "target_codes"},
        max_combination_length=slots,
        **(of_context if several else {}),
    )
    layers = {"layer_type": "mlp", "dims": [256, 256], "dropout_rate": 0.0}
    flow.prepare_model(
        condition_mode="deterministic",
        regularization=0.0,
        pooling="mean",
        layers_before_pool={"perturbation": layers, **({"context": layers} if several else {})},
        layers_after_pool=layers,
        condition_embedding_dim=64,
        cond_output_dropout=0.9,
        conditioning="concatenation",
        probability_path={"constant_noise": 1.5},
        match_fn=functools.partial(match_linear, epsilon=1.0, tau_a=1.0, tau_b=1.0),
        linear_projection_before_concatenation=True,
        seed=task["seed"],
        **network,
    )
    flow.train(callbacks=[], valid_freq=10**9, **{**TRAIN, **options})
    return flow, train, codes, of, slots, contexts


def columns(slots):
    return tuple(f"target_{i}" for i in range(slots))


def label(cells, codes, of, slots, contexts):
    """What CellFlow reads: a column per target, codes of targets, a flag for control cells."""
    cells.obs["is_control"] = (cells.obs["perturbation"] == "control").to_numpy()
    targets = [of[x] for x in cells.obs["perturbation"]]
    for i, column in enumerate(columns(slots)):
        names = [t[i] if i < len(t) else "control" for t in targets]
        cells.obs[column] = pd.Categorical(names, categories=["control", *codes.index])
    cells.obs["context"] = pd.Categorical(cells.obs["context"], categories=contexts)
    nothing = np.zeros(codes.shape[1], np.float32)
    cells.uns["target_codes"] = {"control": nothing, **dict(zip(codes.index, codes.to_numpy()))}


def mean_state(train, context):
    mine = (train.obs["context"] == context).to_numpy() & train.obs["is_control"].to_numpy()
    return np.asarray(train.obsm["X_pca"][mine].mean(0), np.float32)


def predict(state, control, wanted):
    from cellflow.preprocessing import project_pca

    flow, train, codes, of, slots, contexts = state
    asked = [w for w in wanted if set(of[w]) <= set(codes.index)]
    if not asked:
        raise ValueError(
            "Nothing is known of the targets: they were not trained and have no features."
        )
    genes = control.var_names
    control = control[:, train.var_names].copy()
    control.X = log1p(control)
    context = control.obs["context"].iloc[0]
    label(control, codes, of, slots, contexts)
    control.uns["context_states"] = train.uns["context_states"]
    project_pca(control, ref_adata=train)
    wishes = pd.DataFrame({"condition": asked, "is_control": False})
    for i, column in enumerate(columns(slots)):
        names = [of[w][i] if i < len(of[w]) else "control" for w in asked]
        wishes[column] = pd.Categorical(names, categories=["control", *codes.index])
    wishes["context"] = pd.Categorical([context] * len(asked), categories=contexts)
    moved = flow.predict(
        adata=control, sample_rep="X_pca", condition_id_key="condition", covariate_data=wishes
    )
    axes, centre = np.asarray(train.varm["PCs"]), np.asarray(train.varm["X_mean"]).reshape(1, -1)
    cells = [np.maximum(np.squeeze(np.asarray(moved[w])) @ axes.T + centre, 0) for w in asked]
    labels = np.repeat(asked, [len(c) for c in cells])
    return answer(np.vstack(cells), labels, train.var_names, "log1p")[:, genes].copy()


if __name__ == "__main__":
    serve(fit, predict, GIVEN, {*TRAIN, "network", "learning_rate"})
