"""Stage A: what is hidden, what is predicted of it, and what happens when states collapse."""

import logging

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from plain import assert_same_axes, half_of, plain_components

import gpjepa
from gpjepa import GPJEPA
from gpjepa.model import CollapseError
from gpjepa.model._pretrain import CollapseGuard, masked_genes
from gpjepa.nn import ENCODERS


@pytest.fixture(scope="module")
def cells():
    return gpjepa.datasets.simulate(400, 60, n_targets=4, n_combinations=2, seed=3)


def pretrained(cells, epochs=2, encoder="mlp", batch_size=64, components=True, **plan):
    adata = cells.copy()
    scvi.settings.seed = 0
    GPJEPA.setup_anndata(adata)
    model = GPJEPA(adata, n_latent=8, n_hidden=32, encoder=encoder, components=components)
    model.pretrain(epochs, batch_size=batch_size, plan_kwargs=plan, enable_progress_bar=False)
    return model


def sets(cells):
    return {f"set {i}": list(cells.var_names[8 * i : 8 * i + 8]) for i in range(6)}


ARMS = {
    "masked reconstruction": {"objective": "reconstruction"},
    "contrastive": {"objective": "contrastive"},
    "sets of cells": {"set_size": 8},
    "no teacher": {"teacher": False},
    "SIGReg": {"teacher": False, "regulariser": "sigreg"},
    "thinned and noisy": {"thinning": 0.5, "noise": 0.25},
    "overlapping blocks": {"overlap": 0.3, "size_spread": 0.5, "n_blocks": 3, "hidden": 0.3},
    "adversarial": {"masks": "adversarial"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_kind_of_pretraining_learns_and_is_logged(cells, arm):
    model = pretrained(cells, 60, **ARMS[arm])
    history = model.history
    loss = history["pretrain_loss"].to_numpy(float).ravel()
    assert np.isfinite(loss).all()
    assert loss[-3:].mean() < loss[:2].mean()
    hidden = ARMS[arm].get("hidden", 0.5)
    assert history["pretrain_hidden_share"].to_numpy(float) == pytest.approx(hidden, abs=0.02)
    assert {"pretrain_effective_rank", "pretrain_latent_std", "pretrain_spread_ratio",
            "pretrain_block_size", "pretrain_regulariser_weight"} <= set(history)  # fmt: skip
    states = model.get_latent_representation()
    assert np.linalg.matrix_rank(states - states.mean(0)) > 4
    # Teacher and encoder are one in the end.
    for a, b in zip(model.module.encoder.parameters(), model.module.target_encoder.parameters(),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_gene_sets_and_regulons_are_hidden_as_wholes(cells, tmp_path):
    model = pretrained(cells)
    genes, read = model.genes, model._training_cells()
    (tmp_path / "sets.gmt").write_text(
        "".join("\t".join([name, "", *members]) + "\n" for name, members in sets(cells).items())
    )
    edges = pd.DataFrame(
        [(m[0], g) for m in sets(cells).values() for g in m[1:]], columns=["source", "target"]
    )
    edges.to_csv(tmp_path / "regulons.csv", index=False)
    found = [
        masked_genes({"masks": kind, kind: given}, read, genes, np.arange(len(read)))["groups"]
        for kind, given in (
            ("gene_sets", sets(cells)), ("gene_sets", tmp_path / "sets.gmt"),
            ("regulons", edges), ("regulons", tmp_path / "regulons.csv"),
        )
    ]  # fmt: skip
    for groups in found:
        members = [set(genes[g.numpy()]) for g in groups]
        assert sorted(map(sorted, members)) == sorted(map(sorted, sets(cells).values()))
    pretrained(cells, masks="gene_sets", gene_sets=sets(cells))


def test_adversarial_masks_hide_what_tells_perturbations(cells):
    """A gene that is nothing but the label is the first to be hidden."""
    told = cells.copy()
    counts = told.layers["counts"].toarray()
    counts[:, 7] = 40 * (told.obs["perturbation"] == "control").to_numpy()
    told.layers["counts"] = counts
    model = pretrained(told)
    read = model._training_cells()
    weights = masked_genes({"masks": "adversarial"}, read, model.genes, np.arange(len(read)))
    assert int(weights["weights"].argmax()) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "magic"}, "objective='magic'"),
        ({"regulariser": "magic"}, "regulariser='magic'"),
        ({"masks": "magic"}, "masks='magic'"),
        ({"masks": "gene_sets"}, "gene_sets are needed"),
        ({"gene_sets": {"a": ["b"]}}, "for nothing else"),
        (
            {"masks": "gene_sets", "gene_sets": {"a": ["no", "gene"]}},
            "has two of the measured genes",
        ),
        ({"masks": "regulons", "regulons": pd.DataFrame({"tf": []})}, "columns .* are missing"),
        ({"set_size": 8, "objective": "contrastive"}, "objective='jepa'"),
        ({"set_size": 3}, "even number from 4"),
        ({"set_size": 200}, "at least 2 are needed"),
        ({"thinning": 1.0}, "thinning=1.0"),
        ({"hidden": 1.0}, "one must stay visible"),
    ],
)
def test_wrong_options_are_told(cells, options, message):
    with pytest.raises(ValueError, match=message):
        pretrained(cells, **options)


