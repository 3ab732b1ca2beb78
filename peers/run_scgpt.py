# /// script
# requires-python = "==3.11.*"
# dependencies = [
#     "torch",
#     "scgpt==0.2.4",
#     "scipy<1.15",
#     "pandas<3",
#     "scanpy<1.12",
#     "datasets",  # imported by scgpt.scbank
#     "ipython",  # imported by scgpt.utils, not declared
#     "requests",
# ]
# [tool.uv]
# # They bring JAX, an old scvi-tools and torchtext, of which the perturbation model uses none.
# override-dependencies = [
#     "torch",
#     "scvi-tools; sys_platform == 'never'",
#     "torchtext; sys_platform == 'never'",
#     "cell-gears; sys_platform == 'never'",
#     "orbax; sys_platform == 'never'",
#     "scib; sys_platform == 'never'",
#     "leidenalg; sys_platform == 'never'",
#     "umap-learn; sys_platform == 'never'",
#     "numba; sys_platform == 'never'",
# ]
# ///
"""scGPT (Cui et al. 2024), fine-tuned on perturbed cells from weights that the user brings.

``weights`` is the folder of a pretrained model: ``args.json``, ``vocab.json``, ``best_model.pt``.
The settings are those of its perturbation tutorial; control cells are paired with perturbed ones at
random. A target's flag sits on its own token, so one that is not measured becomes a gene of zeros.
"""

import copy
import json
import sys
import types
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
from _serve import answer, device, log1p, serve

PREDICTED_AT_ONCE = 8  # all genes attend to all: memory grows with their square
PUBLISHED = {
    "epochs": 15,
    "lr": 1e-4,
    "batch_size": 64,
    "max_genes": 1536,
    "patience": 5,
    "n_cells": 300,
}
GIVEN = "pretrained weights of the option; takes no features of targets; a GPU if there is one"
FILES = ("args.json", "vocab.json", "best_model.pt")
SPECIAL = ("<pad>", "<cls>", "<eoc>")


def weights_folder(options):
    """The folder with pretrained weights, or an error that says what it must hold."""
    if "weights" not in options:
        raise ValueError(
            "scGPT needs pretrained weights: give the option weights, a folder with "
            + ", ".join(FILES)
        )
    folder = Path(options["weights"])
    missing = [f for f in FILES if not (folder / f).is_file()]
    if missing:
        raise ValueError(f"{folder} holds no pretrained scGPT: {', '.join(missing)} missing.")
    return folder


