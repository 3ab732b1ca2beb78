# /// script
# requires-python = ">=3.12"
# dependencies = ["pertpy[scgen]>=1.4"]
# ///
"""scGen (Lotfollahi, Wolf, Theis 2019), as pertpy ships it: one shift in latent space."""

import numpy as np
from _serve import answer, log1p, serve

PUBLISHED = {
    "max_epochs": 100,
    "batch_size": 32,
    "early_stopping": True,
    "early_stopping_patience": 25,
}
GIVEN = "contexts as cell types; takes no features of targets"


def fit(train, task):
    import pertpy

    settings = {**PUBLISHED, **task["options"]}
    sizes = settings.pop("model", {})
    train.X = log1p(train)
    pertpy.tl.Scgen.setup_anndata(train, batch_key="perturbation", labels_key="context")
    model = pertpy.tl.Scgen(train, **sizes)
    model.train(seed=task["seed"], **settings)
    return model, set(train.obs["perturbation"])


def predict(state, control, wanted):
    model, known = state
    control.X = log1p(control)
    values, labels = [], []
    # A perturbation that was not trained on has no shift.
    for name in (w for w in wanted if w in known):
        cells, _ = model.predict(ctrl_key="control", stim_key=name, adata_to_predict=control.copy())
        cells = cells[:, control.var_names]
        x = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
        values.append(np.maximum(x, 0))
        labels += [name] * len(x)
    if not values:
        raise ValueError("scGen predicts perturbations that were measured elsewhere; none was.")
    return answer(np.vstack(values), labels, control.var_names, "log1p")


if __name__ == "__main__":
    serve(fit, predict, GIVEN, {*PUBLISHED, "model"})