def test_unlabelled_cells_have_no_sets_and_no_probe(cells):
    adata = cells.copy()
    GPJEPA.setup_anndata(adata, perturbation_key=None)
    for options in ({"set_size": 8}, {"masks": "adversarial"}):
        with pytest.raises(ValueError, match="the cells have none"):
            GPJEPA(adata).pretrain(1, plan_kwargs=options, enable_progress_bar=False)


def test_the_guard_warns_then_raises_the_regulariser_then_stops():
    guard = CollapseGuard(0.5)
    guard.look(rank=20, spread=1.0, ratio=0.5)
    assert guard.weight == 0.5
    with pytest.warns(UserWarning, match="effective rank 1.2"):
        guard.look(rank=1.2, spread=1.0, ratio=0.5)
    assert guard.weight == 0.5
    weights = []
    for _ in range(11):
        guard.look(rank=1.2, spread=1.0, ratio=0.5)
        weights.append(guard.weight)
    assert weights == [0.5, 0.5, 2, 2, 2, 8, 8, 8, 32, 32, 32]
    with pytest.raises(CollapseError, match="raised to 32"):
        guard.look(rank=9, spread=0.01, ratio=0.5)
    off = CollapseGuard(0.0)
    with pytest.warns(UserWarning, match="spread 0.01"):
        off.look(rank=9, spread=0.01, ratio=0.5)
    for _ in range(3):
        off.look(rank=9, spread=0.01, ratio=0.5)
    assert off.weight > 0
    off.look(rank=9, spread=1.0, ratio=0.5)
    with pytest.warns(UserWarning, match="spread 0.02"):
        off.look(rank=9, spread=0.02, ratio=0.5)


def test_the_guard_only_warns_of_predictions_that_hardly_vary():
    guard = CollapseGuard(0.5)
    with pytest.warns(UserWarning, match="spread is 0.001 of the targets'"):
        guard.look(rank=9, spread=1.0, ratio=0.001)
    for _ in range(20):  # neither again, nor more than that
        guard.look(rank=9, spread=1.0, ratio=0.001)
    assert guard.weight == 0.5


@pytest.mark.parametrize("encoder", sorted(set(ENCODERS) - {"components"}))
def test_an_encoder_that_collapses_is_seen_and_held_up(cells, encoder, caplog):
    """Without teacher and regulariser a constant is the best prediction of all."""
    with (
        caplog.at_level(logging.WARNING, "gpjepa"),
        pytest.warns(UserWarning, match="has collapsed"),
    ):
        model = pretrained(cells, 25, encoder, components=False, teacher=False, regulariser_weight=0.0,
                           n_blocks=4,
                           lr=1e-2 if encoder == "mlp" else 3e-3,
                           hidden=0.8)  # fmt: skip
    assert "regulariser's weight is now" in caplog.text
    assert float(model.history["pretrain_regulariser_weight"].iloc[-1].item()) > 0
    spread = model.history["pretrain_latent_std"].to_numpy(float).ravel()
    assert spread[-1] > 3 * spread.min()


def test_an_encoder_that_cannot_be_held_up_is_stopped(cells, monkeypatch):
    forward = ENCODERS["mlp"].forward
    monkeypatch.setattr(ENCODERS["mlp"], "forward", lambda self, *args: 1e-4 * forward(self, *args))
    with (
        pytest.warns(UserWarning, match="has collapsed"),
        pytest.raises(CollapseError, match="with the regulariser raised to 16"),
    ):
        pretrained(cells, 20, components=False, lr=1e-5)


def test_components_are_what_halves_of_the_counts_share(cells):
    model = pretrained(cells, encoder="components")
    assert not model.history
    read = model._training_cells()
    _, out = model._hold_out(read)
    ours = model.get_latent_representation()[~out]
    counts = read.counts[~out].toarray().astype(float)
    expected = plain_components(counts, read.library[~out], half_of(counts), 3)
    assert_same_axes(ours, expected, 0.95)  # other halves were drawn
    assert (ours**2).mean() == pytest.approx(1, abs=0.05)