def fit(train, task):
    if train.obs["context"].nunique() > 1:
        raise ValueError("scGPT's perturbation model knows no contexts; these cells have several.")
    settings = {**PUBLISHED, **task["options"]}
    folder = weights_folder(settings)
    import torch

    torch.manual_seed(task["seed"])
    of = {"control": ["control"], **task["targets"]}
    cells, vocabulary = with_targets(train, of), json.loads((folder / "vocab.json").read_text())
    missing = [t for t in SPECIAL if t not in vocabulary]
    if missing:
        raise ValueError(f"vocab.json of the weights has no {missing}: it is not scGPT's.")
    tokens = np.array([vocabulary.get(g, vocabulary["<pad>"]) for g in cells.var_names])
    net = Network(pretrained(folder, vocabulary), tokens, settings["batch_size"], of)
    rng = np.random.default_rng(task["seed"])
    names = np.array(sorted(set(cells.obs["perturbation"]) - {"control"}))
    if len(names) < 2:
        raise ValueError(
            f"scGPT is fine-tuned on perturbations but one, of which there are {len(names)}."
        )
    held = rng.permutation(names)[: max(1, round(0.1 * len(names)))]
    is_control = (cells.obs["perturbation"] == "control").to_numpy()
    learn = np.flatnonzero(~is_control & ~cells.obs["perturbation"].isin(held).to_numpy())
    controls = np.flatnonzero(is_control)
    optimizer = torch.optim.Adam(net.model.parameters(), lr=settings["lr"])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    best, kept, waited = -np.inf, copy.deepcopy(net.model.state_dict()), 0
    for epoch in range(settings["epochs"]):
        net.model.train()
        for batch in np.array_split(rng.permutation(learn), -(-len(learn) // net.batch_size)):
            genes = np.sort(rng.permutation(cells.n_vars)[: settings["max_genes"]])
            base = rng.choice(controls, len(batch))
            loss = net.loss(cells[base], cells[batch], genes)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.model.parameters(), 1.0)
            optimizer.step()
        schedule.step()
        score = validation(net, cells, held, controls[: net.batch_size])
        if not np.isfinite(score):
            raise ValueError("scGPT's fine-tuning diverged: it predicts nothing that varies.")
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, validation {score:.4f}")
        if score > best:
            best, kept, waited = score, copy.deepcopy(net.model.state_dict()), 0
        else:
            waited += 1
            if waited >= settings["patience"]:
                break
    net.model.load_state_dict(kept)
    net.model.eval()
    return net, cells[is_control].copy(), train.var_names, settings["n_cells"]


def with_targets(train, of):
    """Log-normalised cells with a gene for every target."""
    targets = {t for x in train.obs["perturbation"].unique() for t in of[x]} - {"control"}
    extra = sorted(targets - set(train.var_names))
    nothing = sp.csr_matrix((train.n_obs, len(extra)), dtype=np.float32)
    cells = ad.AnnData(sp.csr_matrix(sp.hstack([log1p(train), nothing])), obs=train.obs.copy())
    cells.var_names = [*train.var_names, *extra]
    return cells


def pretrained(folder, vocabulary):
    """The transformer with the user's weights."""
    import torch

    stand_in_for_torchtext()
    from scgpt.model import TransformerGenerator
    from scgpt.utils import load_pretrained

    size = json.loads((folder / "args.json").read_text())
    model = TransformerGenerator(
        len(vocabulary),
        size["embsize"],
        size["nheads"],
        size["d_hid"],
        size["nlayers"],
        nlayers_cls=size["n_layers_cls"],
        n_cls=1,
        vocab=vocabulary,
        dropout=0.2,
        pad_token="<pad>",
        pad_value=0,
        pert_pad_id=2,
        use_fast_transformer=False,
    )
    parts = ["encoder", "value_encoder", "transformer_encoder"]
    found = torch.load(folder / "best_model.pt", map_location="cpu")
    return load_pretrained(model, found, prefix=parts, verbose=False).to(device())


def stand_in_for_torchtext():
    """Torchtext is no longer built for new versions of torch; scGPT only derives a class from it."""
    try:
        import torchtext.vocab  # noqa: F401
    except (ImportError, OSError):
        package, vocab = types.ModuleType("torchtext"), types.ModuleType("torchtext.vocab")
        vocab.Vocab, package.vocab = object, vocab
        sys.modules.update({"torchtext": package, "torchtext.vocab": vocab})


class Network:
    """The transformer with the tokens of the genes."""

    def __init__(self, model, tokens, batch_size, of):
        self.model, self.tokens, self.batch_size, self.of = model, tokens, batch_size, of

    def __call__(self, values, flags, genes):
        """Expression of the genes after the flagged targets were perturbed."""
        import torch

        where = next(self.model.parameters()).device
        ids = torch.from_numpy(self.tokens[genes]).expand(len(values), -1)
        padding = torch.zeros(ids.shape, dtype=torch.bool)
        ids, values, flags, padding = (x.to(where) for x in (ids, values, flags, padding))
        return self.model(ids, values, flags, src_key_padding_mask=padding)["mlm_output"].cpu()

    def loss(self, base, perturbed, genes):
        """Squared error on some genes of the perturbed cells, from as many control cells."""
        import torch

        values, wanted = (torch.from_numpy(x.X[:, genes].toarray()) for x in (base, perturbed))
        flags = flags_of(perturbed.obs["perturbation"], perturbed.var_names, self.of)[:, genes]
        return torch.nn.functional.mse_loss(self(values, torch.from_numpy(flags), genes), wanted)

    def predict(self, base, perturbation):
        """Predicted expression of each control cell, shape (n_cells, n_genes)."""
        import torch

        genes, found = np.arange(base.n_vars), []
        self.model.eval()
        with torch.no_grad():
            for start in range(0, base.n_obs, PREDICTED_AT_ONCE):
                part = base[start : start + PREDICTED_AT_ONCE]
                flags = flags_of([perturbation] * part.n_obs, base.var_names, self.of)
                values = torch.from_numpy(part.X.toarray())
                found.append(self(values, torch.from_numpy(flags), genes).numpy())
        return np.concatenate(found)


def flags_of(perturbations, genes, of):
    """1 at the targets of each cell, shape (n_cells, n_genes)."""
    place = {g: i for i, g in enumerate(genes)}
    flags = np.zeros((len(perturbations), len(genes)), np.int64)
    for i, perturbation in enumerate(perturbations):
        flags[i, [place[t] for t in of[perturbation]]] = 1
    return flags


def validation(net, cells, held, controls):
    """Mean Pearson correlation of the predicted and the measured mean of held-out perturbations."""
    found = []
    for name in held:
        predicted = net.predict(cells[controls], name).mean(0)
        measured = np.asarray(cells[(cells.obs["perturbation"] == name).to_numpy()].X.mean(0))
        found.append(np.corrcoef(predicted, measured.ravel())[0, 1])
    return float(np.mean(found))


def predict(state, control, wanted):
    net, base, genes, n_cells = state
    known = set(base.var_names)
    asked = [w for w in wanted if set(net.of[w]) <= known]
    if not asked:
        raise ValueError("None of the targets was measured or perturbed in training.")
    profiles = [net.predict(base[:n_cells], w).mean(0)[: len(genes)] for w in asked]
    return answer(np.maximum(np.stack(profiles), 0), asked, genes, "log1p")[
        :, control.var_names
    ].copy()


if __name__ == "__main__":
    serve(fit, predict, GIVEN, {*PUBLISHED, "weights"})
